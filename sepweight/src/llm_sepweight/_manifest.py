"""sepweight.json, which says what the directory's files hold and marks it as complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_sepweight._catalog import (
    DAMAGED,
    PART_NAME,
    Catalog,
    Entry,
    Extent,
    TensorInfo,
    in_order,
    plain_file_name,
    read_json,
    size_of,
    whole,
)
from llm_sepweight._errors import WeightError
from llm_sepweight._header import DTYPE_NAMES, read_header

MANIFEST = "sepweight.json"
FORMAT, VERSION = "sepweight", 1


def make_manifest(config: Mapping[str, Any], parts: Mapping[str, Any], tool: str) -> dict[str, Any]:
    """The manifest; parts: {part: {"file": name, "nbytes": size of the file, "tensors": {name: describe(info)}}}."""
    return {"format": FORMAT, "version": VERSION, "tool": tool, "config": dict(config), "parts": dict(parts)}


def describe(info: TensorInfo) -> dict[str, Any]:
    """A tensor that the part's own file holds. One that another part's holds is {"part": part, "name": name} instead."""
    return {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape)}


def read_directory(directory: Path) -> Catalog:
    """The catalog of a sepweight directory: its manifest, held against each file's size and header."""
    path = directory / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')!r} version {manifest.get('version')!r}"
        remedy = "Update llm_sepweight, or split the model again."
        raise WeightError(f"this is {found}; {FORMAT!r} version {VERSION} can be read", file=path, remedy=remedy)
    config, parts = manifest.get("config"), manifest.get("parts")
    if not isinstance(config, dict) or not isinstance(parts, dict) or not parts:
        raise WeightError("config or parts are missing", file=path, remedy=DAMAGED)
    sizes: dict[str, int] = {}
    entries: dict[str, dict[str, Entry]] = {}
    for part, fields in parts.items():
        try:
            if not PART_NAME.fullmatch(part):
                raise WeightError("parts are begin, mid.00000, ..., end", file=path)
            file = directory / plain_file_name(fields["file"], file=path)
            extents = read_header(file)
            sizes[str(file)] = fields["nbytes"]
            entries[part] = _own(extents, fields, file)
        except WeightError as error:
            error.part = part
            raise
        except (KeyError, TypeError, AttributeError) as error:
            raise WeightError("no valid entry in the manifest", file=path, part=part, remedy=DAMAGED) from error
    for part, fields in parts.items():
        for name, field in fields["tensors"].items():
            if "part" in field:
                entries[part][name] = _elsewhere(entries, field, path, part, name)
        entries[part] = {name: entries[part][name] for name in fields["tensors"]}
    return Catalog(config, in_order(entries), sizes)


def _own(extents: list[Extent], fields: dict[str, Any], file: Path) -> dict[str, Entry]:
    """The tensors that a part's own file holds, which are those that the manifest says it holds."""
    held = {extent.key: whole(extent) for extent in extents}
    if fields["nbytes"] != size_of(file):
        problem = f"the file has {size_of(file)} bytes, but {fields['nbytes']} in the manifest"
        raise WeightError(problem, file=file, remedy=DAMAGED)
    said = {name: field for name, field in fields["tensors"].items() if "part" not in field}
    for name in held.keys() | said.keys():
        found = describe(held[name].info) if name in held else "not in the file"
        expected = said.get(name, "not in the manifest")
        if found != expected:
            raise WeightError(f"the tensor is {found}, but {expected} expected", file=file, tensor=name, remedy=DAMAGED)
    return held


def _elsewhere(entries: dict[str, dict[str, Entry]], field: Any, path: Path, part: str, name: str) -> Entry:
    """A tensor that is stored once, in another part's file."""
    try:
        return entries[field["part"]][field["name"]]
    except (KeyError, TypeError):
        problem = "the tensor is said to be stored with another part, and is not there"
        raise WeightError(problem, file=path, part=part, tensor=name, remedy=DAMAGED) from None
