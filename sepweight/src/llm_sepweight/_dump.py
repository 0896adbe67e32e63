"""Writing tensors that are in memory, or come one dict after the other, as a split model."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from llm_sepweight._catalog import Catalog, Entry, Extent, TensorInfo, encoded
from llm_sepweight._checkpoint import Layout, Place, arrange, places
from llm_sepweight._copying import Piece, Progress, fill, literal, write_files
from llm_sepweight._errors import WeightError
from llm_sepweight._foreign import check_no_weights, check_same
from llm_sepweight._freeing import Freeing
from llm_sepweight._header import DTYPES, file_order, make_header, read_header
from llm_sepweight._journal import check_not_needed, read_journal
from llm_sepweight._manifest import MANIFEST
from llm_sepweight._parts import STAGE, clear_stage, is_finished, write_parts
from llm_sepweight._source import StoreSource
from llm_sepweight._states import states
from llm_sepweight._store import WeightStore
from llm_sepweight._writing import locked, naming

StateDict = Mapping[str, torch.Tensor]


def dump(
    tensors: StateDict | Iterable[StateDict],
    destination: str | Path,
    *,
    config: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a state dict, or a stream of state dicts that together are the model, as `split` writes a checkpoint.

    tensors: from memory they are written at once, and a tensor that is there under two names (tied) is stored once. A
        stream may cut the model anywhere, also within a layer: each dict is written beside the destination first, and that
        copy is then split in place, so that only one dict is in memory and the disk needs room for the model and a dict.
    config: the model's config.json. layout, dtype, progress: as in `split`.
    Raises WeightError where the destination holds a model, cannot be written, or a name comes twice.

    >>> import tempfile, llm_sepweight
    >>> with tempfile.TemporaryDirectory() as temporary:
    ...     state = {"norm.weight": torch.ones(2), "head.weight": torch.ones(3, 2)}
    ...     dump(state, temporary, config={"model_type": "tiny"}, layout=lambda key, config: [("end", key)])
    ...     with llm_sepweight.open(temporary) as weights:
    ...         print(weights.config, weights.load("end")["norm.weight"])
    {'model_type': 'tiny'} tensor([1., 1.])
    """
    directory = Path(destination)
    if isinstance(tensors, Mapping):
        source = _Memory(cast(StateDict, tensors), config, layout)
        with locked(directory):
            clear_stage(directory)
            return write_parts(source, directory, dtype=dtype, progress=progress)
    with locked(directory):
        _dump_stream(tensors, directory, config, layout, dtype, progress)


def _dump_stream(
    stream: Iterable[StateDict],
    directory: Path,
    config: Mapping[str, Any],
    layout: Layout,
    dtype: torch.dtype | None,
    progress: Progress | None,
) -> None:
    journal = read_journal(directory)
    check_not_needed(journal)
    stage = directory / STAGE
    finished = is_finished(directory)
    if (directory / MANIFEST).exists() and not finished:
        remedy = "Choose another destination, or remove this one first."
        raise WeightError("there is a split model here already", file=directory / MANIFEST, remedy=remedy)
    if not finished and (journal is None or journal.plan.get("fingerprint") is not None):
        check_no_weights(directory)
        check_same(directory, _config_file(config))
    with naming(stage):
        stage.mkdir(exist_ok=True)
        for left in stage.iterdir():  # by one that was killed; as long as the stage is here, this one can be, too
            left.unlink()
    try:
        extents = _write_stage(stage, stream, layout, dict(config))
        parts = arrange(extents, layout, dict(config))
        sizes = {extent.file: Path(extent.file).stat().st_size for extent in extents}
        with WeightStore(stage, Catalog(dict(config), parts, sizes), states=states(stage)) as store:
            source = _Stage(store)
            write_parts(source, directory, dtype=dtype, progress=progress, freeing=Freeing(source))
    finally:
        shutil.rmtree(stage)


