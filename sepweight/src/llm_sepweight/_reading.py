"""Reading a file past the page cache, straight into memory that the caller owns."""

from __future__ import annotations

import errno
import io
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from llm_sepweight._catalog import DAMAGED
from llm_sepweight._errors import WeightError

PAGE = 4096  # direct reads start at multiples of it, in the file and in memory
HUGE_PAGE = 2 << 20
CHUNK = 16 << 20  # bytes a read asks for at most
O_DIRECT: int = getattr(os, "O_DIRECT", 0)


class ReadError(WeightError):
    """A read that failed at `offset`."""

    def __init__(self, problem: str, *, file: str, offset: int, remedy: str = "") -> None:
        super().__init__(f"{problem}, at byte {offset}", file=file, remedy=remedy)
        self.offset = offset


class WeightFile:
    """A file that is read in pieces by any number of threads; opened at the first of them.

    Where direct reads are not possible, `on_buffered(path)` is called, reads go through the page cache, and what they
    leave there is dropped at once. `size`, in bytes, is what it must have, and so is `state`: time of change, in nanoseconds, and inode.
    """

    def __init__(
        self, path: str, size: int, on_buffered: Callable[[str], None], *, state: tuple[int, int] | None = None
    ) -> None:
        self.path = path
        self.direct = True
        self.size = size
        self._state = state
        self._on_buffered = on_buffered
        self._file: io.FileIO | None = None
        self._closed = False
        self._readers: set[int] = (
            set()
        )  # threads: one that was interrupted, and is still here, is not waited for by itself
        self._lock = (
            threading.RLock()
        )  # entered itself: an interrupt within the condition's own `__enter__` would keep it
        self._changed = threading.Condition(self._lock)

    def read(self, into: memoryview, offset: int, nbytes: int) -> None:
        """Read `nbytes` bytes from `offset` (a multiple of a page) into page-aligned memory of whole pages.

        Raises ReadError where the file ends before or the disk fails. Other threads run meanwhile.
        """
        with self._in_use() as descriptor:
            done = 0
            while done < nbytes:
                wanted = into[done : min(done + CHUNK, whole_pages(nbytes))]
                try:
                    got = os.preadv(descriptor, [wanted], offset + done)
                except OSError as error:
                    problem = f"reading failed: {error.strerror}"
                    raise ReadError(problem, file=self.path, offset=offset + done, remedy=_remedy(error)) from error
                if not self.direct and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, offset + done, got, os.POSIX_FADV_DONTNEED)
                if done + got < nbytes:
                    got -= got % PAGE  # only at the end of a file
                    if got == 0:
                        raise ReadError("the file ends too early", file=self.path, offset=offset + done, remedy=DAMAGED)
                done += got

    def rest(self) -> None:
        """Close the file until the next read, unless one is under way."""
        with self._lock:
            if not self._readers and self._file is not None:
                self._file.close()
                self._file = None

    def close(self) -> None:
        """Waits for reads that are under way; later ones are refused."""
        with self._lock:
            self._closed = True
            self._changed.wait_for(lambda: self._readers <= {threading.get_ident()})
            if self._file is not None:
                self._file.close()
                self._file = None

    @contextmanager
    def _in_use(self) -> Iterator[int]:
        """The file's descriptor, which stays open within."""
        with self._lock:
            if self._closed:
                raise WeightError("this store is closed", file=self.path, remedy="Open it again.")
            if self._file is None:
                self._file = self._open()
            self._readers.add(threading.get_ident())
            descriptor = self._file.fileno()
        try:
            yield descriptor
        finally:
            with self._lock:
                self._readers.discard(threading.get_ident())
                self._changed.notify_all()

    def _open(self) -> io.FileIO:
        try:
            file = self._open_direct()
            if file is None:
                self.direct = False
                self._on_buffered(self.path)
                file = io.FileIO(self.path)
        except OSError as error:
            raise WeightError(f"the file cannot be opened: {error.strerror}", file=self.path) from error
        status = os.fstat(file.fileno())
        if status.st_size != self.size or self._state not in (None, (status.st_mtime_ns, status.st_ino)):
            file.close()
            problem = f"the file was changed: {self.size} bytes when the store was opened, {status.st_size} now"
            if status.st_size == self.size:
                problem = "the file was changed since the store was opened"
            raise WeightError(problem, file=self.path, remedy="Open the store again.")
        return file

    def _open_direct(self) -> io.FileIO | None:
        """The file for direct reads, if one works: some file systems accept the flag and then refuse to read."""
        if not O_DIRECT:
            return None
        file = None
        try:
            file = io.FileIO(self.path, opener=lambda path, flags: os.open(path, flags | O_DIRECT))
            os.preadv(file.fileno(), [pages(PAGE)], 0)
            return file
        except OSError as error:
            if file is not None:
                file.close()
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return None


def pages(nbytes: int) -> memoryview:
    """Fresh page-aligned memory of at least `nbytes` bytes, in whole pages.

    Private and in huge pages where the system has them: direct reads then reach their rate with far less work for the
    kernel, which has to pin each page.
    """
    size = whole_pages(max(nbytes, 1))
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, size))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE:
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def page_aligned(into: Any, nbytes: int) -> memoryview:
    """The page-aligned memory of at least `nbytes` bytes within a writable buffer or uint8 tensor.

    Raises ValueError naming how many bytes would do.
    """
    if isinstance(into, torch.Tensor):
        if into.dtype != torch.uint8 or into.device.type != "cpu" or not into.is_contiguous():
            raise ValueError(f"into: a contiguous uint8 tensor on the CPU is needed, not {into.dtype} on {into.device}")
        into = into.detach().flatten().numpy()
    view = memoryview(into).cast("B")
    if view.readonly:
        raise ValueError("into: writable memory is needed")
    skip = -_address(view) % PAGE if len(view) else 0
    if len(view) - skip < nbytes:
        raise ValueError(f"into: {nbytes} bytes are needed from a page boundary on, but there are {len(view) - skip}")
    return view[skip:]


def as_tensor(memory: memoryview, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor in this memory, which it keeps alive."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).reshape(shape)


def _address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def whole_pages(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of a page."""
    return -(-nbytes // PAGE) * PAGE


def _remedy(error: OSError) -> str:
    return "Check the disk; the kernel's log says more." if error.errno == errno.EIO else ""
