"""Writing a damaged manifest anew, from a source: what is right by the source stays as it is, and nothing is guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from llm_sepweight._catalog import parse_json, read_limited, size_of
from llm_sepweight._copying import Progress, checksums, nbytes_of, write_files
from llm_sepweight._damage import Damage, file_checksum
from llm_sepweight._errors import WeightError
from llm_sepweight._manifest import MANIFEST, FileInfo, write_manifest
from llm_sepweight._parts import contents_of, infos_of, manifest_of, model_of
from llm_sepweight._plan import FLOATS, PlannedPart, plan
from llm_sepweight._source import StoreSource
from llm_sepweight._writing import write_bytes


def mend_manifest(directory: Path, damage: Damage, source: StoreSource, progress: Progress | None) -> list[Damage]:
    """The damage of a manifest, and those of files that are not what the source has; all are repaired, or nothing is.

    A file is written only if its checksum at the source still stands in the damaged manifest; where there is none at
    all, a small one that is missing is written, too. Where the manifest does not tell which files were here, all of
    the source's have to be.
    """
    rest = _rest_of(directory / MANIFEST)
    dtype, everything = _as_it_was_split(directory, source)
    here = {part for part, each in everything.items() if _belongs(directory / each.file, rest)}
    here |= {field["part"] for part in here for field in everything[part].tensors.values() if "part" in field}
    parts = {part: each for part, each in everything.items() if part in here}
    done = _at_the_source(source, parts, progress)
    companions = source.companions()
    companions = {name: data for name, data in companions.items() if not rest or _belongs(directory / name, rest)}
    files = infos_of(companions)

    expected = {each.file: (part, done[part]) for part, each in parts.items()}
    expected |= {name: (None, info) for name, info in files.items()}
    told = _entries(rest)
    sums = {info.checksum for _, info in expected.values()}
    gone = {file for _, file, text in told or () if file not in expected and text not in sums}
    found = {path.name for path in directory.glob("[!.]*") if _names(rest, path.name) and path.name not in expected}
    doubt = "the source does not have it, and the manifest cannot tell whether it is right"
    damaged: list[Damage] = []
    hopeless = [Damage(name, doubt) for name in sorted(gone | found)]
    names = {each.file: part for part, each in everything.items()} | dict.fromkeys(files)
    if told is None or any(names.get(file, "") != part for part, file, _ in told):
        doubt = "the file is missing, and the manifest cannot tell whether it was here: split or fetch them all again"
        hopeless += [Damage(each.file, doubt, part) for part, each in everything.items() if part not in here]
        hopeless += [Damage(name, doubt) for name in source.companion_names() if name not in files]
    for name, (part, info) in expected.items():
        problem = _problem(directory / name, info)
        if problem and (rest or (directory / name).exists()) and info.checksum.encode() not in rest:
            doubt = "which is right" if (directory / name).exists() else "whether the source has what was in it"
            hopeless.append(Damage(name, f"{problem}, and the manifest cannot tell {doubt}", part))
        elif problem:
            damaged.append(Damage(name, problem, part))
    if hopeless:
        return [damage, *damaged, *hopeless]
    for each in damaged:
        if each.part is None:
            write_bytes(directory / each.file, companions[each.file])
        else:
            contents = contents_of(source, each.part, parts[each.part])
            with closing(write_files([(directory / each.file, contents)])) as texts:
                list(texts)
            source.check_unchanged()
    model = model_of(source, dtype, done if parts == everything else {})
    write_manifest(directory, manifest_of(source, parts, done, files, model))
    return [replace(each, repaired=True) for each in (damage, *damaged)]


def _rest_of(manifest: Path) -> bytes:
    """What can be read of a damaged manifest. A checksum that stands there is that of a file as it was written."""
    try:
        return read_limited(manifest)
    except WeightError:
        return b""


def _names(rest: bytes, file: str) -> bool:
    return json.dumps(file).encode() in rest


def _belongs(path: Path, rest: bytes) -> bool:
    return path.exists() or _names(rest, path.name)


def _entries(rest: bytes) -> list[tuple[str | None, str, str]] | None:
    """Part (None for a small file), file and checksum of all that a damaged manifest names; None where it is no JSON."""
    try:
        fields = parse_json(rest)
        parts = [(part, str(entry["file"]), str(entry.get("checksum"))) for part, entry in fields["parts"].items()]
        return parts + [(None, name, str(entry.get("checksum"))) for name, entry in fields["files"].items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _as_it_was_split(directory: Path, source: StoreSource) -> tuple[torch.dtype | None, dict[str, PlannedPart]]:
    """The dtype to which the parts here were converted, and the files of all parts in it."""
    plans = {dtype: plan(source.parts, dtype) for dtype in (None, *FLOATS)}
    fitting = {
        dtype: sum(_has_header(directory, each) for each in planned.values()) for dtype, planned in plans.items()
    }
    dtype = max(fitting, key=lambda dtype: fitting[dtype])
    if not fitting[dtype]:
        problem = "the manifest is damaged, and the source does not hold what is in the other files"
        raise WeightError(problem, file=directory / MANIFEST, remedy="Split the model again, to another place.")
    return dtype, plans[dtype]


def _has_header(directory: Path, planned: PlannedPart) -> bool:
    path = directory / planned.file
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(planned.header)) == planned.header


def _at_the_source(
    source: StoreSource, parts: Mapping[str, PlannedPart], progress: Progress | None
) -> dict[str, FileInfo]:
    """Size and checksum of the parts' files, as a split of the source would write them."""
    contents = [contents_of(source, part, planned) for part, planned in parts.items()]
    done, total = 0, sum(map(nbytes_of, contents))

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    texts = list(checksums(contents, advance=advance))
    source.check_unchanged()
    return {part: FileInfo(parts[part].nbytes, text) for part, text in zip(parts, texts, strict=True)}


def _problem(path: Path, info: FileInfo) -> str:
    """What is wrong with a file, if it is not this one of the source; empty where it is."""
    try:
        if (found := size_of(path)) != info.nbytes:
            return f"{found} bytes here, but {info.nbytes} at the source"
        return "" if file_checksum(path) == info.checksum else "the contents are others than at the source"
    except WeightError as error:
        return error.problem
