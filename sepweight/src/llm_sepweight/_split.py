"""Writing a model as one file per part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from io import FileIO
from pathlib import Path
from typing import Any

from llm_sepweight._catalog import Entry
from llm_sepweight._checkpoint import Layout
from llm_sepweight._errors import WeightError
from llm_sepweight._header import file_order, make_header
from llm_sepweight._manifest import MANIFEST, describe, make_manifest
from llm_sepweight._placing import place
from llm_sepweight._reading import CHUNK, pages
from llm_sepweight._spec import chosen
from llm_sepweight._store import WeightStore, open

COMPANIONS = (  # what travels along with the weights
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def split(
    source: str | Path | WeightStore,
    destination: str | Path,
    *,
    layout: Layout | None = None,
    spec: str = "f",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the parts that `spec` names to a directory, one safetensors file each, and a manifest.

    source: what `open` opens, or a store that is open. Tokenizer and configuration files come along.
    progress: called with (bytes done, bytes in all) after each write. One part at a time is in memory.
    A matrix that belongs to two parts is stored once. The manifest comes last: without it, nothing there is complete.
    Raises WeightError where the destination holds a model already, cannot be written, or the source is damaged, and
    ValueError for a bad spec.
    """
    with nullcontext(source) if isinstance(source, WeightStore) else open(source, layout) as store:
        parts = chosen(spec, store.parts)
        directory = _new_directory(Path(destination), store.path)
        own, tied = _stored_once({part: store._part(part) for part in parts})
        headers = {
            part: make_header({name: entries[name].info for name in _order(entries)}) for part, entries in own.items()
        }
        total = sum(map(len, headers.values())) + sum(e.info.nbytes for part in own.values() for e in part.values())
        memory = pages(max(place(entries).nbytes for entries in own.values()))
        described: dict[str, Any] = {}
        done = 0
        for part, entries in own.items():
            store._load(part, entries, memory)
            starts = place(entries).starts
            spans = [memory[starts[name] : starts[name] + entries[name].info.nbytes] for name in _order(entries)]
            file_name = f"{part.replace('/', '.')}.safetensors"
            nbytes = 0
            with _written(directory / file_name) as file:
                for piece in _chunks([memoryview(headers[part]), *spans]):
                    _write(file, piece)
                    nbytes += len(piece)
                    if progress is not None:
                        progress(done + nbytes, total)
            done += nbytes
            tensors = {name: tied[part].get(name) or describe(entries[name].info) for name in store.tensors(part)}
            described[part] = {"file": file_name, "nbytes": nbytes, "tensors": tensors}
        for companion in _companions(store.path):
            with _written(directory / companion.name) as file:
                _write(file, memoryview(companion.read_bytes()))
        with _written(directory / MANIFEST) as file:
            manifest = make_manifest(store.config, described, _tool())
            _write(file, memoryview(json.dumps(manifest, indent=1).encode()))


def _new_directory(directory: Path, source: Path) -> Path:
    if (directory / MANIFEST).exists():
        remedy = "Choose another destination, or remove this one first."
        raise WeightError("there is a split model here already", file=directory / MANIFEST, remedy=remedy)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightError(f"the directory cannot be made: {error.strerror}", file=directory) from error
    if directory.samefile(source):
        raise WeightError("source and destination are the same", file=directory, remedy="Choose another destination.")
    return directory


def _stored_once(
    parts: Mapping[str, Mapping[str, Entry]],
) -> tuple[dict[str, dict[str, Entry]], dict[str, dict[str, dict[str, str]]]]:
    """What each part's file holds, and for the rest of its tensors, which are the same bytes, in which part they are."""
    own: dict[str, dict[str, Entry]] = {part: {} for part in parts}
    tied: dict[str, dict[str, dict[str, str]]] = {part: {} for part in parts}
    first: dict[Any, dict[str, str]] = {}
    for part, entries in parts.items():
        for name, entry in entries.items():
            bytes_of_it = tuple((extent.file, extent.offset) for extent in entry.extents)
            place_of_it = first.setdefault((entry.info, bytes_of_it), {"part": part, "name": name})
            if place_of_it == {"part": part, "name": name} or entry.info.nbytes == 0:
                own[part][name] = entry
            else:
                tied[part][name] = place_of_it
    return own, tied


def _order(entries: Mapping[str, Entry]) -> list[str]:
    return file_order({name: entry.info for name, entry in entries.items()})


def _chunks(spans: list[memoryview]) -> Iterator[memoryview]:
    for span in spans:
        for start in range(0, len(span), CHUNK):
            yield span[start : start + CHUNK]


def _companions(source: Path) -> list[Path]:
    found = {path.name: path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    return [found[name] for name in sorted(found)]


@contextmanager
def _written(path: Path) -> Iterator[FileIO]:
    """A file that bears its name only once it is complete and on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with _named(path):
            file = FileIO(partial, "w")
        with file:
            yield file
            with _named(path):
                os.fsync(file.fileno())
                if hasattr(os, "posix_fadvise"):  # leave the page cache to others
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with _named(path):
            os.replace(partial, path)
            _sync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _write(file: FileIO, data: memoryview) -> None:
    with _named(Path(str(file.name))):
        while data:
            data = data[file.write(data) :]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the file system say what was being written."""
    try:
        yield
    except OSError as error:
        problem = f"the file cannot be written: {error.strerror}"
        raise WeightError(problem, file=path, remedy="Make room or choose another destination.") from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tool() -> str:
    from llm_sepweight import __version__

    return f"llm_sepweight {__version__}"
