"""Files that grow from their start while several ranges are on the way, and that a later run goes on with."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from llm_sepweight._catalog import parse_json, plain_file_name
from llm_sepweight._checksum import Checksum
from llm_sepweight._copying import Contents, Progress, fill, nbytes_of
from llm_sepweight._errors import WeightError
from llm_sepweight._writing import check_room, naming, put_in_place, remove, sync_directory, temporary, write_bytes

WINDOW = 4 << 20  # bytes asked for at a time
RECORD = ".sepweight.fetch"


@dataclass(frozen=True)
class Download:
    """A file to be made. `of` differs whenever its bytes may; check(path) raises where the whole file is not right."""

    name: str
    contents: Contents
    of: str
    check: Callable[[Path, str], None]  # given the path for the time being, and the checksum

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.contents)


@dataclass
class _Start:
    """How far a file is there already, with the checksum of that much."""

    nbytes: int = 0
    checksum: Checksum = field(default_factory=Checksum)
    in_place: bool = False


def download(
    wanted: Sequence[Download],
    directory: Path,
    *,
    model: str,
    pool: ThreadPoolExecutor,
    at_once: int,
    progress: Progress,
) -> dict[str, str]:
    """Make the files, one after the other; gives their checksums. at_once: windows that are handed to the pool.

    What an earlier run left of the same model is taken up as far as its record proves it right.
    """
    record = _Record(directory / RECORD, model)
    starts = {each.name: record.start(each) for each in wanted}
    done, total = sum(start.nbytes for start in starts.values()), sum(each.nbytes for each in wanted)
    check_room(directory, total - done)
    windows = (
        (each.contents, offset, min(WINDOW, each.nbytes - offset))
        for each in wanted
        for offset in range(starts[each.name].nbytes, each.nbytes, WINDOW)
    )
    arriving = _in_order(pool, windows, at_once)
    with record:
        progress(done, total)
        for each in wanted:
            start = starts[each.name]
            if start.in_place:
                continue
            with _opened(temporary(directory / each.name), start.nbytes) as file:
                reached = start.nbytes
                while reached < each.nbytes:
                    data = next(arriving)
                    _write(file, data)
                    start.checksum.update(data)
                    reached += len(data)
                    done += len(data)
                    record.add(each, reached, start.checksum)
                    progress(done, total)
                _sync(file)
            record.sync()
            _finish(each, directory / each.name, start.checksum.text)
    return {each.name: starts[each.name].checksum.text for each in wanted}


def forget(directory: Path, model: str, complete: Collection[str]) -> None:
    """Drop from the record the files that are complete, and all that is of another model."""
    _Record(directory / RECORD, model).forget(complete)


def files_begun(directory: Path, model: str) -> set[str]:
    """The files that unfinished fetches of this model to this directory have begun."""
    return _Record(directory / RECORD, model).names


class _Record:
    """A line for each window that was written: of which model and file, how far it has come, the checksum of that much.

    Nothing in it is believed before the file's bytes agree with it. It is synced before a file gets its name: without its
    lines the file would be somebody else's.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self.model = model
        self._file: FileIO | None = None
        self._lines: dict[tuple[str, str], tuple[int, str]] = {}  # (name, of) -> (bytes, checksum): the last counts
        self._others: set[str] = set()  # files that were begun of other models
        with naming(path):
            data = path.read_bytes() if path.exists() else b""
        for line in data.split(b"\n"):
            try:
                fields = parse_json(line)
                name, of = plain_file_name(fields["name"], file=path), fields["of"]
                nbytes, text = fields["nbytes"], fields["checksum"]
                if (type(of), type(nbytes), type(text)) != (str, int, str):
                    raise ValueError("no line of a record")
                if fields["model"] == model:
                    self._lines[name, of] = nbytes, text
                else:
                    self._others.add(name)
            except (ValueError, KeyError, RecursionError):
                continue  # cut short as its writer was killed, or damaged

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self._lines}

    def start(self, each: Download) -> _Start:
        """How far a file has come, as its bytes prove."""
        nbytes, text = self._lines.get((each.name, each.of), (0, ""))
        path = self.path.with_name(each.name)
        places = [path] if nbytes == each.nbytes else []
        places += [temporary(path)] if 0 < nbytes <= each.nbytes else []
        for place in places:
            found = _checksum_of(place, nbytes)
            if found is not None and found.text == text:
                return _Start(nbytes, found, in_place=place == path)
        return _Start()

    def add(self, each: Download, nbytes: int, checksum: Checksum) -> None:
        self._lines[each.name, each.of] = nbytes, checksum.text
        with naming(self.path):
            if self._file is None:
                self._file = FileIO(self.path, "a")
                self._file.write(b"\n")  # ends a line that was cut short
            self._file.write(self._line(each.name, each.of))

    def sync(self) -> None:
        """Make what was added last."""
        if self._file is not None:
            with naming(self.path):
                os.fsync(self._file.fileno())
                sync_directory(self.path.parent)

    def forget(self, complete: Collection[str]) -> None:
        for name in self._others - self.names:
            remove(temporary(self.path.with_name(name)))
        if lines := [self._line(name, of) for name, of in self._lines if name not in complete]:
            write_bytes(self.path, b"".join(lines))
        elif self.path.exists():
            remove(temporary(self.path))  # left by whoever was killed as it wrote the record anew
            remove(self.path)

    def _line(self, name: str, of: str) -> bytes:
        nbytes, checksum = self._lines[name, of]
        fields = {"model": self.model, "name": name, "of": of, "nbytes": nbytes, "checksum": checksum}
        return json.dumps(fields).encode() + b"\n"

    def __enter__(self) -> _Record:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def _in_order(
    pool: ThreadPoolExecutor, windows: Iterator[tuple[Contents, int, int]], at_once: int
) -> Generator[bytearray, None, None]:
    """The bytes of the windows, in their order, while later ones are on the way."""
    under_way: deque[Future[bytearray]] = deque()
    for window in windows:
        under_way.append(pool.submit(_read, *window))
        if len(under_way) == at_once:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _read(contents: Contents, start: int, nbytes: int) -> bytearray:
    data = bytearray(nbytes)
    fill(contents, start, memoryview(data))
    return data


@contextmanager
def _opened(path: Path, nbytes: int) -> Iterator[FileIO]:
    """The file with its first `nbytes` bytes, to be written on."""
    with naming(path):
        file = FileIO(path, "r+", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666))
        file.truncate(nbytes)
        file.seek(nbytes)
    with file:
        yield file


def _write(file: FileIO, data: bytearray) -> None:
    rest = memoryview(data)
    with naming(file.name):
        while rest:
            rest = rest[file.write(rest) :]


def _sync(file: FileIO) -> None:
    with naming(file.name):
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # leave the page cache to others
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _finish(each: Download, path: Path, checksum: str) -> None:
    try:
        each.check(temporary(path), checksum)
    except WeightError:
        remove(temporary(path))  # to go on with it would lead here again
        raise
    put_in_place(path)


def _checksum_of(path: Path, nbytes: int) -> Checksum | None:
    """That of the first `nbytes` bytes, if there are as many."""
    checksum = Checksum()
    with naming(path):
        if not path.is_file() or path.stat().st_size < nbytes:
            return None
        with FileIO(path) as file:
            while nbytes and (data := file.read(min(nbytes, WINDOW))):
                checksum.update(data)
                nbytes -= len(data)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return checksum
