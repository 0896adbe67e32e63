"""Writing the parts of a model, so that a crash at any moment costs no more than the part in the making."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_sepweight._catalog import encoded, in_order
from llm_sepweight._checksum import checksum
from llm_sepweight._copying import Contents, Piece, Progress, checksums, converted, literal, nbytes_of, write_files
from llm_sepweight._damage import damages, file_checksum
from llm_sepweight._download import forget
from llm_sepweight._errors import WeightError
from llm_sepweight._foreign import check_no_weights, check_same
from llm_sepweight._freeing import Freeing
from llm_sepweight._journal import (
    Journal,
    begin_journal,
    check_fingerprint,
    check_not_needed,
    check_order,
    read_journal,
    remove_journal,
)
from llm_sepweight._manifest import (
    MANIFEST,
    UNSEALED,
    VERSION,
    FileInfo,
    Manifest,
    PartInfo,
    needed,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from llm_sepweight._plan import PlannedPart, plan
from llm_sepweight._source import Source
from llm_sepweight._writing import check_room, write_bytes

STAGE = ".sepweight.stage"  # where `dump` writes a stream first


def write_parts(
    source: Source,
    directory: Path,
    *,
    spec: str = "f",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    freeing: Freeing | None = None,
) -> None:
    """`split` for tensors from anywhere, by the one process that holds the directory's lock."""
    everything = plan(source.parts, dtype)
    parts = {part: everything[part] for part in needed(everything, spec)}
    _check_manifest(source, parts, directory)
    if freeing is not None:
        freeing.begin(everything, [directory / planned.file for planned in parts.values()])
    order = {**_identity(source, parts), "in_place": freeing is not None}
    fingerprint = source.fingerprint()
    complete = (directory / MANIFEST).exists()
    journal = read_journal(directory)
    same_dump = {"identity": order["identity"], "fingerprint": None}
    begun = journal is not None and journal.plan == {**journal.plan, **same_dump}
    if fingerprint is None:
        check_not_needed(journal)
        journal = None
    if journal is not None:
        check_order(journal, order)
    elif complete:
        try:
            _check_same(source, parts, directory, progress)
        except WeightError:
            remove_journal(directory)  # of one that had only this left to do
            raise
        return remove_journal(directory)
    else:
        if not begun:
            _check_free(source, parts, directory, freeing)
        forget(directory, "", ())  # what a fetch that was killed has of the files of whatever model
        catalog = {} if freeing is None else {"catalog": freeing.catalog()}
        journal = begin_journal(directory, {**order, "fingerprint": fingerprint, **catalog})
    with closing(journal):
        check_fingerprint(journal, fingerprint, freeing is not None)
        _write_missing(source, parts, journal, progress, freeing)
        companions = source.companions()
        for name, data in companions.items():
            write_bytes(directory / name, data)
        files = infos_of(companions)
        model = model_of(source, dtype, journal.done if parts == everything else {})
        write_manifest(directory, manifest_of(source, parts, journal.done, files, model))
    if freeing is not None:
        freeing.finish(parts)
    remove_journal(directory)


def _check_manifest(source: Source, parts: Mapping[str, PlannedPart], directory: Path) -> None:
    """Raises WeightError where the manifest, whatever the checksums are, would be one that no reader takes."""
    unknown = dict.fromkeys(parts, FileInfo(0, UNSEALED))
    manifest = manifest_of(source, parts, unknown, infos_of(source.companions()), "")
    try:
        parse_manifest(manifest.to_bytes(), directory / MANIFEST)
    except WeightError as error:
        error.remedy = "Change that in the source, then run it again."
        raise


def _check_free(source: Source, parts: Mapping[str, PlannedPart], directory: Path, freeing: Freeing | None) -> None:
    """Raises WeightError where something would be written over, or beside other weights than the source's own."""
    own: set[str] = set()
    if freeing is not None and directory.samefile(freeing.directory):
        own = {path.name for path in directory.iterdir()} - {planned.file for planned in parts.values()}
    check_no_weights(directory, own)
    check_same(directory, source.companions())


def contents_of(source: Source, part: str, planned: PlannedPart) -> Contents:
    """The file of a part, from where its tensors are."""
    pieces = [literal(planned.header)]
    for name in planned.order:
        info = source.parts[part][name].info
        piece = Piece(info.nbytes, partial(source.copy, part, name))
        pieces.append(converted(piece, info.dtype, planned.infos[name].dtype))
    return pieces


def _write_missing(
    source: Source,
    parts: Mapping[str, PlannedPart],
    journal: Journal,
    progress: Progress | None,
    freeing: Freeing | None,
) -> None:
    """Write the parts that the journal does not have, and enter them."""
    directory = journal.path.parent
    kept = {part: info for part, info in journal.done.items() if is_sound(directory / parts[part].file, info)}
    for part in journal.done.keys() - kept.keys():
        _check_there(source, part, parts[part], directory)
    journal.done = dict(kept)  # nothing is freed for the others
    missing = [part for part in parts if part not in kept]
    total = sum(planned.nbytes for planned in parts.values())
    done = sum(info.nbytes for info in kept.values())

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    if freeing is not None:
        missing.sort(key=freeing.order)
        freeing.free(kept)
    sizes = [parts[part].nbytes for part in missing]
    check_room(directory, sum(sizes) if freeing is None else max(sizes, default=0))
    files = ((directory / parts[part].file, contents_of(source, part, parts[part])) for part in missing)
    with closing(write_files(files, advance=advance)) as written:
        for part, text in zip(missing, written, strict=True):
            source.check_unchanged()
            if freeing is not None:
                _read_back(directory / parts[part].file, text)
            journal.add(part, FileInfo(parts[part].nbytes, text))
            if freeing is not None:
                freeing.free(journal.done)


