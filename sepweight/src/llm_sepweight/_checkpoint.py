"""A Hugging Face checkpoint where it lies: its files, and where a layout puts each of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_sepweight._catalog import (
    DAMAGED,
    PART_NAME,
    Catalog,
    Entry,
    Extent,
    in_order,
    inside,
    parse_config,
    plain_file_name,
    read_json,
    size_of,
    stacked,
    whole,
)
from llm_sepweight._errors import WeightError
from llm_sepweight._header import read_header
from llm_sepweight._manifest import MANIFEST
from llm_sepweight._pickled import read_contents

Layout = Callable[[str, Mapping[str, Any]], Sequence[Any]]
"""layout(key, config) -> (part, name) or (part, name, index) for each place where the tensor belongs; none drops it.

The first place is its own. At the others, as that of a tied head, another tensor stands that has it for its own.
"""

Place = tuple[str, str, int | None]
"""Part, name and, where it is a slice of a larger tensor, index."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # what families call it in config.json
FORMS = (  # in the order in which they are looked for
    ("model.safetensors.index.json", read_header),
    ("model.safetensors", read_header),
    ("pytorch_model.bin.index.json", read_contents),
    ("pytorch_model.bin", read_contents),
)


def read_checkpoint(directory: Path, layout: Layout | None) -> Catalog:
    """The catalog of a checkpoint, from its index, its files' headers and sizes and its layout. No weights are read."""
    config_file = directory / "config.json"
    config = read_json(config_file, parse_config) if config_file.exists() else {}
    parted = sorted(path.name for path in directory.glob("*.pth") if PART_NAME.fullmatch(path.stem))
    if parted:
        return _read_parts(directory, parted, layout or as_named, config)
    if layout is None:
        problem = f"there is no {MANIFEST} here, and a checkpoint needs a layout to say what belongs to which part"
        raise WeightError(problem, file=directory, remedy="Pass layout=, as the model's package offers it.")
    read, keys_of = _files(directory)
    extents: list[Extent] = []
    others: list[Extent] = []
    for file, keys in keys_of.items():
        try:
            found = read(inside(directory / file))
            extents += chosen_extents(found, keys, directory / file)
            listed = set(keys)
            others += [extent for extent in found if keys and extent.key not in listed]
        except WeightError as error:  # say what is lost, too
            error.tensor = error.tensor or next(iter(keys), None)
            error.part = _first_part(layout, error.tensor, config)
            raise
    parts = arrange(extents, layout, config)
    taken = {extent.key: extent for extent in extents}
    unlisted = {other.file: other.key for other in others if other.key not in taken}
    copies = [(other, taken[other.key]) for other in others if other.key in taken]
    sizes = {str(directory / file): size_of(directory / file) for file in keys_of}
    return Catalog(config, parts, sizes, unlisted, copies)


def _files(directory: Path) -> tuple[Callable[[Path], list[Extent]], dict[str, list[str]]]:
    """How to read the files of a checkpoint, and which keys each must hold, as far as this is known."""
    for name, read in FORMS:
        path = directory / name
        if path.exists():
            return read, keys_by_file(read_json(path), path) if name.endswith(".json") else {name: []}
    if shards := sorted(path.name for path in directory.glob("*.pth")):  # such as consolidated.00.pth
        return read_contents, {name: [] for name in shards}
    names = ", ".join(name for name, _ in FORMS)
    raise WeightError(f"no checkpoint here: none of {names}, *.pth", file=directory, remedy="Check the path.")


def _read_parts(directory: Path, files: list[str], layout: Layout, config: dict[str, Any]) -> Catalog:
    """A directory of begin.pth, mid.00000.pth, ..., end.pth: the key of a tensor is the part's name, a dot and its own."""
    here = {file.removesuffix(".pth") for file in files}
    if missing := missing_layers(here, config):
        problem = f"the file is missing, and {', '.join(sorted(here))} are here"
        remedy = "Put it back: without it the model would be another."
        raise WeightError(problem, file=directory / f"{missing[0]}.pth", part=missing[0], remedy=remedy)
    extents = []
    for file in files:
        part = file.removesuffix(".pth")
        try:
            extents += [
                replace(extent, key=f"{part}.{extent.key}") for extent in read_contents(inside(directory / file))
            ]
        except WeightError as error:
            error.part = part
            raise
    parts = arrange(extents, layout, config)
    return Catalog(config, parts, {str(directory / file): size_of(directory / file) for file in files})


