"""Arguments of `sample` as one checked value per row.

Most are numbers: one, or a sequence with one per row. Ids, words and biases are themselves sequences or mappings, so
each kind says what one value looks like; anything else is taken as one per row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

PerRow: TypeAlias = float | Sequence[float | None] | Tensor | None
Ids: TypeAlias = int | Sequence[int] | AbstractSet[int] | Sequence[Sequence[int] | None] | Tensor | None
Words: TypeAlias = Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]] | None] | None
Biases: TypeAlias = Mapping[Any, float] | Sequence[Mapping[Any, float] | None] | None
Strings: TypeAlias = str | Sequence[str] | Sequence[Sequence[str] | None] | None


@dataclass(frozen=True, slots=True)
class Setting:
    """neutral: the value that changes nothing, for None. is_one: whether a value is for all rows. parse: checks it."""

    neutral: Any
    is_one: Callable[[Any], bool]
    parse: Callable[[str, Any], Any]

    def per_row(self, name: str, value: Any, count: int) -> list:
        """`value` (one, or one per row) as a list of `count` checked values, None replaced by the neutral one."""
        value = plain(value)
        if value is None or self.is_one(value):
            return [self._one(name, value)] * count
        if len(value) != count:
            raise ValueError(f"{name} has {len(value)} values for {count} rows; give one value, or one per row")
        return [self._one(f"{name}: row {row}", item) for row, item in enumerate(value)]

    def _one(self, name: str, item: Any) -> Any:
        return self.neutral if item is None and self.neutral is not REQUIRED else self.parse(name, item)


REQUIRED = object()


def plain(value: Any) -> Any:
    """The same in Python's own numbers, lists and mappings where it has tensors, or numpy's arrays and scalars."""
    if hasattr(value, "tolist"):
        holds_arrays = hasattr(value, "dtype") and value.dtype == object
        return plain(value.tolist()) if holds_arrays else value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, set | frozenset):
        return frozenset(map(plain, value))
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    return value


def number(neutral: Any, allowed: Callable[[Any], bool], says: str, kind: type = float) -> Setting:
    def parse(name: str, item: Any) -> Any:
        if isinstance(item, bool) or not isinstance(item, int if kind is int else int | float) or not allowed(item):
            raise ValueError(f"{name} is {item!r}; it must be {says}")
        return kind(item)

    return Setting(neutral, lambda value: not isinstance(value, Sequence) or isinstance(value, str), parse)


def ids(neutral: Any = frozenset(), *, empty: bool = True) -> Setting:
    """A set of ids: one id, or a flat group of them."""

    def parse(name: str, item: Any) -> frozenset[int]:
        group = [item] if isinstance(item, int) else item
        if not _is_group(group):
            raise ValueError(f"{name} is {item!r}; it must be an id, ids, or one sequence of ids per row")
        if not group and not empty:
            raise ValueError(f"{name} is empty; give at least one id, or None")
        return frozenset(_id(name, token) for token in group)

    return Setting(
        neutral, lambda value: not _is_group(value) or not any(_is_group(v) or v is None for v in value), parse
    )


def words() -> Setting:
    """Sequences of ids: each a word, or another thing that takes some tokens."""

    def parse(name: str, item: Any) -> tuple[tuple[int, ...], ...]:
        if not _is_group(item) or not all(_is_group(word) and len(word) for word in item):
            raise ValueError(
                f"{name} is {item!r}; it must be sequences of ids, as in [[5], [17, 4]], none of them empty"
            )
        return tuple(tuple(_id(name, token) for token in word) for word in item)

    def is_one(value: Any) -> bool:
        return not _is_group(value) or not any(v is None or (_is_group(v) and any(map(_is_group, v))) for v in value)

    return Setting((), is_one, parse)


def biases() -> Setting:
    """What is added to the logit of an id, or of the last of some ids where the others are what the row ends with."""

    def parse(name: str, item: Any) -> dict[tuple[int, ...], float]:
        if not isinstance(item, Mapping):
            raise ValueError(f"{name} is {item!r}; it must be a mapping from an id, or a tuple of ids, to a number")
        for key, value in item.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value < math.inf:
                raise ValueError(f"{name} adds {value!r} to {key!r}; it must be a number, or -inf to exclude")
            if isinstance(key, tuple) and not key:
                raise ValueError(f"{name} names an empty tuple; a key is an id, or a tuple of ids")
        return {
            tuple(_id(name, token) for token in (key if isinstance(key, tuple) else (key,))): float(value)
            for key, value in item.items()
        }

    return Setting({}, lambda value: not isinstance(value, Sequence), parse)


def strings() -> Setting:
    def parse(name: str, item: Any) -> tuple[str, ...]:
        if not isinstance(item, str | Sequence):
            raise ValueError(f"{name} is {item!r}; it must be text, texts, or one sequence of texts per row")
        group = (item,) if isinstance(item, str) else tuple(item)
        for text in group:
            if not isinstance(text, str) or not text:
                raise ValueError(f"{name} holds {text!r}; a stop string is text of at least one character")
        return group

    def is_one(value: Any) -> bool:
        return not isinstance(value, Sequence) or all(isinstance(item, str) for item in value)

    return Setting((), is_one, parse)


def seeds_of(seed: Any, count: int, n: int, fresh: Callable[[int], int]) -> list[tuple[int, int]]:
    """(seed, stream) of n rows for each prompt: (seed, row) for one seed, (seed[i], 0 .. n - 1) for one per prompt."""
    seed = plain(seed)
    if seed is None:
        seed = fresh(64)
    sources: list[tuple[Any, int]]
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        if len(seed) != count:
            raise ValueError(f"seed has {len(seed)} values for {count} rows; give one value, or one per row")
        sources = [(item, sample) for item in seed for sample in range(n)]
    else:
        sources = [(seed, row) for row in range(count * n)]
    for row, (item, _) in enumerate(sources):
        if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < 1 << 64:
            raise ValueError(
                f"seed: row {row} has {item!r}; a seed is an integer in [0, 2**64), or None for a fresh one"
            )
    return sources


def _id(name: str, token: Any) -> int:
    if not isinstance(token, int) or isinstance(token, bool) or token < 0:
        raise ValueError(f"{name} holds {token!r}; an id is an integer >= 0")
    return token


def _is_group(value: object) -> bool:
    return isinstance(value, Sequence | AbstractSet) and not isinstance(value, str)
