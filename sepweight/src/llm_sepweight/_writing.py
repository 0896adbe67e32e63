"""Files that bear their names only once they are complete and on the disk, in a directory that has one writer."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from llm_sepweight._errors import WeightError
from llm_sepweight._reading import O_DIRECT, PAGE, pages, whole_pages

LOCK = ".sepweight.lock"
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def temporary(path: Path) -> Path:
    """What a file is called until it is complete."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def written(path: Path) -> Iterator[FileIO]:
    """A file that is put in place, on the disk, at the end of the block; after an error it is gone."""
    partial = temporary(path)
    try:
        with naming(path):
            file = FileIO(partial, "w")
        with file:
            yield file
            with naming(path):
                os.fsync(file.fileno())
        put_in_place(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """A small file, all at once."""
    with written(path) as file, naming(path):
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def put_in_place(path: Path) -> None:
    """Give the temporary file, which is on the disk, its name."""
    with naming(path):
        os.replace(temporary(path), path)
        sync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there, so that it stays removed."""
    try:
        path.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        problem = f"the file cannot be removed: {error.strerror}"
        raise WeightError(problem, file=path, remedy="Allow it, then run it again.") from error


def sync_directory(directory: Path) -> None:
    """Make renames and removals in a directory last."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_room(directory: Path, nbytes: int) -> None:
    """Raises WeightError where a directory's disk has not `nbytes` bytes free."""
    status = os.statvfs(directory)
    if (free := status.f_bavail * status.f_frsize) < nbytes:
        problem = f"{nbytes:,} bytes are to be written, but the disk has only {free:,} free"
        raise WeightError(problem, file=directory, remedy="Make room or choose another destination.")


def unfinished(directory: Path) -> Path | None:
    """What whoever wrote to a directory has left because it needs it to go on."""
    return min((path for path in directory.glob(".sepweight.*") if path.name != LOCK), default=None)


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Errors of the file system say what was being written."""
    try:
        yield
    except OSError as error:
        way = "Allow it" if error.errno in DENIED else "Make room"
        remedy = f"{way} or choose another destination, then run it again."
        problem = f"the file cannot be written: {error.strerror}"
        raise WeightError(problem, file=path, remedy=remedy) from error


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """The directory, which is made, for one writer: WeightError where another process, or thread, is writing there.

    One that was killed holds no lock. A directory that was made and stayed empty is removed.
    """
    path = directory / LOCK
    with naming(directory):
        new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
    with naming(path):
        descriptor = _lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still ours: whoever opened it before finds another file there, or none
        os.close(descriptor)
        if new:
            with suppress(OSError):  # it is not empty
                directory.rmdir()


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            remedy = "Wait until it is done, or choose another destination."
            raise WeightError("another process is writing here", file=path.parent, remedy=remedy) from None
        os.close(descriptor)


class DirectWriter:
    """A temporary file that several threads write past the page cache, in windows from page-aligned memory."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self._direct = bool(O_DIRECT)
        with naming(path):
            temporary(path).unlink(missing_ok=True)
            self._file = self._open()

    def write(self, memory: memoryview, offset: int, nbytes: int) -> None:
        """Write the first `nbytes` bytes of memory (whole pages) to `offset`, a multiple of a page."""
        with naming(self.path):
            done, end = 0, whole_pages(nbytes) if self._direct else nbytes
            while done < end:
                got = os.pwrite(self._file.fileno(), memory[done:end], offset + done)
                if self._direct and done + got < end:
                    got -= got % PAGE  # the next write has to begin with a page
                if got == 0:
                    raise OSError(errno.ENOSPC, "the disk takes no more of it")
                done += got
            if not self._direct and hasattr(os, "posix_fadvise"):
                os.fdatasync(self._file.fileno())  # only clean pages can be dropped
                os.posix_fadvise(self._file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """All is written: make it last, and give it its name."""
        with self._file, naming(self.path):
            os.truncate(self._file.fileno(), self.nbytes)
            os.fsync(self._file.fileno())
        put_in_place(self.path)

    def abandon(self) -> None:
        """Close the file, and remove it unless it has been finished."""
        self._file.close()
        temporary(self.path).unlink(missing_ok=True)

    def _open(self) -> FileIO:
        partial = temporary(self.path)
        if self._direct:
            with suppress(OSError):
                file = FileIO(partial, "w", opener=lambda path, flags: os.open(path, flags | O_DIRECT, 0o666))
                try:
                    os.pwrite(
                        file.fileno(), pages(PAGE), 0
                    )  # some file systems accept the flag and then refuse to write
                    return file
                except OSError:
                    file.close()
            self._direct = False
        return FileIO(partial, "w")
