"""Getting the bytes of tensors into memory, with several reads in flight, and checking them on the way if asked to."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from llm_sepweight._catalog import Entry
from llm_sepweight._checksum import Checksum
from llm_sepweight._errors import WeightError
from llm_sepweight._lazy import LazyChecks, Span
from llm_sepweight._placing import Placement, Sweep
from llm_sepweight._reading import CHUNK, PAGE, ReadError, WeightFile, pages, whole_pages

THREADS = 4  # reads in flight
BOUNCE = 4 << 20  # bytes that go through memory of our own at a time, where they cannot be read in place
OPEN_FILES = 128  # at most, but for those that are being read

Job = Callable[[], None]


class Reader:
    """The files of a store. All methods but `close` may be called by several threads at once.

    states: what the files must still be. checksums: of those that are to be checked when they are first read.
    """

    def __init__(
        self,
        path: Path,
        file_sizes: Mapping[str, int],
        states: Mapping[str, list[int]],
        checksums: Mapping[str, str],
    ) -> None:
        self._path = path
        known = {file: (modified, inode) for file, (_, modified, _, inode) in states.items()}
        self.files = {
            file: WeightFile(file, size, self._say_buffered, state=known.get(file)) for file, size in file_sizes.items()
        }
        self._checks = LazyChecks(checksums)
        self._open: dict[str, None] = {}  # those that may be open, the one used longest ago first
        self._lock = threading.Lock()
        self._local = threading.local()
        self._warned = False
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None

    def load(self, part: str, entries: Mapping[str, Entry], placement: Placement, memory: memoryview) -> None:
        """Fill memory with tensors of a part as they are placed there."""
        jobs: list[Job] = []
        checks: dict[int, Job] = {}  # what this thread does when a job is done, while others read on
        for sweep in placement.sweeps:
            take = self._check_on_the_way(part, sweep)
            for start in range(0, sweep.nbytes, CHUNK):
                nbytes, at = min(CHUNK, sweep.nbytes - start), sweep.at + start
                if take is not None:
                    checks[len(jobs)] = partial(take, memory[at : at + nbytes])
                jobs.append(partial(self._sweep, part, entries, sweep, start, memory[at : at + whole_pages(nbytes)]))
        for name in placement.copied:
            jobs += self._copies(part, name, entries[name], memory[placement.starts[name] :])
        self.run(jobs, checks)

    def fetch(
        self, part: str | None, name: str | None, file: str, offset: int, nbytes: int, memory: memoryview
    ) -> None:
        """Whole pages of a file, read by this thread."""
        with _at(part, name):
            if not self._checks.check(self._used(file), Span(offset, memory[:nbytes])):
                self._used(file).read(memory, offset, nbytes)

    def check(self, part: str, file: str, checks: LazyChecks) -> None:
        """Compare a file with its checksum, unless that was done before."""
        with _at(part, None):
            checks.check(self._used(file))

    def copy(self, part: str | None, name: str, entry: Entry, start: int, out: memoryview) -> None:
        """Bytes of a tensor from `start` on, through memory of this thread, to wherever they shall go."""
        bounce = self._bounce(min(BOUNCE, len(out)) + 2 * PAGE)
        step = entry.extents[0].nbytes
        done = 0
        while done < len(out):
            extent, skip = entry.extents[(start + done) // step], (start + done) % step
            nbytes = min(BOUNCE, step - skip, len(out) - done)
            at = (extent.offset + skip) % PAGE
            self.fetch(part, name, extent.file, extent.offset + skip - at, at + nbytes, bounce)
            out[done : done + nbytes] = bounce[at : at + nbytes]
            done += nbytes

    def run(self, jobs: list[Job], after: Mapping[int, Job] | None = None) -> None:
        """All jobs at once; on return, or when the first error is raised, none is running any more.

        after: what the calling thread does once the job of that number is done.
        """
        after = after or {}
        if len(jobs) == 1:
            jobs[0]()
            return after.get(0, _nothing)()
        futures: list[Future[None]] = []
        try:
            for job in jobs:
                futures.append(self._submit(job))
            for number, future in enumerate(futures):
                future.result()
                after.get(number, _nothing)()
        finally:  # the memory is the caller's again
            for future in futures:
                future.cancel()
            wait(futures)

    def close(self) -> None:
        """Close all files and end all threads, once reads under way have ended."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        for file in self.files.values():
            file.close()

    def _used(self, file: str) -> WeightFile:
        """A file that is about to be read; the one that has not been for the longest time may have to be closed."""
        with self._lock:
            self._open.pop(file, None)
            self._open[file] = None
            idle = next(iter(self._open)) if len(self._open) > OPEN_FILES else None
            if idle is not None:
                del self._open[idle]
        if idle is not None:
            self.files[idle].rest()
        return self.files[file]

    def _sweep(self, part: str, entries: Mapping[str, Entry], sweep: Sweep, start: int, memory: memoryview) -> None:
        """One chunk of a sweep."""
        try:
            with _at(part, None):
                self._used(sweep.file).read(memory, sweep.offset + start, min(CHUNK, sweep.nbytes - start))
        except ReadError as error:
            error.tensor = _tensor_at(entries, sweep.file, error.offset)
            raise

    def _check_on_the_way(self, part: str, sweep: Sweep) -> Callable[[memoryview], None] | None:
        """Where the file is to be checked: what takes the sweep's bytes in their order, and compares at the last."""
        file = self._used(sweep.file)
        if not self._checks.pending(file.path):
            return None
        if sweep.offset > BOUNCE or sweep.offset + sweep.nbytes < file.size:  # this part reads only some of it
            with _at(part, None):
                self._checks.check(file)
            return None
        header = pages(sweep.offset)
        with _at(part, None):
            file.read(header, 0, sweep.offset)
        checksum, left = Checksum(), sweep.nbytes
        checksum.update(header[: sweep.offset])

        def take(data: memoryview) -> None:
            nonlocal left
            checksum.update(data)
            left -= len(data)
            if left == 0:
                with _at(part, None):
                    self._checks.compare(file.path, checksum.text)

        return take

    def _copies(self, part: str, name: str, entry: Entry, out: memoryview) -> list[Job]:
        """Jobs that together copy a whole tensor: one for each extent."""
        step = entry.extents[0].nbytes
        return [
            partial(self.copy, part, name, entry, start, out[start : start + step])
            for start in range(0, entry.info.nbytes, step)
        ]

    def _bounce(self, nbytes: int) -> memoryview:
        """Page-aligned memory that this thread uses again and again."""
        if len(getattr(self._local, "bounce", b"")) < nbytes:
            self._local.bounce = pages(nbytes)
        return self._local.bounce

    def _submit(self, job: Job) -> Future[None]:
        with self._lock:
            if self._closed:
                raise WeightError("this store is closed", file=self._path, remedy="Open it again.")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="llm_sepweight")
            return self._pool.submit(job)

    def _say_buffered(self, file: str) -> None:
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            warnings.warn(f"{file}: no direct reads on this file system; reading through the page cache", stacklevel=2)


@contextmanager
def _at(part: str | None, name: str | None) -> Iterator[None]:
    """Errors say for which part and tensor the file was read."""
    try:
        yield
    except WeightError as error:
        error.part, error.tensor = part, name
        raise


def _nothing() -> None:
    pass


def _tensor_at(entries: Mapping[str, Entry], file: str, offset: int) -> str | None:
    """The first tensor whose data goes beyond this offset of a file."""
    ends = [
        (extent.offset + extent.nbytes, name)
        for name, entry in entries.items()
        for extent in entry.extents
        if extent.file == file and extent.offset + extent.nbytes > offset
    ]
    return min(ends)[1] if ends else None
