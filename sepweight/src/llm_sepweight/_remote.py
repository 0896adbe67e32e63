"""Directories that lie elsewhere: ranges of bytes of their files, and never any others."""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from llm_sepweight._catalog import JSON_LIMIT
from llm_sepweight._errors import WeightError

T = TypeVar("T")
START = 8  # bytes of a file that are read to learn its size: those that hold the length of a safetensors header
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two tries; they double


@dataclass(frozen=True)
class RemoteFile:
    """A file as it was when the source was asked first; every byte must be of that version."""

    name: str
    size: int
    version: str | None  # an ETag or the like; None: the source cannot tell versions apart
    start: bytes  # its first START bytes


class PassingError(WeightError):
    """A failure that may pass: it is tried again after a pause of at least `after` seconds."""

    after: float = 0


class TooLargeError(WeightError):
    """A file that is no small one."""

    def __init__(self, nbytes: int, file: str) -> None:
        super().__init__(f"{nbytes} bytes are too many for such a file", file=file)


class Remote(ABC):
    """A directory that lies elsewhere. Its methods may be called by several threads."""

    def __init__(self, name: str, *, timeout: float, retries: int) -> None:
        self.name = name  # for people, so without secrets
        self.timeout = timeout
        self.retries = retries
        self._stopped = threading.Event()

    @abstractmethod
    def names(self) -> Sequence[str] | None:
        """All files; None where the source does not list them."""

    def small(self, name: str) -> bytes | None:
        """A whole small file; None where there is none. Raises TooLargeError for one that is not small."""
        return self._patiently(lambda: self._small(name))

    def find(self, name: str) -> RemoteFile:
        """The file's size, version and first bytes. Raises WeightError where it is not there."""
        return self._patiently(lambda: self._find(name))

    def read(self, file: RemoteFile, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes of exactly this version of a file from `offset` on."""
        self._patiently(lambda: self._read(file, offset, out))

    @abstractmethod
    def still(self, file: RemoteFile) -> None:
        """Raises WeightError where the file was changed since it was found and `read` could not notice."""

    def identity(self, file: RemoteFile) -> list[Any]:
        """JSON that no other file has, as far as the source can tell."""
        return [file.name, file.size, file.version]

    def where(self, name: str) -> str:
        """The file as an error names it."""
        return f"{self.name}/{name}"

    def stop(self) -> None:
        """Reads under way end soon, with an error."""
        self._stopped.set()

    @abstractmethod
    def close(self) -> None:
        """Let go of connections; no read may be under way."""

    @abstractmethod
    def _small(self, name: str) -> bytes | None: ...

    @abstractmethod
    def _find(self, name: str) -> RemoteFile: ...

    @abstractmethod
    def _read(self, file: RemoteFile, offset: int, out: memoryview) -> None: ...

    def _patiently(self, attempt: Callable[[], T]) -> T:
        return patiently(attempt, retries=self.retries, stopped=self._stopped, name=self.name)

    def _changed(self, name: str) -> WeightError:
        problem = "the file was changed at the source while it was read"
        return WeightError(problem, file=self.where(name), remedy="Fetch again.")


def patiently(attempt: Callable[[], T], *, retries: int, stopped: threading.Event, name: str) -> T:
    """What an attempt gives; after a failure that may pass, and a pause, it is made again."""
    for tries in range(1, retries + 2):
        if stopped.is_set():
            raise WeightError("stopped", file=name)
        try:
            return attempt()
        except PassingError as error:
            if tries > retries or error.after > LONGEST_PAUSE:
                problem = f"{error.problem}; given up after {tries} tries"
                raise WeightError(problem, file=error.file, remedy=error.remedy) from error
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tries - 1) * random.uniform(0.5, 1))
            if stopped.wait(max(pause, error.after)):
                raise
    raise AssertionError("the last try returns or raises")


@contextmanager
def open_remote(source: str, *, headers: Mapping[str, str], timeout: float, retries: int) -> Iterator[Remote]:
    """The source that a URL or path names. Raises WeightError where a library for it is missing or it cannot be reached."""
    try:
        scheme = urlsplit(source).scheme if "://" in source else "file"
    except ValueError as error:
        raise WeightError(f"this is no valid address: {words(error)}", file=source, remedy="Check it.") from error
    try:
        if scheme in ("http", "https"):
            from llm_sepweight._http import HttpRemote

            opened: Remote = HttpRemote(source, headers, timeout=timeout, retries=retries)
        elif scheme == "hf":
            from llm_sepweight._hub import HubRemote

            opened = HubRemote(source, headers, timeout=timeout, retries=retries)
        else:
            opened = FileSystemRemote(source, timeout=timeout, retries=retries)
    except ImportError as error:
        problem = f"{scheme}:// needs a library: {words(error)}"
        raise WeightError(problem, file=shown(source), remedy="pip install 'llm_sepweight[remote]'") from error
    try:
        yield opened
    finally:
        opened.close()


class MissingError(WeightError):
    """There is no such file."""


class FileSystemRemote(Remote):
    """A directory on anything that fsspec knows: file://, s3://, gs://, memory://, ..."""

    def __init__(self, url: str, *, timeout: float, retries: int) -> None:
        super().__init__(shown(url), timeout=timeout, retries=retries)
        from fsspec.core import url_to_fs

        try:
            self._files, self._root = url_to_fs(url)
        except ValueError as error:
            remedy = "Sources are http(s)://, hf://owner/name, s3://, file:// or a path."
            raise WeightError(f"this is no source: {error}", file=self.name, remedy=remedy) from error
        except ImportError:
            raise
        except Exception as error:  # some ask the server at once, and have errors of their own
            problem = f"the source cannot be reached: {words(error)}"
            raise WeightError(problem, file=self.name, remedy="Check the address.") from error

    def names(self) -> Sequence[str]:
        with self._named(""):
            self._files.invalidate_cache()
            found = self._files.ls(self._root, detail=True)
            paths = [each["name"] for each in found if self._is_file(each)]
        return [path.rsplit("/", 1)[-1] for path in paths]

    def _small(self, name: str) -> bytes | None:
        try:
            with self._named(name):
                size = self._files.info(self._path(name))["size"]
                if size > JSON_LIMIT:
                    raise TooLargeError(size, self.where(name))
                return self._files.cat_file(self._path(name))
        except MissingError:
            return None

    def _find(self, name: str) -> RemoteFile:
        with self._named(name):
            size, version = self._facts(name)
            start = self._files.cat_file(self._path(name), start=0, end=START)
        return RemoteFile(name, size, version, start)

    def _read(self, file: RemoteFile, offset: int, out: memoryview) -> None:
        with self._named(file.name):
            data = self._files.cat_file(self._path(file.name), start=offset, end=offset + len(out))
        if len(data) != len(out):
            self.still(file)
            problem = f"{len(data)} bytes came, and not the {len(out)} from byte {offset} on"
            raise PassingError(problem, file=self.where(file.name))
        out[:] = data

    def still(self, file: RemoteFile) -> None:
        with self._named(file.name):
            if self._facts(file.name) != (file.size, file.version):
                raise self._changed(file.name)

    def close(self) -> None:
        pass  # fsspec keeps its connections for others to use

    def _is_file(self, info: Mapping[str, Any]) -> bool:
        kind = info["type"]
        return kind == "file" or (kind != "directory" and self._files.isfile(info["name"]))  # it may be a link to one

    def _facts(self, name: str) -> tuple[int, str]:
        self._files.invalidate_cache()
        info = self._files.info(self._path(name))
        return info["size"], self._files.ukey(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise MissingError("the file is not there", file=self.where(name), remedy="Check the source.") from None
        except PermissionError as error:
            raise WeightError(f"not allowed: {words(error)}", file=self.where(name)) from error
        except OSError as error:
            raise PassingError(f"reading failed: {words(error)}", file=self.where(name)) from error
        except WeightError:
            raise
        except Exception as error:  # what lies below fsspec has errors of its own, such as for missing credentials
            raise WeightError(f"reading failed: {words(error)}", file=self.where(name)) from error


def shown(url: str) -> str:
    """A URL without the secrets that may be in it."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def words(error: BaseException) -> Any:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
