"""sepweight.json, which says what the directory's files hold and marks it as complete. FORMAT.md has it in full."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_sepweight._catalog import (
    DAMAGED,
    JSON_LIMIT,
    PART_NAME,
    Catalog,
    Entry,
    TensorInfo,
    decoded,
    encoded,
    in_order,
    inside,
    parse_json,
    plain_file_name,
    read_limited,
    size_of,
    whole,
)
from llm_sepweight._checksum import CHECKSUM, PREFIX, checksum
from llm_sepweight._errors import WeightError
from llm_sepweight._header import DTYPE_NAMES, read_header
from llm_sepweight._spec import chosen
from llm_sepweight._writing import write_bytes

MANIFEST = "sepweight.json"
FORMAT, VERSION = "sepweight", 1
UNSEALED = PREFIX + "0" * 32


class NewerError(WeightError):
    """A manifest of a later version of the format: nothing can be said of it, not even that it is damaged."""


@dataclass(frozen=True)
class FileInfo:
    """A file beside the parts."""

    nbytes: int
    checksum: str


@dataclass(frozen=True)
class PartInfo:
    """A part's file.

    tensors: name -> what `stored` gives; {"part": part, "name": name} where that one is stored already, with "keys" where
    the checkpoint has this one under a name of its own.
    """

    file: str
    nbytes: int
    checksum: str
    tensors: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Manifest:
    """What a sepweight directory holds."""

    tool: str
    source: str
    config: dict[str, Any]
    parts: dict[str, PartInfo]  # in the order of the model
    files: dict[str, FileInfo]
    model: str = ""  # two directories in which it is the same, and not empty, hold parts of one model

    def to_bytes(self) -> bytes:
        """The manifest as a file, sealed by its own checksum."""
        fields = {"format": FORMAT, "version": VERSION, "checksum": UNSEALED, "tool": self.tool, "source": self.source}
        fields |= {
            "model": self.model,
            "config": encoded(self.config),
            "parts": {part: vars(info) for part, info in self.parts.items()},
        }
        fields["files"] = {name: vars(info) for name, info in self.files.items()}
        data = json.dumps(fields, indent=1, allow_nan=False).encode()
        return data.replace(UNSEALED.encode(), checksum(data).encode(), 1)

    def select(self, spec: str) -> Manifest:
        """The parts that a spec names and those that hold tensors of theirs. Raises ValueError for a bad spec."""
        return replace(self, parts={part: self.parts[part] for part in needed(self.parts, spec)})


def needed(parts: Mapping[str, Any], spec: str) -> list[str]:
    """The parts that a spec names and those that their tied tensors lie in. Raises ValueError for a bad spec.

    parts: anything by part whose `tensors` are as in a manifest.
    """
    named = chosen(spec, list(parts))
    tied = {field["part"] for part in named for field in parts[part].tensors.values() if "part" in field}
    return [part for part in parts if part in tied or part in named]


def stored(info: TensorInfo, named: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's entry for a tensor that the part's own file holds. named: what `Entry.named` gives."""
    return {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), **named}


def _named(entry: Entry, field: Mapping[str, Any]) -> Entry:
    """The tensor under the names that a manifest's entry gives it."""
    keys = tuple(field.get("keys", ()))
    return replace(entry, keys=keys, stack=len(keys) > 1 or field.get("stacked", False))


def part_file(part: str) -> str:
    """The name that a writer gives to the file of a part.

    >>> part_file("mid.00003/experts.00005")
    'mid.00003.experts.00005.safetensors'
    """
    return part.replace("/", ".") + ".safetensors"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a sepweight directory."""
    return parse_manifest(read_limited(directory / MANIFEST), directory / MANIFEST)


def parse_manifest(data: bytes, file: object) -> Manifest:
    """A manifest from its bytes, once all that can be checked without other files is. Raises WeightError naming `file`."""
    if len(data) > JSON_LIMIT:
        raise WeightError(f"a manifest of {len(data):,} bytes; {JSON_LIMIT:,} are the most that is read", file=file)
    try:
        fields = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"no valid JSON: {error}", file=file, remedy=DAMAGED) from error
    version = fields.get("version")
    if fields.get("format") == FORMAT and type(version) is int and version > VERSION:
        problem = f"this is version {version} of the format, newer than {VERSION}, which can be read"
        remedy = "Upgrade llm_sepweight. If nothing newer wrote it, it is damaged: remove it, and verify with a source."
        raise NewerError(problem, file=file, remedy=remedy)
    if fields.get("format") != FORMAT or type(version) is not int or version != VERSION:
        problem = f"this is {fields.get('format')!r} version {version!r}; {FORMAT!r} version {VERSION} can be read"
        raise WeightError(problem, file=file, remedy="Split the model again.")
    _check_seal(data, fields.get("checksum"), file)
    tool, source, config, parts, files = map(fields.get, ("tool", "source", "config", "parts", "files"))
    model = fields.get("model", "")
    if not (isinstance(config, dict) and isinstance(parts, dict) and parts and isinstance(files, dict)):
        raise WeightError("config, parts or files are missing", file=file, remedy=DAMAGED)
    if not (isinstance(tool, str) and isinstance(source, str) and isinstance(model, str)):
        raise WeightError("tool, source or model is not a string", file=file, remedy=DAMAGED)
    manifest = Manifest(
        tool,
        source,
        decoded(config),
        in_order({part: _part_info(part, entry, file) for part, entry in parts.items()}),
        {plain_file_name(name, file=file): _file_info(name, entry, file) for name, entry in files.items()},
        model,
    )
    _check_names(manifest, file)
    for part, info in manifest.parts.items():
        for name, field in info.tensors.items():
            _check_tied(manifest, part, name, field, file)
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a manifest that can be read again. Raises WeightError, and writes nothing, where that would not be so."""
    data = manifest.to_bytes()
    parse_manifest(data, directory / MANIFEST)
    write_bytes(directory / MANIFEST, data)


