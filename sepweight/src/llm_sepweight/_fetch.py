"""Getting the parts that a node runs, and nothing else, from wherever a model lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from llm_sepweight._catalog import in_order
from llm_sepweight._checkpoint import Layout
from llm_sepweight._checksum import checksum
from llm_sepweight._download import download, files_begun, forget
from llm_sepweight._errors import WeightError
from llm_sepweight._foreign import check_no_weights, check_same
from llm_sepweight._found import Found, find
from llm_sepweight._journal import read_journal
from llm_sepweight._manifest import MANIFEST, UNSEALED, FileInfo, Manifest, PartInfo, parse_manifest, read_manifest
from llm_sepweight._parts import clear_finished, clear_stage, is_sound
from llm_sepweight._remote import Remote, TooLargeError, open_remote
from llm_sepweight._writing import locked, write_bytes


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
        found = find(remote, spec, layout, pool)
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
