"""Foreign processors, `processor(input_ids [1, T], scores [1, V]) -> scores [1, V]`: one instance for each row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._note import noted
from ._row import History
from ._scores import Scores

Processor: TypeAlias = Callable[[Any, Tensor], Tensor]
Factory: TypeAlias = Callable[[int], Processor | Sequence[Processor] | None]


def processors_of(factory: Factory | None, count: int) -> list[tuple[Processor, ...]]:
    """What `factory` gives for each row's index: a processor, several of them, or None."""
    if factory is None:
        return [()] * count
    if not callable(factory) or _takes_two(factory):
        raise TypeError(
            f"processors is {factory!r}; it must be a function of the row's index that makes that row's own processor, "
            "as in `lambda row: MyProcessor()`"
        )
    made: list[tuple[Processor, ...]] = []
    owners: dict[int, int] = {}
    for index in range(count):
        given = factory(index)
        own = () if given is None else tuple(given) if isinstance(given, Sequence) else (given,)
        for processor in own:
            if not callable(processor):
                raise TypeError(
                    f"processors gave row {index} {processor!r}, which cannot be called with ids and scores"
                )
            if owners.setdefault(id(processor), index) != index and not isinstance(processor, FunctionType):
                raise ValueError(
                    f"processors gave rows {owners[id(processor)]} and {index} the same {type(processor).__name__}; "
                    "they keep state, so make a new one for each row"
                )
        made.append(own)
    return made


def processors(made: list, *, device: torch.device):
    """Each row's own processors, one after the other, on its unpadded ids and its scores over the vocabulary."""

    def apply(scores: Scores, history: History) -> Scores:
        scores = scores.writable()
        for index, (row, own) in enumerate(zip(history.rows, made, strict=True)):
            place = scores.values[index : index + 1]
            result = place
            for processor in own:
                with noted(f"processor {type(processor).__name__}", f"row {row.index}, step {row.step}"):
                    result = processor(history.ids[index : index + 1, : len(row.ids)], result)
                if not isinstance(result, Tensor) or result.shape != place.shape:
                    what = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
                    raise ValueError(
                        f"row {row.index}, step {row.step}: {type(processor).__name__} returned {what}; "
                        f"scores {list(place.shape)} are needed"
                    )
            if result is not place:
                place.copy_(result)
        return scores

    return apply


def _takes_two(factory: Callable) -> bool:
    """Whether it looks like a processor rather than something that makes one."""
    if isinstance(factory, type):
        return False
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) > 1
