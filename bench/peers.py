"""Installs what bench.py and sepweight.py compare with, each in an environment of its own below bench/.peers, with pip alone.

python bench/peers.py [NAME...] [--into FOLDER]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / ".peers"


@dataclass(frozen=True)
class Peer:
    """A program that does the same work, and the script here that drives it."""

    name: str
    requirements: tuple[str, ...]  # none: it runs in this environment
    worker: str
    has_torch: bool = True
    resident: str | None = None  # its name in the table when there is no memory limit; None: it has no such mode
    shares: tuple[float, ...] = (0.75,)  # see Job.share: the first that is not killed counts

    def python(self, folder: Path) -> Path:
        return folder / self.name / "bin" / "python" if self.requirements else Path(sys.executable)

    def installed(self, folder: Path) -> bool:
        return not self.requirements or (folder / self.name / "installed").exists()


PEERS = (  # those that decode
    Peer("offload", (), "ours_offload.py", resident="offload"),
    Peer(
        "accelerate",
        ("transformers>=5,<6", "accelerate>=1.15,<2"),
        "peer_accelerate.py",
        resident="transformers",
        shares=(0.8, 0.65, 0.5, 0.35, 0.2),
    ),
    Peer("airllm", ("airllm>=4,<5",), "peer_airllm.py"),
    Peer(
        "llama.cpp",
        ("llama-cpp-python>=0.3.36,<0.4", "gguf"),
        "peer_llamacpp.py",
        has_torch=False,
        resident="llama.cpp",
    ),
)

RUNAI = Peer("runai-model-streamer", ("runai-model-streamer>=0.17,<0.18", "numpy"), "sepweight_worker.py")
INSTALLABLE = (*PEERS, RUNAI)


def install(peer: Peer, folder: Path) -> str | None:
    """Make the peer's environment; None when it is there, else the last line of what pip said."""
    if peer.installed(folder):
        return None
    home, log = folder / peer.name, folder / f"{peer.name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    venv.create(home, with_pip=True, clear=True)
    # the same torch as ours, so that kernels are no part of the comparison; it comes first, alone
    steps = [(f"torch=={_torch_version()}",)] if peer.has_torch else []
    environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
    with open(log, "w") as out:
        for requirements in [*steps, peer.requirements]:
            command = [peer.python(folder), "-m", "pip", "install", *requirements]
            if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment).returncode:
                lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
                errors = [line for line in lines if line.lower().startswith("error")] or lines
                return f"{errors[-1] if errors else 'pip failed'} (all of it: {log})"
    (home / "installed").write_text("")
    return None


def _torch_version() -> str:
    return importlib.metadata.version("torch").split("+")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the programs that the benchmarks compare with.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(p.name for p in INSTALLABLE)} (default: all)"
    )
    parser.add_argument("--into", type=Path, default=FOLDER, help="default: %(default)s")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {peer.name for peer in INSTALLABLE}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for peer in INSTALLABLE:
        if not arguments.names or peer.name in arguments.names:
            print(f"{peer.name:<24}", end="", flush=True)
            error = install(peer, arguments.into)
            print("ready" if error is None else f"cannot be installed: {error}")


if __name__ == "__main__":
    main()
