"""Keys and values that do not fit in memory: on disk, a layer at a time in memory."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Caches = Mapping[str, tuple[Tensor, ...]]
PAGE = mmap.PAGESIZE
SPILL = "/var/tmp"  # on a disk, where /tmp is often memory


class SpilledCaches:
    """The caches of all layers in one unlinked file, of which one layer is in memory at a time.

    Every row begins at a page, in the file and in memory, so that reads and writes go past the page cache. Only slots
    in use are read, and only the pages with new slots are written. The bits are those of caches in memory where a slot is
    a multiple of 64 bytes: there, too, rows begin at the start of a vector then.
    """

    def __init__(self, layers: Mapping[str, nn.Module], rows: int, slots: int, dtype: torch.dtype, directory: Any):
        self._index = {part: i for i, part in enumerate(layers)}
        layer: Any = next(iter(layers.values()))
        like: tuple[Tensor, ...] = layer.new_cache(rows, slots, dtype=dtype, device="meta")
        for part, other in layers.items():
            if [t.shape for t in other.new_cache(rows, slots, dtype=dtype, device="meta")] != [t.shape for t in like]:  # pyright: ignore
                raise ValueError(f"{part} has caches of another shape than the first layer: they cannot go to disk")
        self._spare = slots - 1  # where padding is written; nobody sees it
        self._slot_nbytes = [t[0, 0].nbytes for t in like]
        self._strides = [-(-slots * nbytes // PAGE) * PAGE for nbytes in self._slot_nbytes]  # bytes from row to row
        self._starts = [rows * sum(self._strides[:i]) for i in range(len(like))]
        self._layer_nbytes = rows * sum(self._strides)
        self._buffer = mmap.mmap(-1, self._layer_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        flat = torch.frombuffer(self._buffer, dtype=torch.uint8)
        self._tensors = tuple(
            flat[start : start + rows * stride]
            .view(rows, stride)[:, : slots * nbytes]
            .view(dtype)
            .unflatten(1, t.shape[1:])
            for t, start, stride, nbytes in zip(like, self._starts, self._strides, self._slot_nbytes, strict=True)
        )  # each [rows, slots, ...]
        self.bytes_read = 0
        self._file, self._direct = _unlinked(directory, self._layer_nbytes * len(layers))
        self._let_go = weakref.finalize(self, os.close, self._file)

    def like(self, part: str) -> tuple[Tensor, ...]:
        """Tensors [rows, slots, ...] as those of the part; none where it has no caches here."""
        return self._tensors if part in self._index else ()

    def read(self, part: str, rows: range, kv_len: int, *, fresh: bool) -> tuple[Tensor, ...]:
        """The caches of a layer, with the slots up to `kv_len` of `rows`; nothing is read where the prefill is `fresh`."""
        if not fresh:
            for start, nbytes in self._pieces(rows, 0, kv_len):
                done = os.preadv(self._file, [memoryview(self._buffer)[start : start + nbytes]], self._at(part) + start)
                if done != nbytes:
                    raise OSError(
                        f"{part}: {done} of {nbytes} bytes of its keys and values could be read back from disk"
                    )
                self.bytes_read += nbytes
            self._drop(part)
        return self._tensors

    def write(self, part: str, rows: range, slots: Tensor) -> None:
        """Write the slots that the layer has just filled in `rows`: slots [B, T]; those above are stale."""
        for row, written in zip(rows, slots.tolist(), strict=True):
            kept = [slot for slot in written if slot < self._spare]
            if not kept:  # an idle row: what the buffer has there is not its own
                continue
            for start, nbytes in self._pieces(range(row, row + 1), min(kept), max(kept) + 1):
                self._write(part, memoryview(self._buffer)[start : start + nbytes], start)
        self._drop(part)

    def zero(self, row: int) -> None:
        """Clear a row in all layers."""
        for part in self._index:
            for start, stride in zip(self._starts, self._strides, strict=True):
                self._write(part, mmap.mmap(-1, stride), start + row * stride)
            self._drop(part)
        for tensor in self._tensors:  # where whole pages are written from, that have slots of later tokens too
            tensor[row] = 0

    def copy(self, source: int, target: int, slots: int) -> None:
        """Copy the first `slots` slots of a row to another, in all layers."""
        for part in self._index:
            self.read(part, range(source, source + 1), slots, fresh=False)
            for tensor in self._tensors:
                tensor[target, :slots] = tensor[source, :slots]
            self.write(part, range(target, target + 1), torch.tensor([[0, slots - 1]]))

    def close(self) -> None:
        """Give the disk back, as happens when nobody has these any more. A second time it does nothing."""
        self._let_go()
        self._file = -1  # the number is the next file's

    def __enter__(self) -> SpilledCaches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, part: str, data: mmap.mmap | memoryview, start: int) -> None:
        done = os.pwritev(self._file, [data], self._at(part) + start)
        if done != len(data):
            raise OSError(
                f"{part}: {done} of {len(data)} bytes of its keys and values could be written: is the disk full?"
            )

    def _drop(self, part: str) -> None:
        """Where there is no direct access: let go of the layer's pages in the page cache, which would count as memory."""
        if not self._direct:
            os.fdatasync(self._file)
            os.posix_fadvise(self._file, self._at(part), self._layer_nbytes, os.POSIX_FADV_DONTNEED)

    def _at(self, part: str) -> int:
        return self._index[part] * self._layer_nbytes

    def _pieces(self, rows: range, first: int, last: int) -> list[tuple[int, int]]:
        """(start, bytes) in the buffer of the pages with slots first to last, for each tensor and row."""
        pieces = []
        for start, stride, nbytes in zip(self._starts, self._strides, self._slot_nbytes, strict=True):
            low, high = first * nbytes // PAGE * PAGE, min(stride, -(-last * nbytes // PAGE) * PAGE)
            pieces += [(start + row * stride + low, high - low) for row in rows]
        return pieces


