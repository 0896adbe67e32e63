"""The header of a safetensors file: 8 bytes of length (little-endian), that many bytes of JSON, then the data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llm_sepweight._catalog import DAMAGED, Extent, TensorInfo, parse_json, size_of
from llm_sepweight._errors import WeightError

HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
DIMENSIONS = 64  # more than any tensor has
PAGE = 4096

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, ours)
    for name, ours in {
        "BF16": "bfloat16",
        "F16": "float16",
        "F32": "float32",
        "F64": "float64",
        "BOOL": "bool",
        "I8": "int8",
        "I16": "int16",
        "I32": "int32",
        "I64": "int64",
        "U8": "uint8",
        "U16": "uint16",
        "U32": "uint32",
        "U64": "uint64",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
    }.items()
    if hasattr(torch, ours)  # the youngest are not in every torch
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_header(path: Path) -> list[Extent]:
    """The tensors of a safetensors file, in the order of their data.

    Raises WeightError where the header is not that of a safetensors file of exactly this size.
    """
    size = size_of(path)
    try:
        with path.open("rb", buffering=0) as file:
            length = header_length(file.read(8), size, path)
            text = file.read(length)
    except OSError as error:
        raise WeightError(f"the file cannot be read: {error.strerror}", file=path) from error
    return parse_header(text, size, path)


def header_length(start: bytes, size: int, file: object) -> int:
    """The bytes of JSON that follow the first eight bytes of a safetensors file of `size` bytes."""
    if start == b"version ":
        remedy = "Run `git lfs pull` there."
        raise WeightError("this is a git-lfs pointer, not the weights themselves", file=file, remedy=remedy)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > min(HEADER_LIMIT, size - 8):
        problem = f"no valid safetensors file, or cut short: {size} bytes, and its header claims {length}"
        raise WeightError(problem, file=file, remedy=DAMAGED)
    return length


def parse_header(text: bytes, size: int, file: object) -> list[Extent]:
    """The tensors that a header's JSON describes, in the order of their data, for a file of `size` bytes."""
    try:
        header = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"no valid safetensors header: {error}", file=file, remedy=DAMAGED) from error
    header.pop("__metadata__", None)
    data = 8 + len(text)
    extents = [_extent(key, fields, data, file) for key, fields in header.items()]
    extents.sort(key=lambda extent: (extent.offset, extent.nbytes))
    _check_cover(extents, data, size, file)
    return extents


def _extent(key: str, fields: Any, data: int, file: object) -> Extent:
    """One entry of the header: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}."""
    try:
        dtype, shape, (start, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
        counts = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        raise WeightError("no valid entry in the header", file=file, tensor=key, remedy=DAMAGED) from None
    sane = len(counts) <= DIMENSIONS and all(type(count) is int and count >= 0 for count in counts)
    if not sane or math.prod(count or 1 for count in shape) >= 1 << 63:
        raise WeightError("a shape or offset in the header is not possible", file=file, tensor=key, remedy=DAMAGED)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}", file=file, tensor=key)
    extent = Extent(key, str(file), data + start, DTYPES[dtype], tuple(shape))
    if stop - start != extent.nbytes:
        problem = f"the header gives {stop - start} bytes, but {dtype} {shape} takes {extent.nbytes}"
        raise WeightError(problem, file=file, tensor=key, remedy=DAMAGED)
    return extent


def _check_cover(extents: list[Extent], data: int, size: int, file: object) -> None:
    """The tensors follow each other without gap or overlap up to the end of the file."""
    end = data
    for extent in extents:
        if extent.offset != end:
            kind = "overlaps the one before it" if extent.offset < end else "leaves a gap after the one before it"
            raise WeightError(f"the data {kind}", file=file, tensor=extent.key, remedy=DAMAGED)
        end += extent.nbytes
        if end > size:
            problem = f"the file is cut short: {size} bytes, but this tensor ends at {end}"
            raise WeightError(problem, file=file, tensor=extent.key, remedy=DAMAGED)
    if end < size:
        problem = f"the file is longer than its header says: {size} bytes, and the data ends at {end}"
        raise WeightError(problem, file=file, remedy=DAMAGED)


def file_order(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Names such that each tensor starts at a multiple of the largest power of two (up to a page) that divides its size.

    Holes are not allowed in a safetensors file, so those whose sizes are multiples of a page come first.
    """
    return sorted(tensors, key=lambda name: -math.gcd(tensors[name].nbytes, PAGE))


def make_header(tensors: Mapping[str, TensorInfo]) -> bytes:
    """The header for these tensors in this order, padded with spaces to whole pages."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        fields[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [end, end := end + info.nbytes],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text
