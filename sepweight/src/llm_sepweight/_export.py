"""The way back: a Hugging Face checkpoint from a split model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llm_sepweight._catalog import TensorInfo, plain_file_name
from llm_sepweight._checkpoint import Layout, missing_layers
from llm_sepweight._checksum import checksum
from llm_sepweight._copying import Piece, Progress, literal, write_files
from llm_sepweight._errors import WeightError
from llm_sepweight._foreign import check_no_weights, check_same
from llm_sepweight._header import make_header
from llm_sepweight._journal import EXPORT, Journal, begin_journal, read_journal
from llm_sepweight._manifest import FileInfo
from llm_sepweight._parts import is_sound
from llm_sepweight._source import Source, StoreSource
from llm_sepweight._store import WeightStore, open
from llm_sepweight._writing import check_room, locked, remove, temporary, unfinished, write_bytes

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Tensor:
    key: str
    info: TensorInfo
    piece: Piece


def export(
    source: str | Path | WeightStore,
    destination: str | Path,
    *,
    layout: Layout | None = None,
    max_shard_nbytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> None:
    """Write a split model as a checkpoint that transformers loads: model.safetensors, or shards and their index.

    Tensors get the names back that they had in the checkpoint; tied ones are written once, as they were.
    source: also a checkpoint, with its layout. max_shard_nbytes: of tensors in a file; a larger tensor is alone in one.
    progress: called with (bytes done, bytes in all).
    Raises WeightError where parts are missing, the names are not known, the source is damaged, or the destination holds
    weights, other small files of the same names, or an unfinished split, fetch or dump, or cannot be written.
    Interrupted, it begins anew; the index, or the only file, comes last.
    """
    directory = Path(destination)
    with nullcontext(source) if isinstance(source, WeightStore) else open(source, layout) as store:
        _check_whole(store)
        tensors = StoreSource(store)
        shards = list(_sharded(_by_key(tensors), max_shard_nbytes))
        with locked(directory):
            _clear(directory)
            if (record := unfinished(directory)) is not None:
                remedy = "Finish it, as it was begun, or choose another destination."
                raise WeightError("there is something here that is not finished", file=record, remedy=remedy)
            check_no_weights(directory)
            check_same(directory, tensors.companions())
            _write(shards, tensors, directory, progress)
            remove(directory / EXPORT)


def _clear(directory: Path) -> None:
    """Remove what an export that was interrupted has written, but nothing that was put in its place."""
    if (journal := read_journal(directory, EXPORT)) is not None:
        for name in journal.plan["files"]:
            remove(temporary(directory / plain_file_name(name, file=journal.path)))
        for name, info in journal.done.items():
            if is_sound(path := directory / plain_file_name(name, file=journal.path), info):
                remove(path)
        remove(journal.path)


def _check_whole(store: WeightStore) -> None:
    """All parts of a model are here, as far as can be told."""
    missing = [part for part in ("begin", "end") if part not in store.parts]
    if missing := [*missing, *missing_layers(store.parts, store.config)]:
        remedy = "Fetch or split all parts first."
        raise WeightError(f"a checkpoint needs all parts, and {missing[0]} is missing", file=store.path, remedy=remedy)


def _by_key(source: StoreSource) -> dict[str, _Tensor]:
    """All tensors of the checkpoint, in the order of the model."""
    tensors: dict[str, _Tensor] = {}
    for part, entries in source.parts.items():
        for name, entry in entries.items():
            if not entry.keys or (entry.stack and entry.info.shape[:1] != (len(entry.keys),)):
                remedy = "Split the model from a checkpoint."
                problem = "what the checkpoint called this tensor is not known"
                raise WeightError(problem, file=source.store.path, part=part, tensor=name, remedy=remedy)
            shape = entry.info.shape[1:] if entry.stack else entry.info.shape
            info = TensorInfo(entry.info.dtype, shape, entry.info.nbytes // len(entry.keys))
            for i, key in enumerate(entry.keys):
                piece = Piece(info.nbytes, partial(_copy_slice, source, part, name, i * info.nbytes))
                tensors.setdefault(key, _Tensor(key, info, piece))  # a tied one is there already
    return tensors


def _copy_slice(source: Source, part: str, name: str, first: int, start: int, out: memoryview) -> None:
    source.copy(part, name, first + start, out)


def _sharded(tensors: dict[str, _Tensor], limit: int) -> Iterator[list[_Tensor]]:
    shard: list[_Tensor] = []
    size = 0
    for tensor in tensors.values():
        if shard and size + tensor.info.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.info.nbytes
    yield shard


def _write(shards: list[list[_Tensor]], source: StoreSource, directory: Path, progress: Progress | None) -> None:
    total, done = sum(tensor.info.nbytes for shard in shards for tensor in shard), 0
    check_room(directory, total)

    def advance(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total)  # headers are not counted
        if progress is not None:
            progress(done, total)

    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    companions = source.companions()
    with closing(begin_journal(directory, {"files": [*companions, *names, INDEX]}, EXPORT)) as journal:
        for name, data in companions.items():
            if not (directory / name).exists():
                _write_small(directory / name, data, journal)
        contents = (
            [literal(make_header({tensor.key: tensor.info for tensor in shard})), *(tensor.piece for tensor in shard)]
            for shard in shards
        )
        files = zip((directory / name for name in names), contents, strict=True)
        with closing(write_files(files, advance=advance, before=journal.add)) as written:
            for _ in written:
                source.check_unchanged()
        if count > 1:
            weight_map = {tensor.key: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_small(directory / INDEX, json.dumps(index, indent=2).encode(), journal)


def _write_small(path: Path, data: bytes, journal: Journal) -> None:
    journal.add(path.name, FileInfo(len(data), checksum(data)))
    write_bytes(path, data)