def is_sound(path: Path, info: FileInfo | PartInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.nbytes and file_checksum(path) == info.checksum


def _check_there(source: Source, part: str, planned: PlannedPart, directory: Path) -> None:
    """A part that was complete, and is so no more, can be written again only from what was not freed for it."""
    files = {Path(extent.file) for name in planned.order for extent in source.parts[part][name].extents}
    if gone := sorted(file.name for file in files if not file.exists()):
        problem = f"the part is damaged, and {gone[0]}, which it was made from, is freed already"
        remedy = (
            "Put the file back from a backup, or that shard from where the checkpoint came from; then run it again."
        )
        raise WeightError(problem, file=directory / planned.file, part=part, remedy=remedy)


def _read_back(path: Path, text: str) -> None:
    if file_checksum(path) != text:
        problem = "what is on the disk is not what was written"
        raise WeightError(problem, file=path, remedy="Check the disk. Nothing of the source was removed for this part.")


def _identity(source: Source, parts: Mapping[str, PlannedPart]) -> dict[str, Any]:
    """What is being written: a split goes on only where it is the same, but by whichever version of this package."""
    files = {part: [planned.file, planned.nbytes, planned.tensors] for part, planned in parts.items()}
    text = json.dumps([VERSION, source.name, encoded(source.config), files])
    return {"source": source.name, "identity": checksum(text.encode())}


def is_finished(directory: Path) -> bool:
    """Whether a dump, or split, was killed after the manifest: nothing but to clear up was left to do."""
    journal = read_journal(directory)
    begun = (directory / STAGE).exists() if journal is None else not journal.only_copy
    return begun and (directory / MANIFEST).exists()


def clear_finished(directory: Path) -> None:
    """Clear up after a dump, or split, that was killed after the manifest."""
    if is_finished(directory):
        remove_journal(directory)
        clear_stage(directory)


def clear_stage(directory: Path) -> None:
    """Remove what a dump of a stream that was killed has staged: the next one stages it anew."""
    if (directory / STAGE).exists():
        shutil.rmtree(directory / STAGE)


def _check_same(source: Source, parts: Mapping[str, PlannedPart], directory: Path, progress: Progress | None) -> None:
    """Raises WeightError unless the complete model in `directory` is what this split would write."""
    manifest, files = read_manifest(directory), infos_of(source.companions())
    others = [name for name in {**files, **manifest.files} if files.get(name) != manifest.files.get(name)]
    here = {part: info.tensors for part, info in manifest.parts.items()}
    same = not others and here == {part: planned.tensors for part, planned in parts.items()}
    same = same and _as_json(manifest.config) == _as_json(source.config)
    if same:
        contents = [contents_of(source, part, planned) for part, planned in parts.items()]
        total, done = sum(map(nbytes_of, contents)), 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        texts = list(checksums(contents, advance=advance))
        same = texts == [manifest.parts[part].checksum for part in parts]
    if not same:
        remedy = "Choose another destination, or remove this one first."
        file = directory / (others[0] if others else MANIFEST)
        raise WeightError("there is another split model here already", file=file, remedy=remedy)
    if damaged := damages(directory, manifest):
        remedy = "Repair it with verify, or remove the directory."
        problem = f"this was split already, but is damaged: {damaged[0].problem}"
        raise WeightError(problem, file=directory / damaged[0].file, remedy=remedy)


def _as_json(config: Mapping[str, Any]) -> str:
    """A config as it stands on the disk, where the keys 0 and "0" are one."""
    return json.dumps(encoded(config))


def infos_of(companions: Mapping[str, bytes]) -> dict[str, FileInfo]:
    return {name: FileInfo(len(data), checksum(data)) for name, data in companions.items()}


def model_of(source: Source, dtype: torch.dtype | None, done: Mapping[str, FileInfo]) -> str:
    """The name of the whole model, where all its parts were written, or the source has one that holds for some."""
    if done:
        return checksum("\n".join(done[part].checksum for part in in_order(done)).encode())
    return source.model if dtype is None else ""


def manifest_of(
    source: Source,
    parts: Mapping[str, PlannedPart],
    done: Mapping[str, FileInfo],
    files: Mapping[str, FileInfo],
    model: str,
) -> Manifest:
    """The manifest of parts whose files are written."""
    infos = {
        part: PartInfo(planned.file, planned.nbytes, done[part].checksum, planned.tensors)
        for part, planned in parts.items()
    }
    return Manifest(tool(), source.name, source.config, infos, dict(files), model)


def tool() -> str:
    """What is written as the manifest's `tool`."""
    from llm_sepweight import __version__

    return f"llm_sepweight {__version__}"
