"""Getting the parts that a node runs, and nothing else, from wherever a model lies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_sepweight._catalog import DAMAGED, Entry, Extent, encoded, in_order, parse_config, parse_json
from llm_sepweight._checkpoint import Layout, arrange, chosen_extents, keys_by_file
from llm_sepweight._checksum import checksum
from llm_sepweight._copying import Piece, literal
from llm_sepweight._download import Download, download, files_begun, forget
from llm_sepweight._errors import WeightError
from llm_sepweight._foreign import check_no_weights, check_same
from llm_sepweight._header import header_length, parse_header
from llm_sepweight._journal import read_journal
from llm_sepweight._manifest import (
    MANIFEST,
    UNSEALED,
    FileInfo,
    Manifest,
    PartInfo,
    needed,
    parse_manifest,
    read_manifest,
    stored_in,
)
from llm_sepweight._parts import clear_finished, clear_stage, is_sound, tool
from llm_sepweight._plan import PlannedPart, plan
from llm_sepweight._remote import START, Remote, RemoteFile, TooLargeError, open_remote
from llm_sepweight._source import travels_along
from llm_sepweight._writing import locked, write_bytes

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


def fetch(
    source: str | Path,
    spec: str,
    destination: str | Path,
    *,
    layout: Layout | None = None,
    headers: Mapping[str, str] | None = None,
    connections: int = 8,
    timeout: float = 30.0,
    retries: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Get the parts that `spec` names, and the model's small files, into a sepweight directory.

    source: where a sepweight directory or, with a layout, a Hugging Face checkpoint lies: `https://host/model`,
    `hf://owner/name` or `hf://owner/name@revision`, `s3://bucket/model`, `file:///model`, whatever else fsspec knows, or a path.
    Of a checkpoint only the bytes of the tensors needed are read, and each file is as `split` would write it.
    headers: for http(s) and the hub. connections: requests at once. timeout: seconds without a byte after which a
    request is given up. retries: of a request that failed for a reason that may pass, after pauses that double.
    progress: called with (bytes done, bytes in all).

    Run again after it was stopped at any moment, it goes on from there; for more parts of the same model, it adds them.
    Files that are there already are read, at the speed of the disk, and fetched again if their checksums are wrong.
    A part with tensors that another one stores brings that one along.
    Raises WeightError where the source lacks something, changes meanwhile, or sends anything but the bytes asked for, or
    the destination holds other weights, and ValueError for a bad spec.
    """
    if connections < 1 or retries < 0 or timeout <= 0:
        problem = f"not possible: connections={connections}, retries={retries}, timeout={timeout}"
        raise ValueError(f"{problem}; at least 1, at least 0 and more than 0 are")
    directory = Path(destination)
    if Path(source).is_dir() and directory.is_dir() and directory.samefile(source):
        raise WeightError("source and destination are the same", file=directory, remedy="Choose another destination.")
    with (
        open_remote(str(source), headers=headers or {}, timeout=timeout, retries=retries) as remote,
        _asking(remote, connections) as pool,
    ):
        found = _find(remote, spec, layout, pool)
        with locked(directory):
            here = _here(directory, found, remote)
            small = _small_files(remote, directory, here, found)
            missing = {
                part: each for part, each in found.downloads.items() if not _is_here(directory, here.parts.get(part))
            }
            unknown = {each.name: UNSEALED for each in missing.values()}
            _complete(directory, here, found, small, unknown)  # raises before anything is asked for
            checksums = download(
                list(missing.values()),
                directory,
                model=found.model,
                pool=pool,
                at_once=2 * connections,
                progress=progress or (lambda done, total: None),
            )
            for name, data in small.items():
                write_bytes(directory / name, data)
            manifest = _complete(directory, here, found, small, checksums)
            write_bytes(directory / MANIFEST, manifest.to_bytes())
            forget(directory, found.model, [info.file for info in manifest.parts.values()])


