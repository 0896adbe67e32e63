"""Test packages alone: each one's wheel in a fresh environment, with what it declares and its `test` extra, no sibling.

python tests_integration/isolation.py sampler sepweight
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="folders of packages, as they lie in the root")
    parser.add_argument("--pytest", default="", help='further arguments for pytest, as in --pytest="-x -k plan"')
    args = parser.parse_args()

    failed = []
    for folder in args.folders:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            passed = passes_alone(ROOT / folder, Path(temporary), pytest_args=args.pytest.split())
        print(f"{folder}: {'passes' if passed else 'FAILS'} alone, {time.monotonic() - start:.0f} s", flush=True)
        failed += [] if passed else [folder]
    if failed:
        sys.exit(f"failed alone: {', '.join(failed)}")


def passes_alone(package: Path, temporary: Path, *, pytest_args: list[str]) -> bool:
    """Build, install and test one package; everything made lies under `temporary`."""
    module, siblings = import_name(package), [import_name(other.parent) for other in ROOT.glob("*/pyproject.toml")]
    siblings.remove(module)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> bool:
        return subprocess.run(command, cwd=package, env=env).returncode == 0

    venv.create(temporary / "venv", symlinks=True)
    python, pytest = temporary / "venv/bin/python", temporary / "venv/bin/pytest"
    if not run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", temporary):
        return False
    (wheel,) = temporary.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", python)
    if not run(*pip, "install", "--quiet", "--no-compile", f"{wheel}[test]"):
        return False
    if not run(python, "-I", "-c", NO_SIBLINGS, *siblings):
        return False
    installed = next((temporary / "venv/lib").glob(f"*/site-packages/{module}"))
    settings = ("-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-p", "no:cacheprovider")
    return run(pytest, *settings, "--doctest-modules", installed, "tests", *pytest_args)


def import_name(package: Path) -> str:
    (init,) = package.glob("src/*/__init__.py")
    return init.parent.name


NO_SIBLINGS = """
import sys
from importlib.util import find_spec
found = [name for name in sys.argv[1:] if find_spec(name)]
sys.exit(f"importable, but not declared: {', '.join(found)}" if found else 0)
"""

if __name__ == "__main__":
    main()