def missing_layers(parts: Collection[str], config: Mapping[str, Any]) -> list[str]:
    """The layers that lie between parts that are here, and are not here."""
    layers = {int(part[4:]) for part in parts if part.startswith("mid.") and "/" not in part}
    said = next((config[name] for name in LAYER_COUNTS if isinstance(config.get(name), int)), 0)
    first = 0 if "begin" in parts else min(layers, default=0)
    stop = max(layers, default=-1) + 1
    if "end" in parts and (layers or "begin" in parts):
        stop = max(stop, said)
    return [f"mid.{layer:05d}" for layer in range(first, stop) if layer not in layers]


def as_named(key: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The layout of such a directory: each tensor is in the part of its file, under its own name."""
    match = re.match(rf"({PART_NAME.pattern})\.(.+)", key, re.ASCII)
    if match is None:
        raise ValueError(f"{key!r} does not begin with the name of a part")
    return [(match[1], match[2])]


def holds_weights(directory: Path) -> bool:
    """Whether there is a checkpoint, or what an unfinished split in place has left of one."""
    return any((directory / name).exists() for name, _ in FORMS) or any(directory.glob("*.pth"))


def keys_by_file(index: Mapping[str, Any], file: object) -> dict[str, list[str]]:
    """The keys that each file must hold, as the index, which is read from `file`, has it."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError("the index has no weight_map", file=file, remedy=DAMAGED)
    keys_of: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        try:
            keys_of.setdefault(plain_file_name(name, file=file), []).append(key)
        except WeightError as error:
            error.tensor = key
            raise
    return keys_of


def chosen_extents(extents: list[Extent], keys: list[str], file: object) -> list[Extent]:
    """What the index takes from a file; without an index, everything."""
    if not keys:
        return extents
    by_key = {extent.key: extent for extent in extents}
    for key in keys:
        if key not in by_key:
            remedy = "Download this file and the index again."
            raise WeightError("the index names this file, but it is not in it", file=file, tensor=key, remedy=remedy)
    return [by_key[key] for key in keys]


def _first_part(layout: Layout, key: str | None, config: dict[str, Any]) -> str | None:
    """For an error that is about something else: where the layout puts the key, if it does."""
    try:
        return None if key is None else str(layout(key, config)[0][0])
    except Exception:
        return None


def arrange(extents: list[Extent], layout: Layout, config: dict[str, Any]) -> dict[str, dict[str, Entry]]:
    """The tensors of each part. Raises WeightError where two keys want one place or slices are missing."""
    entries: dict[str, dict[str, Entry]] = {}
    slices: dict[tuple[str, str], dict[int, Extent]] = {}
    wanted = [(extent, places(extent.key, layout, config, extent.file)) for extent in extents]
    own = {found[0] for _, found in wanted if found}
    for extent, found in wanted:
        for place in found:
            if place in own and place != found[0]:  # it is not tied after all
                continue
            part, name, index = place
            part_entries = entries.setdefault(part, {})
            taken = slices.setdefault((part, name), {}) if index is not None else {}
            if name in part_entries or index in taken or (index is None and (part, name) in slices):
                problem = f"the layout puts {extent.key} where another tensor already is"
                raise WeightError(problem, file=extent.file, part=part, tensor=name)
            if index is None:
                part_entries[name] = whole(extent)
            else:
                taken[index] = extent
    for (part, name), found in slices.items():
        ordered = tuple(found[index] for index in sorted(found))
        first = ordered[0]
        if sorted(found) != list(range(len(found))):
            raise WeightError(
                f"slices are missing: only {sorted(found)} found", file=first.file, part=part, tensor=name
            )
        for extent in ordered:
            if (extent.dtype, extent.shape) != (first.dtype, first.shape):
                problem = f"{extent.key} differs in dtype or shape from {first.key}, beside which it belongs"
                raise WeightError(problem, file=extent.file, part=part, tensor=name)
        entries[part][name] = stacked(ordered)
    return in_order(entries)


def places(key: str, layout: Layout, config: dict[str, Any], file: object) -> list[Place]:
    """What the layout says of a key, checked."""
    try:
        answer = list(layout(key, config))
    except Exception as error:
        advice = "look at both" if config else "there is none"
        remedy = f"A layout goes by the key and by the model's config.json: {advice}."
        raise WeightError(f"the layout fails: {error}", file=file, tensor=key, remedy=remedy) from error
    found = []
    for place in answer:
        part, name, index = (*place, None) if len(place) == 2 else place
        index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if not PART_NAME.fullmatch(part):
            problem = f"the layout names a part {part!r}; parts are begin, mid.00000, ..., end"
            raise WeightError(problem, file=file, tensor=key)
        if index is not None and (type(index) is not int or index < 0):
            problem = (
                f"the layout gives the index {index!r}; only whole numbers along the first dimension are understood"
            )
            raise WeightError(problem, file=file, part=part, tensor=key)
        found.append((part, name, index))
    return found