@contextmanager
def _asking(remote: Remote, connections: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that ask the source; after an error, or Ctrl-C, what they are at is stopped.

    Over HTTP that is at once; but a connection in the making has until its timeout, and fsspec until it is done.
    """
    with ThreadPoolExecutor(connections, thread_name_prefix="llm_sepweight fetch") as pool:
        try:
            yield pool
        except BaseException:
            remote.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _find(remote: Remote, spec: str, layout: Layout | None, pool: ThreadPoolExecutor) -> Found:
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


def _here(directory: Path, found: Found, remote: Remote) -> Manifest:
    """What the destination holds already, which must be of the same model."""
    remedy = "Choose another destination, or remove this one first."
    clear_finished(directory)
    if (journal := read_journal(directory)) is not None:
        problem = "there is a split here that is not finished"
        raise WeightError(problem, file=directory, remedy=journal.remedy(remedy))
    clear_stage(directory)
    if not (directory / MANIFEST).exists():
        return replace(found.manifest, parts={}, files={})
    here = read_manifest(directory)
    same_model = here.model == found.manifest.model != ""
    if not same_model and any(found.offered.get(part) != info for part, info in here.parts.items()):
        problem = f"there is a model here already, and it cannot be told to be the one at {remote.name}"
        raise WeightError(problem, file=directory / MANIFEST, remedy=remedy)
    return here


def _small_files(remote: Remote, directory: Path, here: Manifest, found: Found) -> dict[str, bytes]:
    """The small files that are not here yet, to be written last.

    Raises WeightError where the destination holds weights, or small files, that no fetch of this model to it wrote.
    """
    begun = files_begun(directory, found.model)
    check_no_weights(directory, {MANIFEST, *(info.file for info in here.parts.values()), *here.files, *begun})
    files = {
        name: _small(remote, name, info, found)
        for name, info in found.companions.items()
        if info is None or here.files.get(name) != info or not is_sound(directory / name, info)
    }
    small = {name: data for name, data in files.items() if data is not None}
    if not begun:
        check_same(directory, {name: data for name, data in small.items() if name not in here.files})
    return small


def _small(remote: Remote, name: str, info: FileInfo | None, found: Found) -> bytes | None:
    """One of them as the source has it; None where that has none, or one that `split` takes for none."""
    try:
        data = found.read[name] if name in found.read else remote.small(name)
    except TooLargeError:
        if info is not None:
            raise
        return None
    if info is None:
        return data
    if data is None:
        problem = "the file is in the manifest, but not at the source"
        raise WeightError(problem, file=remote.where(name), remedy="Verify the source.")
    if (came := FileInfo(len(data), checksum(data))) != info:
        problem = f"{came.nbytes} bytes came with the checksum {came.checksum}, not those of the manifest"
        raise WeightError(problem, file=remote.where(name), remedy="Verify the source, then fetch again.")
    return data


def _complete(
    directory: Path, here: Manifest, found: Found, small: Mapping[str, bytes], checksums: Mapping[str, str]
) -> Manifest:
    """The manifest with what is here and the files that have come. Raises WeightError where no reader would take it."""
    came = {part: info for part, info in found.manifest.parts.items() if info.file in checksums}
    parts = here.parts | {part: replace(info, checksum=checksums[info.file]) for part, info in came.items()}
    files = here.files | {name: FileInfo(len(data), checksum(data)) for name, data in small.items()}
    manifest = replace(found.manifest, parts=in_order(parts), files=files)
    try:
        parse_manifest(manifest.to_bytes(), directory / MANIFEST)
    except WeightError as error:
        error.remedy = "Change that at the source, then fetch again."
        raise
    return manifest


def _is_here(directory: Path, info: PartInfo | None) -> bool:
    """Whether a part's file, which the destination's manifest names, is there, byte for byte."""
    return info is not None and is_sound(directory / info.file, info)


def _json(data: bytes, where: str, parse: Callable[[bytes], dict[str, Any]] = parse_json) -> dict[str, Any]:
    try:
        return parse(data)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"no valid JSON: {error}", file=where, remedy=DAMAGED) from error
