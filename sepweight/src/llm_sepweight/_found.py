"""What a source has for a spec, and how the parts' files are made of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_sepweight._catalog import DAMAGED, Entry, Extent, encoded, parse_config, parse_json
from llm_sepweight._checkpoint import Layout, arrange, chosen_extents, keys_by_file
from llm_sepweight._checksum import checksum
from llm_sepweight._copying import Piece, literal
from llm_sepweight._download import Download
from llm_sepweight._errors import WeightError
from llm_sepweight._header import header_length, parse_header
from llm_sepweight._manifest import (
    MANIFEST,
    FileInfo,
    Manifest,
    PartInfo,
    needed,
    parse_manifest,
    stored_in,
)
from llm_sepweight._parts import tool
from llm_sepweight._plan import PlannedPart, plan
from llm_sepweight._remote import START, Remote, RemoteFile
from llm_sepweight._source import travels_along

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
GUESSED = (  # where nothing can be listed
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "spiece.model", "sentencepiece.bpe.model", "tekken.json", "tiktoken.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What a source has for a spec. In a checkpoint nothing tells a part's checksum: it is empty until it was read."""

    manifest: Manifest  # of these parts
    offered: dict[str, PartInfo]  # all that the source's own manifest has
    downloads: dict[str, Download]
    companions: dict[str, FileInfo | None]
    read: dict[str, bytes | None]  # what the plan goes by: asked for again, it might be another

    @property
    def model(self) -> str:
        """What nothing but this model has: where its manifest gives it no name, all that the source holds of it."""
        return self.manifest.model or checksum("\n".join(info.checksum for info in self.offered.values()).encode())


def find(remote: Remote, spec: str, layout: Layout | None, pool: ThreadPoolExecutor) -> Found:
    """What the source has for a spec: of a sepweight directory or, with a layout, of a checkpoint."""
    data = remote.small(MANIFEST)
    if data is not None:
        return _in_directory(remote, parse_manifest(data, remote.where(MANIFEST)), spec, pool)
    if layout is None:
        problem = f"there is no {MANIFEST} here, and a checkpoint needs a layout to say what belongs to which part"
        raise WeightError(problem, file=remote.name, remedy="Check the address, or pass layout=.")
    return _in_checkpoint(remote, spec, layout, pool)


def _in_directory(remote: Remote, whole: Manifest, spec: str, pool: ThreadPoolExecutor) -> Found:
    """The parts of a sepweight directory: their files as they are."""
    manifest = whole.select(spec)
    names = [info.file for info in manifest.parts.values()]
    files = dict(zip(manifest.parts, pool.map(remote.find, names), strict=True))
    for part, info in manifest.parts.items():
        if files[part].size != info.nbytes:
            problem = f"the file has {files[part].size} bytes, but {info.nbytes} in the manifest"
            raise WeightError(problem, file=remote.where(info.file), part=part, remedy="Verify the source.")
    downloads = {
        part: Download(
            info.file,
            [_range(remote, part, files[part], 0, info.nbytes)],
            f"{info.nbytes} {info.checksum}",
            _checker(remote, part, [files[part]], info),
        )
        for part, info in manifest.parts.items()
    }
    return Found(manifest, whole.parts, downloads, dict(manifest.files), {})


