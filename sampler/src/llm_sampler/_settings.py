"""Arguments of `sample` as one checked value per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from ._stages import HUGGING_FACE_ORDER, LLAMA_CPP_ORDER, STAGES

PerRow: TypeAlias = float | Sequence[float | None] | Tensor | None
_ORDERS = {"huggingface": HUGGING_FACE_ORDER, "llama.cpp": LLAMA_CPP_ORDER}


def settings_of(count: int, **given: PerRow) -> dict[str, list]:
    """The stages' settings, with the neutral value for None."""
    return {
        name: per_row(
            name, value, count, STAGES[name].kind, STAGES[name].allowed, STAGES[name].says, STAGES[name].neutral
        )
        for name, value in given.items()
    }


def per_row(
    name: str,
    value: Any,
    count: int,
    kind: type,
    allowed: Callable[[float], bool],
    says: str,
    neutral: float | None = None,
) -> list:
    """`value` (one, or one per row) as a list of `count` values of type `kind`, None replaced by `neutral`."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [_one(name, value, kind, allowed, says, neutral)] * count
    _check_count(name, len(value), count)
    return [_one(f"{name}: row {row}", item, kind, allowed, says, neutral) for row, item in enumerate(value)]


def stops_of(stop_ids: Any, count: int) -> list[frozenset[int]]:
    """One set of stop ids per row, from one id, ids for all rows, or a sequence of ids per row."""
    if isinstance(stop_ids, Tensor):
        stop_ids = stop_ids.tolist()
    if not _is_group(stop_ids) and not isinstance(stop_ids, int):
        raise ValueError(f"stop_ids is {stop_ids!r}; it must be an id, ids, or one sequence of ids per row")
    ids: list[Any] = [stop_ids] if isinstance(stop_ids, int) else list(stop_ids)
    if ids and all(_is_group(item) for item in ids):
        _check_count("stop_ids", len(ids), count)
        groups = [list(item) for item in ids]
    else:
        groups = [ids] * count
    for row, group in enumerate(groups):
        for item in group:
            if not isinstance(item, int) or isinstance(item, bool) or item < 0:
                raise ValueError(f"stop_ids: row {row} holds {item!r}; an id is an integer >= 0")
    return [frozenset(group) for group in groups]


def seeds_of(seed: Any, count: int, fresh: Callable[[int], int]) -> list[tuple[int, int]]:
    """(seed, stream) of each row: (seed, row) for one seed, (seed[row], 0) for one per row."""
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    if seed is None:
        seed = fresh(64)
    sources: list[tuple[Any, int]]
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        _check_count("seed", len(seed), count)
        sources = [(item, 0) for item in seed]
    else:
        sources = [(seed, row) for row in range(count)]
    for row, (item, _) in enumerate(sources):
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 1 << 64:
            raise ValueError(
                f"seed: row {row} has {item!r}; a seed is an integer in [0, 2**64), or None for a fresh one"
            )
    return sources


def order_of(order: str | Sequence[str] | None, settings: dict[str, list]) -> tuple[str, ...]:
    """The names of the stages in order; every setting that does something must be among them."""
    if order is None or isinstance(order, str):
        if (order or "huggingface") not in _ORDERS:
            raise ValueError(f"order is {order!r}; known by name are {', '.join(map(repr, _ORDERS))}")
        return _ORDERS[order or "huggingface"]
    names = tuple(order)
    for name in names:
        if name not in STAGES:
            raise ValueError(f"order names {name!r}; the stages are {', '.join(STAGES)}")
        if names.count(name) > 1:
            raise ValueError(f"order names {name!r} more than once")
    for name, values in settings.items():
        if name not in names and any(value != STAGES[name].neutral for value in values):
            raise ValueError(f"{name} is set, but order does not name it; add it to order or leave it away")
    return names


def _one(name: str, item: Any, kind: type, allowed: Callable[[float], bool], says: str, neutral: float | None) -> Any:
    if item is None and neutral is not None:
        return neutral
    if isinstance(item, bool) or not isinstance(item, int if kind is int else int | float) or not allowed(item):
        raise ValueError(f"{name} is {item!r}; it must be {says}")
    return kind(item)


def _check_count(name: str, found: int, count: int) -> None:
    if found != count:
        raise ValueError(f"{name} has {found} values for {count} rows; give one value, or one per row")


def _is_group(value: object) -> bool:
    return isinstance(value, Sequence | set | frozenset) and not isinstance(value, str)