def check_caches(caches: Caches | SpilledCaches, like: Caches, rows: int, slots: Tensor, kv_len: int) -> None:
    """Refuse caches that have no place for what a pass writes to `slots` of that many rows, and reads up to `kv_len`.

    :param like: caches of one row and slot, on meta, of each part that has any.
    """
    low, high = int(slots.min()), max(int(slots.max()), kv_len - 1)
    if low < 0:
        raise ValueError(f"a position or slot is {low}: they count from 0")
    for part, expected in like.items():
        found = caches.like(part) if isinstance(caches, SpilledCaches) else caches.get(part, ())
        if [(t.dtype, t.shape[2:]) for t in found] != [(t.dtype, t.shape[2:]) for t in expected]:
            raise ValueError(
                f"{part}: its caches are {[_shown(t) for t in found]}, and have to be "
                f"{[_shown(t, '[rows, slots') for t in expected]}: make them with new_caches()"
            )
        for tensor in found:
            if tensor.shape[0] < rows or tensor.shape[1] <= high:
                raise ValueError(
                    f"{part}: caches of {tensor.shape[0]} rows and {tensor.shape[1]} slots are too few for {rows} rows and "
                    f"slot {high}, the last that is used: make them with new_caches(rows={rows}, slots={high + 1}) or more"
                )


def directory_for(spill: Any) -> Any:
    """Where caches go that are on disk. Raises ValueError where `spill` is given, and no directory."""
    if spill is not None and not os.path.isdir(spill):
        raise ValueError(f"spill={str(spill)!r} is no directory: make it, or name one that is there, on a disk")
    return spill or (SPILL if os.path.isdir(SPILL) else tempfile.gettempdir())


def may_hold(directory: Any, nbytes: int) -> bool:
    """Whether caches that would fit in memory may go to this directory: past the page cache, and with room to spare."""
    if not (hasattr(os, "preadv") and hasattr(os, "posix_fallocate")) or _in_memory(directory):
        return False
    try:
        file, direct = _unlinked(directory, PAGE)
    except OSError:
        return False
    os.close(file)
    return direct and shutil.disk_usage(directory).free > 2 * nbytes


def check_directory(directory: Any, nbytes: int) -> None:
    """Raise where caches of that size cannot go to this directory: as long as nothing is loaded."""
    os.close(_unlinked(directory, nbytes)[0])


def _shown(tensor: Tensor, start: str = "") -> str:
    shape = f"{start}{''.join(f', {n}' for n in tensor.shape[2:])}]" if start else str(list(tensor.shape))
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _in_memory(directory: Any) -> bool:
    """Whether the directory is on a file system that is itself memory."""
    mounts = Path("/proc/mounts").read_text().splitlines() if os.path.exists("/proc/mounts") else []
    kinds = {mount: kind for _, mount, kind, *_ in map(str.split, mounts)}
    place = Path(directory).resolve()
    while str(place) not in kinds and place != place.parent:
        place = place.parent
    return kinds.get(str(place)) in ("tmpfs", "ramfs")


def _unlinked(directory: Any, nbytes: int) -> tuple[int, bool]:
    """A file descriptor for `nbytes` of disk that go when it is closed, and whether it goes past the page cache."""
    if _in_memory(directory):
        raise ValueError(
            f"{directory} is memory, not disk: give spill= a directory on a disk, or a smaller rows= or context="
        )
    try:
        number, path = tempfile.mkstemp(prefix="llm_partial_run-caches-", dir=directory)
    except OSError as error:
        raise OSError(
            error.errno, f"no file can be made in {directory} ({error.strerror}) for keys and values: give spill= a directory on a "
            "disk, or a smaller rows= or context="
        ) from error  # fmt: skip
    os.close(number)
    try:
        try:
            file, direct = os.open(path, os.O_RDWR | os.O_DIRECT), True
        except (AttributeError, OSError):  # a system, or a file system, without direct access
            file, direct = os.open(path, os.O_RDWR), False
        try:
            os.posix_fallocate(file, 0, nbytes)
        except OSError as error:
            os.close(file)
            raise OSError(
                error.errno, f"no room for {nbytes >> 20} MiB of keys and values in {directory}: give spill=, rows= or "
                "context= another value"
            ) from error  # fmt: skip
        return file, direct
    finally:
        os.unlink(path)
