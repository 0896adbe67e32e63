"""Where weights come from: a store, or any callable seen as one; and the memory that they are read into."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._plan import READERS
from ._units import Unit, stored_parts


def as_store(weights: Any, parts: Mapping[str, nn.Module]) -> Any:
    """The weights themselves where they are a store (see llm_sepweight), else a store around the callable."""
    if hasattr(weights, "read") and hasattr(weights, "tensors"):
        return weights
    load = getattr(weights, "load", weights)
    if not callable(load):
        raise TypeError(f"weights have to be a store or a callable load(part); got {type(weights).__name__}. "
                        "For a dict of dicts pass its __getitem__")  # fmt: skip
    return LoadedWhole(load, parts)  # pyright: ignore[reportArgumentType]


def page_aligned(nbytes: int, *, pinned: bool = False) -> Tensor:
    """Memory for direct reads: uint8 [nbytes], from a page's start, given back to the system with the tensor.

    In huge pages where the system has them: direct reads into small ones, and computing from them, cost a good deal more.
    """
    if pinned:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def slot_for(unit: Unit, *, pinned: bool = False) -> Tensor:
    """Memory that a unit can be read into: direct reads begin and end at page bounds."""
    return page_aligned(unit.nbytes + 2 * mmap.PAGESIZE, pinned=pinned)


def read_rate(store: Any, units: list[Unit], seconds: float = 0.3) -> float:
    """Bytes per second with as many reads in flight as a pass has, measured for a moment."""
    largest, left, lock = max(units, key=lambda unit: unit.nbytes), iter(units), threading.Lock()

    def read(slot: Tensor) -> int:
        with lock:
            unit = next(left, None)
        if unit is None:
            return 0
        store.read(unit.part, unit.name, unit.start, unit.stop, slot)
        return unit.nbytes

    def read_on(slot: Tensor) -> int:
        done = 0
        while time.perf_counter() - start < seconds and (nbytes := read(slot)):
            done += nbytes
        return done

    with ThreadPoolExecutor(READERS, "llm_partial_run rate") as pool:
        slots = [slot_for(largest) for _ in range(READERS)]
        begun = time.perf_counter()
        first = sum(pool.map(read, slots))  # slower than what follows: it opens files, and touches the slots
        start = time.perf_counter()
        done = sum(pool.map(read_on, slots))
        return done / (time.perf_counter() - start) if done else first / (start - begun)


@dataclass(frozen=True)
class _Info:
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class LoadedWhole:
    """A plain `load(part)` callable, seen as a store: a part is loaded whole when a first slice of it is wanted."""

    HELD = 2  # parts in memory at once: the one in use, and the next one that is being read

    def __init__(self, load: Callable[[str], Mapping[str, Tensor]], parts: Mapping[str, nn.Module]):
        self._load, self._lock = load, threading.Lock()
        self._held: dict[str, Mapping[str, Tensor]] = {}
        self._infos = {
            part: {name: _Info(t.dtype, tuple(t.shape), t.nbytes) for name, t in self._part(part).items()}
            for part in stored_parts(parts)
        }
        self._held.clear()
        self.transient_nbytes = self.HELD * max(sum(i.nbytes for i in infos.values()) for infos in self._infos.values())

    def tensors(self, part: str) -> Mapping[str, _Info]:
        return self._infos[part]

    def read(self, part: str, name: str, start: int, stop: int, into: Tensor) -> Tensor:
        rows = self._part(part)[name][start:stop]
        view = into[: rows.nbytes].view(rows.dtype).view(rows.shape)
        return view.copy_(rows)

    def rows(self, part: str, name: str, ids: Tensor) -> Tensor:
        return self._part(part)[name][ids]

    def _part(self, part: str) -> Mapping[str, Tensor]:
        with self._lock:
            if part not in self._held:
                while len(self._held) >= self.HELD:
                    del self._held[next(iter(self._held))]
                self._held[part] = self._load(part)
            return self._held[part]
