"""Checking a split model, and mending it from a source."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_sepweight._catalog import parse_json
from llm_sepweight._checkpoint import Layout
from llm_sepweight._checksum import checksum
from llm_sepweight._copying import Progress, checksums, write_files
from llm_sepweight._damage import Damage, damages
from llm_sepweight._errors import WeightError
from llm_sepweight._journal import remove_journal
from llm_sepweight._manifest import MANIFEST, Manifest, PartInfo, read_manifest
from llm_sepweight._parts import contents_of, write_parts
from llm_sepweight._plan import FLOATS, PlannedPart, plan
from llm_sepweight._source import Source, StoreSource
from llm_sepweight._store import WeightStore, open
from llm_sepweight._writing import locked, remove, write_bytes


def verify(
    path: str | Path,
    *,
    source: str | Path | WeightStore | None = None,
    layout: Layout | None = None,
    progress: Progress | None = None,
) -> list[Damage]:
    """Read every file of a split model and compare it with the manifest's checksums; the damaged and missing ones.

    source: what the model was split from, or another copy of it: damaged files are written anew, and are put in place only
        if they have the checksums that they must have. Where the manifest itself is damaged, all parts are.
    layout: for the source, as in `open`. progress: called with (bytes done, bytes in all).
    Raises WeightError where there is no such directory or the source cannot be read.

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
    try:
        manifest = read_manifest(directory)
    except WeightError as error:
        found, manifest = [Damage(MANIFEST, error.problem)], None
    else:
        found = damages(directory, manifest, progress)
    if not found or source is None:
        return found
    with nullcontext(source) if isinstance(source, WeightStore) else open(source, layout) as store:
        if manifest is None:
            with locked(directory):
                _write_all(directory, StoreSource(store), progress)
            return [replace(damage, repaired=True) for damage in found]
        with locked(directory):
            return [_repair(directory, damage, manifest, StoreSource(store)) for damage in found]


def _repair(directory: Path, damage: Damage, manifest: Manifest, source: Source) -> Damage:
    """The damage once its file is written anew, if the source has what was in it."""
    rewritten = _companion_rewritten if damage.part is None else _part_rewritten
    try:
        if rewritten(directory, damage, manifest, source):
            return replace(damage, repaired=True)
        why = f"the source {source.name!r} does not hold what was in it"
    except WeightError as error:
        why = f"not repaired: {error}"
    return replace(damage, problem=f"{damage.problem}; {why}")


def _companion_rewritten(directory: Path, damage: Damage, manifest: Manifest, source: Source) -> bool:
    data = source.companions().get(damage.file)
    if data is None or checksum(data) != manifest.files[damage.file].checksum:
        return False
    write_bytes(directory / damage.file, data)
    return True


def _part_rewritten(directory: Path, damage: Damage, manifest: Manifest, source: Source) -> bool:
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


def _planned(source: Source, part: str, info: PartInfo) -> PlannedPart | None:
    """The part's file as a split of the source would write it, in the dtype in which it was written."""
    for dtype in (None, *FLOATS) if part in source.parts else ():
        planned = plan(source.parts, dtype)[part]
        if _stored(planned.tensors) == _stored(info.tensors):
            return planned
    return None


def _stored(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {name: field for name, field in tensors.items() if "part" not in field}


def _write_all(directory: Path, source: Source, progress: Progress | None) -> None:
    """Split anew what is here, where the manifest cannot be believed."""
    plans = {dtype: plan(source.parts, dtype) for dtype in (None, *FLOATS)}
    fitting = {dtype: _fitting(directory, everything) for dtype, everything in plans.items()}
    dtype = max(fitting, key=lambda dtype: len(fitting[dtype]))
    if not fitting[dtype]:
        problem = "the manifest is damaged, and the source does not hold what is in the other files"
        raise WeightError(problem, file=directory / MANIFEST, remedy="Split the model again, to another place.")
    everything = plans[dtype]
    here = {part for part, planned in everything.items() if (directory / planned.file).exists()}
    wanted = here | (_claimed(directory / MANIFEST) & everything.keys())
    remove(directory / MANIFEST)
    remove_journal(directory)
    write_parts(source, directory, spec=_spec(wanted, everything), dtype=dtype, progress=progress)


def _fitting(directory: Path, planned: Mapping[str, PlannedPart]) -> list[str]:
    """The parts whose files have the header that they would be given."""
    found = []
    for part, each in planned.items():
        path = directory / each.file
        if path.is_file():
            with path.open("rb") as file:
                if file.read(len(each.header)) == each.header:
                    found.append(part)
    return found


def _claimed(path: Path) -> set[str]:
    """The parts that a damaged manifest names, as far as it can be read."""
    try:
        return set(parse_json(path.read_bytes())["parts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _spec(parts: set[str], everything: Mapping[str, PlannedPart]) -> str:
    words = {"begin": "b", "end": "e"}
    tops = {part.split("/")[0] for part in everything if part in parts}
    return " ".join(words.get(top) or f"{int(top[4:])}:{int(top[4:]) + 1}" for top in sorted(tops))