def _write_stage(stage: Path, stream: Iterable[StateDict], layout: Layout, config: dict[str, Any]) -> list[Extent]:
    """Write a stream, a file for each dict; where each tensor lies, those that share memory in one place."""
    extents: list[Extent] = []
    taken: dict[tuple[Place, bool], str] = {}  # whether it is the key's own
    seen: set[str] = set()
    numbers = itertools.count()  # enumerate would keep a dict while the next one is made
    for tensors in stream:
        file = stage / f"model-{next(numbers):05d}.safetensors"
        _check_places(tensors, seen, taken, layout, config)
        extents += _write_dict(file, tensors)
        del tensors
    return extents


def _check_places(
    tensors: StateDict, seen: set[str], taken: dict[tuple[Place, bool], str], layout: Layout, config: dict[str, Any]
) -> None:
    """Raises WeightError where a name comes twice, or the layout has no place for a tensor; before more is asked for."""
    for key in tensors:
        if key in seen:
            raise WeightError("this name comes twice in the stream", tensor=key)
        seen.add(key)
        for i, place in enumerate(places(key, layout, config, None)):
            first = taken.setdefault((place, i == 0), key)
            if first != key:
                raise WeightError(f"the layout puts it where {first} already is", part=place[0], tensor=key)


def _write_dict(file: Path, tensors: StateDict) -> list[Extent]:
    infos: dict[str, TensorInfo] = {}
    flat: dict[str, torch.Tensor] = {}
    first_name: dict[tuple[int, TensorInfo], str] = {}
    aliases: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        info, data = _flat(key, tensor)
        first = first_name.setdefault((data.data_ptr(), info), key)
        if first == key or not info.nbytes:
            infos[key], flat[key] = info, data
        else:
            aliases.setdefault(first, []).append(key)
    order = file_order(infos)
    contents = [literal(make_header({key: infos[key] for key in order})), *(piece_of(flat[key]) for key in order)]
    with closing(write_files([(file, contents)])) as written:
        list(written)
    return [
        replace(extent, key=key) for extent in read_header(file) for key in (extent.key, *aliases.get(extent.key, ()))
    ]


def _flat(key: str, tensor: torch.Tensor) -> tuple[TensorInfo, torch.Tensor]:
    """What a tensor is, and its bytes [nbytes], where it lies if they are in order there."""
    if tensor.dtype not in DTYPES.values() or tensor.device.type == "meta":
        raise WeightError(f"a tensor of {tensor.dtype} on {tensor.device} cannot be stored", tensor=key)
    info = TensorInfo(tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.dtype.itemsize)
    return info, tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class _Memory:
    """Tensors in memory, on any device, as a source. Those that share memory are the same."""

    name = model = ""

    def __init__(self, tensors: StateDict, config: Mapping[str, Any], layout: Layout) -> None:
        self.config = dict(config)
        self._flat: dict[str, torch.Tensor] = {}
        extents = []
        for key, tensor in tensors.items():
            info, self._flat[key] = _flat(key, tensor)
            extents.append(Extent(key, "memory", self._flat[key].data_ptr(), info.dtype, info.shape))
        self.parts: Mapping[str, Mapping[str, Entry]] = arrange(extents, layout, self.config)

    def copy(self, part: str, name: str, start: int, out: memoryview) -> None:
        pieces = [piece_of(self._flat[key]) for key in self.parts[part][name].keys]
        fill(pieces, start, out)

    def fingerprint(self) -> None:
        return None

    def check_unchanged(self) -> None:
        pass

    def companions(self) -> dict[str, bytes]:
        return _config_file(self.config)


class _Stage(StoreSource):
    """The copy of a stream; with the dump that made it, it comes to its end."""

    def __init__(self, store: WeightStore) -> None:
        super().__init__(store)
        self.name = ""

    def fingerprint(self) -> None:
        return None

    def companions(self) -> dict[str, bytes]:
        return _config_file(self.config)


def _config_file(config: Mapping[str, Any]) -> dict[str, bytes]:
    return {"config.json": json.dumps(encoded(config), indent=2).encode()} if config else {}


def piece_of(flat: torch.Tensor) -> Piece:
    """The bytes of a tensor."""

    def copy(start: int, out: memoryview) -> None:
        torch.frombuffer(out, dtype=torch.uint8).copy_(flat[start : start + len(out)])

    return Piece(flat.numel(), copy)
