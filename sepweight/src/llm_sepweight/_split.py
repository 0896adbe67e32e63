"""Splitting a checkpoint into one file per part."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from llm_sepweight._checkpoint import Layout, holds_weights
from llm_sepweight._copying import Progress
from llm_sepweight._errors import WeightError
from llm_sepweight._freeing import Freeing, catalog_from_json
from llm_sepweight._journal import read_journal
from llm_sepweight._manifest import MANIFEST, read_manifest
from llm_sepweight._parts import clear_stage, is_sound, write_parts
from llm_sepweight._source import StoreSource
from llm_sepweight._states import states
from llm_sepweight._store import WeightStore, open
from llm_sepweight._writing import locked, naming


def split(
    source: str | Path | WeightStore,
    destination: str | Path,
    *,
    layout: Layout | None = None,
    spec: str = "f",
    dtype: torch.dtype | None = None,
    in_place: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the parts that `spec` names to a directory, one safetensors file each, and a manifest with their checksums.

    source: what `open` opens, or a store that is open. Tokenizer and configuration files come along.
    dtype: what floating-point tensors are converted to; quantized ones of 8 bits stay as they are.
    in_place: remove each file of a checkpoint as soon as all its tensors that the layout does not drop are on the disk and
        were read back. The destination may be the source's own directory.
    progress: called with (bytes done, bytes in all).

    A matrix that belongs to two parts is stored once. The manifest comes last: without it, nothing there is complete.
    Interrupted, even by a crash, the same call goes on from the last complete part, and where all is done already it only
    checks that. Memory: 4 windows of 8 MiB and 4 to 6 MiB for each, to gather and convert; for a split model as the
    source 32 MiB more, to check it.
    Raises WeightError where the destination holds something else or is being written to, cannot be written, or the
    source is damaged (that of a split model is checked against its checksums) or changes meanwhile, and ValueError for a
    bad spec or dtype.
    """
    directory = Path(destination)
    with naming(directory):
        done = in_place and _was_done(source, directory)
    if done:
        with locked(directory):  # which removes the lock of one that was killed at its very end
            return
    with _opened(source, layout, directory, in_place) as store:
        with naming(directory):
            own = directory.exists() and directory.samefile(store.path)
        if own and not in_place:
            problem = "source and destination are the same"
            raise WeightError(problem, file=directory, remedy="Choose another destination, or split in place.")
        found = StoreSource(store)
        freeing = Freeing(found) if in_place else None
        with locked(directory):
            clear_stage(directory)
            write_parts(found, directory, spec=spec, dtype=dtype, progress=progress, freeing=freeing)


def _opened(
    source: str | Path | WeightStore, layout: Layout | None, directory: Path, in_place: bool
) -> AbstractContextManager[WeightStore]:
    if isinstance(source, WeightStore):
        if in_place:
            raise ValueError("in_place: give the path of a checkpoint, not a store that is open")
        return nullcontext(source)
    journal = read_journal(directory) if in_place else None
    if journal is None or "catalog" not in journal.plan:
        return open(source, layout)
    path = Path(source)
    catalog = catalog_from_json(journal.plan["catalog"], path)  # some of its files are gone
    return WeightStore(path, catalog, states=states(path))


def _was_done(source: object, directory: Path) -> bool:
    """Whether an earlier split in place has nothing left to do."""
    if isinstance(source, WeightStore) or not (directory / MANIFEST).exists() or read_journal(directory) is not None:
        return False
    path, manifest = Path(str(source)), read_manifest(directory)
    left = all(is_sound(path / name, info) for name, info in manifest.files.items())
    return path.is_dir() and not holds_weights(path) and manifest.source == path.resolve().name and left
