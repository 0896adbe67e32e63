"""Writing large files: several windows at once are read, converted and written; their checksum is taken in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_sepweight._checksum import Checksum
from llm_sepweight._manifest import FileInfo
from llm_sepweight._reading import PAGE, WeightFile, as_tensor, pages
from llm_sepweight._writing import DirectWriter

WINDOW = 8 << 20  # bytes
SLICE = 2 << 20  # bytes of a window that are converted at a time
THREADS = 4  # windows in memory
AHEAD = 12  # windows that are handed out, so that no thread waits while a file is synced

Progress = Callable[[int, int], None]
"""progress(bytes done, bytes in all)"""


@dataclass(frozen=True)
class Piece:
    """`nbytes` bytes of a file; copy(start, out) gives those from `start` on, to any thread."""

    nbytes: int
    copy: Callable[[int, memoryview], None]


Contents = Sequence[Piece]
"""What a file holds: its pieces follow each other without gaps."""


def literal(data: bytes) -> Piece:
    """Bytes that are known."""

    def copy(start: int, out: memoryview) -> None:
        out[:] = data[start : start + len(out)]

    return Piece(len(data), copy)


def converted(piece: Piece, dtype: torch.dtype, to: torch.dtype) -> Piece:
    """A tensor's bytes in another dtype."""
    if dtype == to:
        return piece

    def copy(start: int, out: memoryview) -> None:
        begin, end = start // to.itemsize, -(-(start + len(out)) // to.itemsize)
        count = min(end - begin, SLICE // max(dtype.itemsize, to.itemsize))  # values at a time
        memory, results = pages(count * dtype.itemsize), pages(count * to.itemsize)
        for first in range(begin, end, count):
            last = min(first + count, end)
            values, data = memory[: (last - first) * dtype.itemsize], results[: (last - first) * to.itemsize]
            piece.copy(first * dtype.itemsize, values)
            as_tensor(data, 0, to, (last - first,)).copy_(as_tensor(values, 0, dtype, (last - first,)))
            at = first * to.itemsize - start  # in `out`, of which the first and the last value may be cut
            out[max(at, 0) : at + len(data)] = data[max(-at, 0) : len(out) - at]

    return Piece(piece.nbytes // dtype.itemsize * to.itemsize, copy)


def of_file(file: WeightFile) -> Contents:
    """A file's bytes as they are."""

    def copy(start: int, out: memoryview) -> None:
        whole = len(out) // PAGE * PAGE  # in memory a read fills whole pages
        if whole:
            file.read(out[:whole], start, whole)
        if whole < len(out):
            last = pages(PAGE)
            file.read(last, start + whole, len(out) - whole)
            out[whole:] = last[: len(out) - whole]

    return [Piece(file.size, copy)]


def write_files(
    files: Iterable[tuple[Path, Contents]],
    *,
    advance: Callable[[int], None] | None = None,
    before: Callable[[str, FileInfo], None] | None = None,
) -> Generator[str, None, None]:
    """Write files one after the other; gives the checksum of each once it is on the disk under its name.

    advance: called with the size of each window once it is written. before: called with what a file is, before it gets its
    name. Closing the generator, or an error, leaves no thread at work and no temporary file. Memory: THREADS windows, and for
    each what a piece needs for itself.
    """
    return _in_windows(
        (_File(contents, DirectWriter(path, nbytes_of(contents)), before) for path, contents in files), advance
    )


def checksums(files: Iterable[Contents], *, advance: Callable[[int], None] | None = None) -> Generator[str, None, None]:
    """The same without writing anything: what the checksum of each file is."""
    return _in_windows((_File(contents, None) for contents in files), advance)


def nbytes_of(contents: Contents) -> int:
    return sum(piece.nbytes for piece in contents)


def _in_windows(files: Iterator[_File], advance: Callable[[int], None] | None) -> Generator[str, None, None]:
    local = threading.local()

    def window(file: _File, index: int) -> int:
        if not hasattr(local, "memory"):
            local.memory = pages(WINDOW)
        return file.window(index, local.memory)

    with ThreadPoolExecutor(THREADS, thread_name_prefix="llm_sepweight copy") as pool:
        under_way: deque[tuple[_File, int, Future[int]]] = deque()

        def take() -> Generator[str, None, None]:  # the oldest window; with its last one, a file is complete
            file, index, future = under_way[0]
            nbytes = future.result()
            if index == file.windows - 1:
                file.finish()
            under_way.popleft()
            if advance is not None:
                advance(nbytes)
            if index == file.windows - 1:
                yield file.checksum.text

        try:
            for file in files:
                for index in range(file.windows):
                    under_way.append((file, index, pool.submit(window, file, index)))
                    while len(under_way) > AHEAD:
                        yield from take()
            while under_way:
                yield from take()
        except BaseException as error:
            for file, _, _ in under_way:
                file.stop(error)
            raise
        finally:
            wait([future for _, _, future in under_way if not future.cancel()])
            for file, _, _ in under_way:
                file.abandon()


class _File:
    """A file in the making, or one that is only checked. Its windows may be filled and written in any order."""

    def __init__(
        self,
        contents: Contents,
        writer: DirectWriter | None,
        before: Callable[[str, FileInfo], None] | None = None,
    ) -> None:
        self.contents, self.nbytes, self.writer, self.before = contents, nbytes_of(contents), writer, before
        self.checksum = Checksum()
        self.windows = max(1, -(-self.nbytes // WINDOW))
        self._next = 0  # the window whose turn it is to be taken into the checksum
        self._stopped_by: BaseException | None = None
        self._turn = threading.Condition()

    def window(self, index: int, memory: memoryview) -> int:
        """Fill and write one window; its size."""
        start = index * WINDOW
        filled = memory[: min(WINDOW, self.nbytes - start)]
        try:
            fill(self.contents, start, filled)
            with self._turn:
                self._turn.wait_for(lambda: self._next == index or self._stopped_by is not None)
                if self._stopped_by is not None:
                    raise self._stopped_by
            self.checksum.update(filled)
            with self._turn:
                self._next += 1
                self._turn.notify_all()
            if self.writer is not None:
                self.writer.write(memory, start, len(filled))
        except BaseException as error:
            self.stop(error)
            raise
        return len(filled)

    def stop(self, error: BaseException) -> None:
        """Let no window wait for one that failed."""
        with self._turn:
            self._stopped_by = self._stopped_by or error
            self._turn.notify_all()

    def finish(self) -> None:
        if self.writer is not None:
            if self.before is not None:
                self.before(self.writer.path.name, FileInfo(self.nbytes, self.checksum.text))
            self.writer.finish()

    def abandon(self) -> None:
        if self.writer is not None:
            self.writer.abandon()


def fill(contents: Contents, start: int, out: memoryview) -> None:
    """Fill `out` with a file's bytes from `start` on."""
    at = 0  # where the piece starts in the file
    for piece in contents:
        first, last = max(start, at), min(start + len(out), at + piece.nbytes)
        if first < last:
            piece.copy(first - at, out[first - start : last - start])
        at += piece.nbytes
