"""What else lies where weights are to be written: nothing of it may be lost, and two models never mixed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from llm_sepweight._errors import WeightError

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf")
REMEDY = "Choose another destination, or remove this first."


def check_no_weights(directory: Path, own: Collection[str] = ()) -> None:
    """Raises WeightError where a directory holds weights, or what lists them, under other names than these."""
    for path in sorted(directory.iterdir()):
        weights = path.suffix in WEIGHTS or path.name.endswith((".index.json", "sepweight.json"))
        if weights and path.name not in own and not path.name.startswith("."):
            raise WeightError("there are other weights here already", file=path, remedy=REMEDY)


def check_same(directory: Path, files: Mapping[str, bytes]) -> None:
    """Raises WeightError where one of these files is there already and holds something else."""
    for name, data in files.items():
        path = directory / name
        if path.exists() and not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
            raise WeightError("this would be overwritten, and is of another model", file=path, remedy=REMEDY)
