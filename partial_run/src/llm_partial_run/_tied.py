"""Tensors that a module has under several names, as a tied head: read from the first name that the checkpoint has."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._stores import page_aligned
from ._units import Unit, _slices

Place = tuple[str, str]  # (part, name)


def names_of_one(module: nn.Module) -> list[list[str]]:
    """The keys of the state dict that are one tensor, for each that has several: as it is first called, and else."""
    keys: dict[int, list[str]] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        keys.setdefault(id(tensor), []).append(key)
    return [names for names in keys.values() if len(names) > 1]


def spare(first: Place, key: str) -> Place:
    """Where a layout puts a tensor that is stored under another name than its first: beside that, if it is there, too."""
    return first[0], f"tied.{key}"


class Tied:
    """A store that has a tied tensor in all its places, where the checkpoint has it under any of its names.

    Raises ValueError where it has two, and they differ.
    """

    def __init__(self, store: Any, module: nn.Module, named: Mapping[str, Place]):
        self._store = store
        self.transient_nbytes = getattr(store, "transient_nbytes", 0)
        self._source: dict[Place, Place] = {}
        for first, *others in names_of_one(module):
            part, name = named[first]
            stored = store.tensors(part)
            candidates = [(first, (part, name)), *((key, spare((part, name), key)) for key in others)]
            found = [(key, place) for key, place in candidates if place[1] in stored]
            for (key, place), (other, beside) in itertools.pairwise(found):
                if not _equal(store, place, beside):
                    raise ValueError(
                        f"{key} and {other} are one tensor in this {type(module).__name__}, and two that differ in the "
                        "weights: set tie_word_embeddings=False in the config before making the module"
                    )
            if found and found[0][0] != first:
                self._source |= {named[key]: found[0][1] for key in (first, *others)}
        self._own = {place[0] for place in named.values() if place not in self._source}  # parts with more than these

    def tensors(self, part: str) -> dict[str, Any]:
        own = self._store.tensors(part) if part in self._own else {}
        tied = {name: place for (owner, name), place in self._source.items() if owner == part}
        return {**own, **{name: self._store.tensors(place[0])[place[1]] for name, place in tied.items()}}

    def read(self, part: str, name: str, start: int, stop: int, into: Tensor) -> Tensor:
        return self._store.read(*self._source.get((part, name), (part, name)), start, stop, into)

    def rows(self, part: str, name: str, ids: Tensor) -> Tensor:
        return self._store.rows(*self._source.get((part, name), (part, name)), ids)


def _equal(store: Any, one: Place, other: Place) -> bool:
    infos = [store.tensors(part)[name] for part, name in (one, other)]
    if (infos[0].dtype, tuple(infos[0].shape)) != (infos[1].dtype, tuple(infos[1].shape)):
        return False
    units: list[Unit] = _slices(*one, infos[0].shape[0], infos[0].nbytes, infos[0].nbytes)
    memory = [page_aligned(units[0].nbytes + 2 * 4096) for _ in infos]
    return all(
        torch.equal(*(
            store.read(*place, unit.start, unit.stop, into).view(torch.uint8)  # bytes: a NaN is no other than itself
            for place, into in zip((one, other), memory, strict=True)
        ))
        for unit in units
    )  # fmt: skip
