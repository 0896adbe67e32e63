"""What this machine gives at best: direct reads from the disk that holds the checkpoint, and reads of memory.

python bench/rates.py FILE...
"""

from __future__ import annotations

import mmap
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
WAYS = ((16 * MIB, 2), (16 * MIB, 4), (8 * MIB, 4), (4 * MIB, 3), (4 * MIB, 6))  # bytes of one read, reads in flight
BYTES_PER_SAMPLE = 1 << 29
SAMPLES = 3


@dataclass(frozen=True)
class DiskRate:
    """The best way's median, in bytes a second, over samples that had no part in choosing it."""

    rate: float
    chunk: int
    depth: int
    samples: tuple[float, ...]
    direct: bool

    def __str__(self) -> str:
        spread = f"{min(self.samples) / 1e9:.2f} to {max(self.samples) / 1e9:.2f}"
        how = f"{self.depth} x {self.chunk // MIB} MiB in flight" + ("" if self.direct else ", NOT direct")
        return f"{self.rate / 1e9:.2f} GB/s ({spread}; {how})"


def disk(files: Sequence[Path], *, sample: int = BYTES_PER_SAMPLE) -> DiskRate:
    """The plain direct-read rate of `files`: that of the best of WAYS, which is found first and then measured.

    The ways take turns, and each sample reads on where the one before it stopped. The best of several noisy medians is
    above what that way gives, so its rate is taken afresh, from as many bytes as all ways had together.
    """
    descriptors, direct = _open(files)
    try:
        spans = _Spans([(fd, os.fstat(fd).st_size) for fd in descriptors])
        tried: dict[tuple[int, int], list[float]] = {way: [] for way in WAYS}
        for _ in range(SAMPLES):
            for chunk, depth in WAYS:
                tried[chunk, depth].append(_read(spans, sample, chunk, depth))
        chunk, depth = max(tried, key=lambda way: statistics.median(tried[way]))
        samples = [_read(spans, sample * len(WAYS), chunk, depth) for _ in range(SAMPLES)]
    finally:
        for fd in descriptors:
            os.close(fd)
    return DiskRate(statistics.median(samples), chunk, depth, tuple(samples), direct)


def memory(nbytes: int = 1 << 30) -> float:
    """Bytes a second at which all threads together read memory: the best of sums and a matrix-vector product."""
    import torch

    matrix, vector = torch.ones(nbytes // 16384, 4096), torch.ones(4096)
    words = matrix.view(torch.int64)
    best = min(_seconds(read) for read in (matrix.sum, words.sum, words.max, lambda: matrix @ vector))
    return matrix.nbytes / best


class _Spans:
    """Hands out (descriptor, offset) of one chunk after the other, round and round over the files; not thread-safe."""

    def __init__(self, files: list[tuple[int, int]]) -> None:
        self.files = files
        self.file = self.offset = 0

    def next(self, chunk: int) -> tuple[int, int]:
        fd, size = self.files[self.file]
        if self.offset and self.offset + chunk > size:  # a short end would not be a whole chunk
            self.file, self.offset = (self.file + 1) % len(self.files), 0
            fd, size = self.files[self.file]
        at, self.offset = self.offset, self.offset + chunk
        return fd, at


def _open(files: Sequence[Path]) -> tuple[list[int], bool]:
    try:
        return [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in files], True
    except OSError:  # this file system has no direct reads: at least start from cold pages
        descriptors = [os.open(file, os.O_RDONLY) for file in files]
        for fd in descriptors:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptors, False


def _read(spans: _Spans, nbytes: int, chunk: int, depth: int) -> float:
    buffers = [_buffer(chunk) for _ in range(depth)]
    lock, left, got = threading.Lock(), max(depth, nbytes // chunk), [0] * depth

    def work(i: int) -> None:
        nonlocal left
        while True:
            with lock:
                if not left:
                    return
                left -= 1
                fd, offset = spans.next(chunk)
            got[i] += os.preadv(fd, [buffers[i]], offset)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(depth)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(got) / (time.perf_counter() - start)


def _buffer(nbytes: int) -> mmap.mmap:
    """Page-aligned memory, touched before; in huge pages where there are some, since reads into small ones are slower."""
    buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # neither every system nor every kernel has them
        buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer.write(bytes(nbytes))
    return buffer


def _seconds(function: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    print("disk   ", disk([Path(name) for name in sys.argv[1:]]))
    print("memory ", f"{memory() / 1e9:.1f} GB/s")
