"""What is where: the tensors of each part and the bytes of the files that they lie in."""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm_sepweight._errors import WeightError

T = TypeVar("T")
JSON_LIMIT = 100 << 20  # bytes; the largest index or manifest that is read
PART_NAME = re.compile(r"(?:begin|end|mid\.\d{5})(?:/\w+\.\d{5})*", re.ASCII)
DAMAGED = "Download the file again."


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor of a part is; `nbytes` is the size of its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Extent:
    """One tensor as it lies in a file: `nbytes` bytes from `offset` on."""

    key: str  # its name in the file
    file: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """One tensor of a part: the bytes of its extents, one after the other."""

    info: TensorInfo
    extents: tuple[Extent, ...]
    keys: tuple[str, ...]  # what the checkpoint calls it, or each row of a stack
    stack: bool = False

    @property
    def named(self) -> dict[str, Any]:
        """How a manifest says what the checkpoint calls it."""
        return {"keys": list(self.keys), **({"stacked": True} if self.stack and len(self.keys) == 1 else {})}


def whole(extent: Extent) -> Entry:
    """The tensor that is one tensor of the file."""
    info = TensorInfo(extent.dtype, extent.shape, extent.nbytes)
    return Entry(info, (extent,), (extent.key,))


def stacked(extents: tuple[Extent, ...]) -> Entry:
    """The tensor [len(extents), ...] whose rows along dim 0 are tensors of equal shape and dtype."""
    first = extents[0]
    nbytes = first.nbytes * len(extents)
    info = TensorInfo(first.dtype, (len(extents), *first.shape), nbytes)
    return Entry(info, extents, tuple(extent.key for extent in extents), stack=True)


@dataclass(frozen=True)
class Catalog:
    """All that is known of a store once it is open."""

    config: dict[str, Any]
    parts: dict[str, dict[str, Entry]]  # in the order of the model
    file_sizes: dict[str, int]
    unlisted: dict[str, str] = field(default_factory=dict)  # by file, a tensor in it that the index leaves out
    copies: list[tuple[Extent, Extent]] = field(default_factory=list)  # of a tensor; the index takes the second


def in_order(parts: Mapping[str, T]) -> dict[str, T]:
    """Begin, the layers by number, end; a part of a part after it."""
    rank = {"b": 0, "m": 1, "e": 2}
    return {part: parts[part] for part in sorted(parts, key=lambda name: (rank[name[0]], name))}


def size_of(path: Path) -> int:
    """The bytes of a regular file, which must be there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise WeightError("the file is missing", file=path, remedy=DAMAGED) from None
    except OSError as error:
        raise WeightError(f"the file cannot be read: {error.strerror}", file=path) from error
    if not stat.S_ISREG(status.st_mode):
        raise WeightError("this is not a regular file", file=path)
    return status.st_size


def plain_file_name(name: object, *, file: object) -> str:
    """`name`, if it names a file in the same directory and nowhere else."""
    if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\\0"):
        raise WeightError(f"points to {name!r}, which is not the name of a file beside it", file=file, remedy=DAMAGED)
    return name


def inside(file: Path) -> Path:
    """`file`, unless it is a link that leads out of its directory.

    The hub's cache is made of links, too: those from snapshots/REVISION/ to blobs/, which are allowed.
    """
    if file.is_symlink():
        try:
            target, directory = file.resolve().parent, file.parent.resolve()
        except (OSError, RuntimeError) as error:
            raise WeightError("this link leads nowhere", file=file) from error
        if not target.is_relative_to(directory) and target != directory.parent.parent / "blobs":
            remedy = "Put the file itself in its place."
            raise WeightError(f"this is a link that leads out of its directory, to {target}", file=file, remedy=remedy)
    return file


def read_limited(path: Path) -> bytes:
    """A small file: an index, a configuration, a manifest."""
    if size_of(inside(path)) > JSON_LIMIT:
        raise WeightError(f"larger than {JSON_LIMIT >> 20} MiB, which no index or configuration is", file=path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise WeightError(f"the file cannot be read: {error.strerror}", file=path) from error


def read_json(path: Path, parse: Callable[[bytes], dict[str, Any]] | None = None) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        return (parse or parse_json)(read_limited(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, WeightError):
            raise
        raise WeightError(f"no valid JSON: {error}", file=path, remedy=DAMAGED) from error


def parse_config(data: bytes) -> dict[str, Any]:
    """A model's config.json, in which Infinity and NaN may stand as Python or as transformers writes them."""
    return decoded(parse_json(data, constant=float))


def encoded(value: Any) -> Any:
    """A config without the numbers that JSON lacks: as transformers does, {"__float__": "Infinity"} stands for one.

    >>> encoded({"limits": [0.0, float("inf")]})
    {'limits': [0.0, {'__float__': 'Infinity'}]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {name: encoded(field) for name, field in value.items()}
    return [encoded(item) for item in value] if isinstance(value, (list, tuple)) else value


def decoded(value: Any) -> Any:
    """The config again, from what `encoded` made of it."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("NaN", "Infinity", "-Infinity"):
            return float(value["__float__"])
        return {name: decoded(field) for name, field in value.items()}
    return [decoded(item) for item in value] if isinstance(value, list) else value


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json(data: bytes, constant: Callable[[str], Any] = _not_json) -> dict[str, Any]:
    """A JSON object in which no name comes twice. Raises ValueError or RecursionError.

    constant: what makes a value of NaN, Infinity and -Infinity, which are not JSON.
    """
    value = json.loads(data.decode(), object_pairs_hook=_without_duplicates, parse_constant=constant)
    if not isinstance(value, dict):
        raise ValueError("an object is expected")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"{name!r} comes twice")
        value[name] = item
    return value
