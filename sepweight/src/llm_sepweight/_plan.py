"""What the files of a split model hold: a pure function of its tensors and the dtype, whichever of them are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llm_sepweight._catalog import Entry, TensorInfo
from llm_sepweight._header import file_order, make_header
from llm_sepweight._manifest import part_file, stored

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PlannedPart:
    """A part's file: its header, then the data of the tensors in `order`; `tensors` as in the manifest."""

    file: str
    header: bytes
    order: list[str]
    infos: dict[str, TensorInfo]
    tensors: dict[str, dict[str, Any]]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(info.nbytes for info in self.infos.values())


def plan(parts: Mapping[str, Mapping[str, Entry]], dtype: torch.dtype | None = None) -> dict[str, PlannedPart]:
    """The files of all parts of a model, in order. A tensor that several parts have is stored with the first.

    dtype: that of floating-point tensors; those of 8 bits, which are quantized, keep theirs. Raises ValueError for
    one that is not possible.
    """
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype: {', '.join(map(str, FLOATS))} are possible, not {dtype}")
    own, tied = _stored_once(parts)
    planned = {}
    for part, entries in own.items():
        infos = {name: _as_stored(entry.info, dtype) for name, entry in entries.items()}
        order = file_order(infos)
        tensors = {
            name: tied[part][name] if name in tied[part] else stored(infos[name], entries[name].named)
            for name in parts[part]
        }
        header = make_header({name: infos[name] for name in order})
        planned[part] = PlannedPart(part_file(part), header, order, infos, tensors)
    return planned


def _as_stored(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    if dtype is None or info.dtype not in FLOATS:
        return info
    return TensorInfo(dtype, info.shape, info.nbytes // info.dtype.itemsize * dtype.itemsize)


def _stored_once(
    parts: Mapping[str, Mapping[str, Entry]],
) -> tuple[dict[str, dict[str, Entry]], dict[str, dict[str, dict[str, Any]]]]:
    """What each part's file holds, and for the rest of its tensors, which are the same bytes, in which part they are."""
    own: dict[str, dict[str, Entry]] = {part: {} for part in parts}
    tied: dict[str, dict[str, dict[str, Any]]] = {part: {} for part in parts}
    first: dict[Any, tuple[str, str]] = {}
    for part, entries in parts.items():
        for name, entry in entries.items():
            bytes_of_it = tuple((extent.file, extent.offset) for extent in entry.extents)
            holder, its_name = first.setdefault((entry.info, bytes_of_it), (part, name))
            if (holder, its_name) == (part, name) or entry.info.nbytes == 0:
                own[part][name] = entry
            else:
                tied[part][name] = {"part": holder, "name": its_name}
                if entry.named != parts[holder][its_name].named:  # two tensors of the checkpoint share these bytes
                    tied[part][name] |= entry.named
    return own, tied
