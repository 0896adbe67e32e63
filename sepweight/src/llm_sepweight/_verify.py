"""Checking a split model, and mending it from a source."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_sepweight._checkpoint import Layout
from llm_sepweight._checksum import checksum
from llm_sepweight._copying import Progress, checksums, write_files
from llm_sepweight._damage import Damage, damages
from llm_sepweight._errors import WeightError
from llm_sepweight._journal import read_journal
from llm_sepweight._manifest import MANIFEST, Manifest, NewerError, PartInfo, read_manifest
from llm_sepweight._mending import mend_manifest
from llm_sepweight._parts import contents_of
from llm_sepweight._plan import FLOATS, PlannedPart, plan
from llm_sepweight._source import StoreSource
from llm_sepweight._store import WeightStore, open
from llm_sepweight._writing import locked, unfinished, write_bytes


def verify(
    path: str | Path,
    *,
    source: str | Path | WeightStore | None = None,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> list[Damage]:
    """Read every file of a split model and compare it with the manifest's checksums; the damaged and missing ones.

    source: what the model was split from, or another copy of it: damaged files are written anew, and are put in place only
        if they have the checksums that they must have. Where the manifest itself is damaged, it is written anew once all
        other files are what the source has; of those that are not, only what still stands in it can tell which are damaged,
        or were not there: what it does not tell is left as it is.
    layout: for the source, as in `open`. progress: called with (bytes done, bytes in all).
    Raises WeightError where there is no such directory, a split or fetch to it is not finished, its format is newer than
    this library, or the source cannot be read.

    >>> import tempfile, safetensors.torch, torch, llm_sepweight
    >>> with tempfile.TemporaryDirectory() as temporary:
    ...     directory = Path(temporary)
    ...     safetensors.torch.save_file({"head": torch.ones(2, 3)}, directory / "model.safetensors")
    ...     llm_sepweight.split(directory, directory / "split", layout=lambda key, config: [("end", key)])
    ...     (directory / "split" / "end.safetensors").write_bytes(b"")
    ...     print(*verify(directory / "split"))
    0
    end.safetensors: 0 bytes, where 4120 are expected
    """
    directory = Path(path)
    if not directory.is_dir():
        raise WeightError("there is no such directory", file=directory, remedy="Check the path.")
    manifest, found = _examined(directory, progress)
    if not found or source is None:
        return found
    with nullcontext(source) if isinstance(source, WeightStore) else open(source, layout) as store, locked(directory):
        tensors = StoreSource(store)
        if manifest is None:
            _check_finished(directory)
            return mend_manifest(directory, found[0], tensors, progress)
        return [_repair(directory, damage, manifest, tensors) for damage in found]


def _examined(directory: Path, progress: Progress | None) -> tuple[Manifest | None, list[Damage]]:
    """The manifest, unless it is damaged, and what is."""
    try:
        manifest = read_manifest(directory)
    except NewerError:
        raise
    except WeightError as error:
        _check_finished(directory)
        return None, [Damage(MANIFEST, error.problem)]
    return manifest, damages(directory, manifest, progress)


def _check_finished(directory: Path) -> None:
    """Where the manifest cannot be read, this may be the work of a split that goes on later, and knows what it holds."""
    journal = read_journal(directory)
    if journal is not None:
        problem = f"the split of {journal.plan.get('source')!r} to this directory is not finished"
        raise WeightError(problem, file=directory, remedy=journal.remedy("Run it again, as it was."))
    if unfinished(directory) and not (directory / MANIFEST).exists():
        problem = "a fetch or export to this directory is not finished"
        raise WeightError(problem, file=directory, remedy="Run it again, as it was.")


def _repair(directory: Path, damage: Damage, manifest: Manifest, source: StoreSource) -> Damage:
    """The damage once its file is written anew, if the source has what was in it."""
    rewritten = _companion_rewritten if damage.part is None else _part_rewritten
    try:
        if rewritten(directory, damage, manifest, source):
            return replace(damage, repaired=True)
        why = f"the source {source.name!r} does not hold what was in it"
    except WeightError as error:
        why = f"not repaired: {error}"
    return replace(damage, problem=f"{damage.problem}; {why}")


def _companion_rewritten(directory: Path, damage: Damage, manifest: Manifest, source: StoreSource) -> bool:
    if damage.file not in source.companion_names():
        return False
    data = source.companion(damage.file)
    if checksum(data) != manifest.files[damage.file].checksum:
        return False
    write_bytes(directory / damage.file, data)
    return True


def _part_rewritten(directory: Path, damage: Damage, manifest: Manifest, source: StoreSource) -> bool:
    assert damage.part is not None
    info = manifest.parts[damage.part]
    planned = _planned(source, damage.part, info)
    if planned is None:
        return False
    contents = contents_of(source, damage.part, planned)
    with closing(checksums([contents])) as texts:
        if next(texts) != info.checksum:
            return False
    with closing(write_files([(directory / damage.file, contents)])) as texts:
        return next(texts) == info.checksum


def _planned(source: StoreSource, part: str, info: PartInfo) -> PlannedPart | None:
    """The part's file as a split of the source would write it, in the dtype in which it was written."""
    for dtype in (None, *FLOATS) if part in source.parts else ():
        planned = plan(source.parts, dtype)[part]
        if _stored(planned.tensors) == _stored(info.tensors):
            return planned
    return None


def _stored(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: field for name, field in tensors.items() if "part" not in field}