def _check_seal(data: bytes, seal: object, file: object) -> None:
    if not isinstance(seal, str) or not CHECKSUM.fullmatch(seal):
        raise WeightError("the manifest has no checksum of its own", file=file, remedy=DAMAGED)
    if checksum(data.replace(seal.encode(), UNSEALED.encode(), 1)) != seal:
        raise WeightError("the manifest is damaged: its checksum is not its own", file=file, remedy=DAMAGED)


def _part_info(part: str, entry: Any, file: object) -> PartInfo:
    if not PART_NAME.fullmatch(part):
        raise WeightError("parts are begin, mid.00000, ..., end", file=file, part=part)
    try:
        info = PartInfo(entry["file"], entry["nbytes"], entry["checksum"], entry["tensors"])
        plain_file_name(info.file, file=file)
        tensors = [dict(field) for field in info.tensors.values()]
    except WeightError as error:
        error.part = part
        raise
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise WeightError("no valid entry in the manifest", file=file, part=part, remedy=DAMAGED) from error
    if not _is_file_info(info.nbytes, info.checksum) or not all(map(_is_tensor, tensors)):
        raise WeightError("no valid entry in the manifest", file=file, part=part, remedy=DAMAGED)
    return info


def _file_info(name: str, entry: Any, file: object) -> FileInfo:
    try:
        info = FileInfo(entry["nbytes"], entry["checksum"])
    except (TypeError, KeyError):
        info = None
    if info is None or not _is_file_info(info.nbytes, info.checksum):
        raise WeightError(f"no valid entry for {name} in the manifest", file=file, remedy=DAMAGED)
    return info


def _is_file_info(nbytes: object, text: object) -> bool:
    return type(nbytes) is int and nbytes >= 0 and isinstance(text, str) and CHECKSUM.fullmatch(text) is not None


def _is_tensor(field: dict[str, Any]) -> bool:
    """Whether this is an entry of a tensor by its form; what the file says of it is compared later."""
    keys = field.get("keys", [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        return False
    if not isinstance(field.get("stacked", False), bool):
        return False
    if "part" in field:
        return isinstance(field["part"], str) and isinstance(field.get("name"), str)
    shape = field.get("shape")
    if not isinstance(shape, list) or not isinstance(field.get("dtype"), str):
        return False
    return all(type(count) is int and count >= 0 for count in shape)


def _check_names(manifest: Manifest, file: object) -> None:
    """No two entries mean one file, and none the manifest or what a writer at work leaves."""
    taken = {MANIFEST.lower()}
    for name in (*(info.file for info in manifest.parts.values()), *manifest.files):
        if name.lower() in taken or name.startswith("."):
            raise WeightError(f"the file name {name!r} is taken or reserved", file=file, remedy=DAMAGED)
        taken.add(name.lower())


def _check_tied(manifest: Manifest, part: str, name: str, field: dict[str, Any], file: object) -> None:
    """A tensor that is stored elsewhere is stored there."""
    if "part" not in field:
        return
    other = manifest.parts.get(field["part"])
    if other is None or "part" in other.tensors.get(field["name"], field):
        problem = "the tensor is said to be stored with another part, and is not there"
        raise WeightError(problem, file=file, part=part, tensor=name, remedy=DAMAGED)


def read_directory(directory: Path) -> tuple[Manifest, Catalog]:
    """Manifest and catalog of a sepweight directory: each file's size and header are as the manifest says."""
    manifest = read_manifest(directory)
    stored_here: dict[str, dict[str, Entry]] = {}
    for part, info in manifest.parts.items():
        try:
            stored_here[part] = stored_in(directory / info.file, info)
        except WeightError as error:
            error.part = part
            raise

    def entry(part: str, name: str, field: Mapping[str, Any]) -> Entry:
        found = stored_here[field.get("part", part)][field.get("name", name)]
        return _named(found, field) if "keys" in field else found

    entries = {
        part: {name: entry(part, name, field) for name, field in info.tensors.items()}
        for part, info in manifest.parts.items()
    }
    sizes = {str(directory / info.file): info.nbytes for info in manifest.parts.values()}
    return manifest, Catalog(manifest.config, entries, sizes)


def stored_in(file: Path, info: PartInfo) -> dict[str, Entry]:
    """The tensors that a part's own file holds, which are those that the manifest says it holds."""
    extents = {extent.key: extent for extent in read_header(inside(file))}
    if info.nbytes != (found := size_of(file)):
        raise WeightError(f"the file has {found} bytes, but {info.nbytes} in the manifest", file=file, remedy=DAMAGED)
    said = {name: field for name, field in info.tensors.items() if "part" not in field}
    entries = {name: _named(whole(extent), said.get(name, {})) for name, extent in extents.items()}
    for name in {**entries, **said}:
        found = _form(stored(entries[name].info, {})) if name in entries else "not in the file"
        expected = _form(said[name]) if name in said else "not in the manifest"
        if found != expected:
            raise WeightError(f"the tensor is {found}, but {expected} expected", file=file, tensor=name, remedy=DAMAGED)
    return entries


def _form(field: Mapping[str, Any]) -> str:
    return f"{field['dtype']} {field['shape']}"
