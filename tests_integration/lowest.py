"""Test packages with exactly the lower bounds that they declare: of each dependency and extra, and of Python where it is here.

python tests_integration/lowest.py sampler sepweight
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import metadata, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from isolation import ROOT, import_name

ENVIRONMENT = ROOT / ".venv-lowest"
OLDEST = "python3.10"  # `requires-python` of all packages
FOLDERS: dict[str, Path] = {
    canonicalize_name(import_name(path.parent)): path.parent for path in ROOT.glob("*/pyproject.toml")
}
COMPOSED = ["tests_integration/test_command_line.py", "tests_integration/test_readme.py"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of packages, as they lie in the root")
    parser.add_argument("--python", default=OLDEST, help=f"what to make the environment with (default: {OLDEST})")
    args = parser.parse_args()

    names = [canonicalize_name(import_name(ROOT / folder)) for folder in args.folders]
    names.sort(key=lambda name: len(lower_bounds(name, all_extras(name))[1]))  # those that compose others last
    subprocess.run([found(args.python), "-m", "venv", "--clear", "--without-pip", ENVIRONMENT], check=True)
    failed = []
    for name in names:
        start = time.monotonic()
        passed = passes(name)
        print(
            f"{name}: {'passes' if passed else 'FAILS'} at its lower bounds, {time.monotonic() - start:.0f} s\n",
            flush=True,
        )
        failed += [] if passed else [name]
    if failed:
        sys.exit(f"failed at their lower bounds: {', '.join(failed)}")


def passes(name: str) -> bool:
    """Install a package with all its extras at their lower bounds, beside what is there, and run its tests."""
    extras = all_extras(name)
    bounds, siblings = lower_bounds(name, extras)
    print(f"{name}[{','.join(extras)}]: {', '.join(bounds)}", flush=True)
    constraints = ENVIRONMENT / "bounds.txt"
    constraints.write_text("\n".join(bounds))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PIP_CONSTRAINT": str(constraints)
    }

    def run(*command: str | Path, cwd: Path = ROOT) -> bool:
        return subprocess.run(command, cwd=cwd, env=env).returncode == 0

    python = ENVIRONMENT / "bin/python"
    editable = [f"--editable={FOLDERS[name]}[{','.join(extras)}]"] + [
        f"--editable={FOLDERS[other]}" for other in siblings
    ]
    if not run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *editable):
        return False
    pytest = (python, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider")
    alone = run(*pytest, "-q", "--doctest-modules", "src", "tests", cwd=FOLDERS[name])
    return alone and (not siblings or run(*pytest, "-q", "--noconftest", *COMPOSED))  # it is for transformers' models


def lower_bounds(name: str, extras: Iterable[str]) -> tuple[list[str], list[str]]:
    """`torch==2.6`, ... for what a package with these extras needs, and the packages of this project among that."""
    bounds: dict[str, None] = {}
    siblings: dict[str, None] = {}
    for requirement in map(Requirement, requires(name) or ()):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        needed = canonicalize_name(requirement.name)
        if needed in FOLDERS:
            inner, others = lower_bounds(needed, requirement.extras)
            bounds |= dict.fromkeys(inner)
            siblings |= dict.fromkeys(other for other in (needed, *others) if other != name)
        else:
            (lowest,) = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
            bounds[f"{needed}=={lowest}"] = None
    return list(bounds), list(siblings)


def all_extras(name: str) -> list[str]:
    return metadata(name).get_all("Provides-Extra") or []


def found(python: str) -> str:
    """The Python that was asked for where it is here; else the one that runs this, said aloud."""
    path = shutil.which(python)
    if path and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
        return path
    print(f"{python} does not run here: testing with Python {sys.version.split()[0]} instead", flush=True)
    return sys.executable


if __name__ == "__main__":
    main()