def _in_checkpoint(remote: Remote, spec: str, layout: Layout, pool: ThreadPoolExecutor) -> Found:
    """The parts of a checkpoint: each file as `split` would write it, its tensors from wherever the shards have them."""
    keys_of = _shards(remote)
    files = {file.name: file for file in pool.map(remote.find, keys_of)}
    for file in files.values():
        if file.version is None:
            problem = (
                "the server gives neither ETag nor Last-Modified, so nothing would tell if the file changed meanwhile"
            )
            raise WeightError(problem, file=remote.where(file.name), remedy="Split the model, and fetch from that.")
    config_data = remote.small("config.json")
    config = {} if config_data is None else _json(config_data, remote.where("config.json"), parse_config)
    extents: list[Extent] = []
    for name, read in zip(files, pool.map(lambda file: _header(remote, file), files.values()), strict=True):
        extents += chosen_extents(read, keys_of[name], remote.where(name))
    entries = arrange(extents, layout, config)
    planned = plan(entries)
    parts = needed(planned, spec)
    where = {remote.where(file.name): file for file in files.values()}
    downloads = {part: _gathered(remote, part, planned[part], entries[part], where) for part in parts}
    model = [
        [remote.identity(file) for file in files.values()],
        encoded(config),  # a layout goes by it, and may be another one the next time
        {part: each.tensors for part, each in planned.items()},
    ]
    manifest = Manifest(
        tool=tool(),
        source=remote.name.rsplit("/", 1)[-1],
        config=config,
        parts={part: PartInfo(planned[part].file, planned[part].nbytes, "", planned[part].tensors) for part in parts},
        files={},
        model=checksum(json.dumps(model).encode()),
    )
    names = remote.names()
    listed = [name for name in names or () if travels_along(name)]
    companions = dict.fromkeys(GUESSED if names is None else sorted(listed))
    return Found(manifest, {}, downloads, companions, {"config.json": config_data})


def _shards(remote: Remote) -> dict[str, list[str]]:
    """The files of a checkpoint, with the keys that the index takes from each; all, where there is no index."""
    index = remote.small(INDEX)
    if index is not None:
        return keys_by_file(_json(index, remote.where(INDEX)), remote.where(INDEX))
    names = remote.names()
    if names is not None and SINGLE not in names:
        problem = f"no checkpoint here: none of {MANIFEST}, {INDEX}, {SINGLE}"
        remedy = "Check the address. A .bin checkpoint has to be downloaded whole, and split."
        raise WeightError(problem, file=remote.name, remedy=remedy)
    return {SINGLE: []}


def _header(remote: Remote, file: RemoteFile) -> list[Extent]:
    where = remote.where(file.name)
    text = bytearray(header_length(file.start, file.size, where))
    remote.read(file, START, memoryview(text))
    return parse_header(bytes(text), file.size, where)


def _gathered(
    remote: Remote, part: str, planned: PlannedPart, entries: Mapping[str, Entry], files: Mapping[str, RemoteFile]
) -> Download:
    """A part's file, made of a header and ranges of the shards; those that follow each other there are one."""
    ranges: list[tuple[RemoteFile, int, int]] = []
    for extent in (extent for name in planned.order for extent in entries[name].extents if extent.nbytes):
        file, offset, nbytes = files[extent.file], extent.offset, extent.nbytes
        if ranges and ranges[-1][0] == file and sum(ranges[-1][1:]) == offset:
            _, offset, before = ranges.pop()
            nbytes += before
        ranges.append((file, offset, nbytes))
    contents = [literal(planned.header), *(_range(remote, part, *each) for each in ranges)]
    of = [checksum(planned.header), *([*remote.identity(file), *span] for file, *span in ranges)]
    used = list({file.name: file for file, _, _ in ranges}.values())
    return Download(planned.file, contents, checksum(json.dumps(of).encode()), _checker(remote, part, used, None))


def _range(remote: Remote, part: str, file: RemoteFile, offset: int, nbytes: int) -> Piece:
    def copy(start: int, out: memoryview) -> None:
        try:
            remote.read(file, offset + start, out)
        except WeightError as error:
            error.part = part
            raise

    return Piece(nbytes, copy)


def _checker(
    remote: Remote, part: str, used: Iterable[RemoteFile], info: PartInfo | None
) -> Callable[[Path, str], None]:
    """Raises where a file is not what the source's manifest says, or the source was changed while it was read."""

    def check(path: Path, found: str) -> None:
        for file in used:
            remote.still(file)
        if info is None:
            return
        if found != info.checksum:
            problem = f"the bytes that came have the checksum {found}, but {info.checksum} in the manifest"
            remedy = "Verify the source, then fetch again."
            raise WeightError(problem, file=remote.where(info.file), part=part, remedy=remedy)
        stored_in(path, info)

    return check


def _json(data: bytes, where: str, parse: Callable[[bytes], dict[str, Any]] = parse_json) -> dict[str, Any]:
    try:
        return parse(data)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"no valid JSON: {error}", file=where, remedy=DAMAGED) from error
