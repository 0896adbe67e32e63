"""Where the tensors of a part go in memory, and the few long reads that fill it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llm_sepweight._catalog import Entry, Extent
from llm_sepweight._reading import PAGE, whole_pages

GAP = 64 << 10  # bytes between two tensors that are cheaper read than skipped
ROW_GAP = 16 << 10  # the same between two rows read alone
ROW_READ = 1 << 20  # bytes read at a time for single rows


@dataclass(frozen=True)
class Sweep:
    """One read: `nbytes` bytes of a file from `offset` on go to `at`; both are multiples of a page."""

    file: str
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True)
class Placement:
    """A part in memory: `nbytes` bytes in whole pages, where each tensor starts, and how its bytes come there."""

    nbytes: int
    starts: dict[str, int]
    sweeps: tuple[Sweep, ...]
    copied: tuple[str, ...]  # these cannot be read in place


def in_place(entry: Entry) -> bool:
    """Whether the bytes in the file are the tensor as it stands: in one piece, and aligned for its dtype."""
    return len(entry.extents) == 1 and entry.extents[0].offset % entry.info.dtype.itemsize == 0


def place(entries: Mapping[str, Entry]) -> Placement:
    """Tensors that follow each other in a file do so in memory; each starts as far into a page as it does in the file."""
    extents: dict[str, Extent] = {
        name: entry.extents[0] for name, entry in entries.items() if entry.info.nbytes and in_place(entry)
    }
    starts = dict.fromkeys(entries, 0)
    sweeps: list[Sweep] = []
    end = 0  # of the memory given away so far
    for name in sorted(extents, key=lambda name: (extents[name].file, extents[name].offset)):
        extent = extents[name]
        last = sweeps[-1] if sweeps else None
        if last is not None and extent.file == last.file and extent.offset <= last.offset + last.nbytes + GAP:
            nbytes = max(last.nbytes, extent.offset + extent.nbytes - last.offset)
            sweeps[-1] = sweep = Sweep(last.file, last.offset, nbytes, last.at)
        else:
            offset = extent.offset // PAGE * PAGE
            sweep = Sweep(extent.file, offset, extent.offset + extent.nbytes - offset, end)
            sweeps.append(sweep)
        starts[name] = sweep.at + extent.offset - sweep.offset
        end = whole_pages(sweep.at + sweep.nbytes)
    copied = tuple(name for name, entry in entries.items() if entry.info.nbytes and name not in extents)
    for name in copied:
        starts[name] = end
        end = whole_pages(end + entries[name].info.nbytes)
    return Placement(end, starts, tuple(sweeps), copied)


RowGroup = tuple[int, np.ndarray]  # where in the result its rows start, and their numbers


def row_groups(unique: np.ndarray, row_nbytes: int) -> list[RowGroup]:
    """Sorted row numbers, cut where a gap is not worth reading or a read would get too long."""
    groups: list[RowGroup] = []
    start = 0
    for i in range(1, len(unique) + 1):
        if (
            i == len(unique)
            or (unique[i] - unique[i - 1] - 1) * row_nbytes > ROW_GAP
            or (unique[i] - unique[start] + 1) * row_nbytes > ROW_READ
        ):
            groups.append((start, unique[start:i]))
            start = i
    return groups
