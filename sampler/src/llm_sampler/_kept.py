"""Keys and values of the last batches of a Hugging Face model, found by the ids that they belong to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

_SHARED = 32  # tokens: a beginning that several rows share, and a saving that is worth a pass of its own


@dataclass(slots=True)
class Block:
    """A batch's keys and values, [B, heads, slots, ...] in each layer; the slots of a row are the last of them."""

    cache: Any  # transformers.DynamicCache
    rows: list[list[int]]
    slots: int


class Kept:
    """The last `keep` blocks, each a batch's, of caches that `cache_class` makes."""

    def __init__(self, cache_class: type, keep: int):
        self._cache_class = cache_class
        self._keep = keep
        self.clear()

    def clear(self) -> None:
        self._blocks: list[Block] = []  # the one used last is the last
        self._index: list[tuple[list[int], Block, int]] = []  # every row of every block, sorted by its ids

    def longest(self, row: list[int]) -> tuple[int, Block | None, int]:
        """The kept row that begins most like this one: for how many tokens, its block, its place there."""
        at = bisect_left(self._index, row, key=lambda entry: entry[0])
        best: tuple[int, Block | None, int] = (0, None, 0)
        for ids, block, place in self._index[max(0, at - 1) : at + 1]:  # in sorted order, it is next to its place
            length = _shared(ids, row)
            if length > best[0]:
                best = length, block, place
        return best

    def shared_beginnings(self, rows: list[list[int]]) -> list[list[int]]:
        """What several rows begin with, as far as it is not known yet."""
        heads = []
        for _, group in groupby(sorted(rows), key=lambda row: row[:_SHARED]):
            first, *others = group
            if others and len(first) >= _SHARED:
                head = first[: _shared(first, others[-1])]  # what these two share, all share
                if len(others) * (len(head) - self.longest(head)[0]) >= _SHARED:
                    heads.append(head)
        return heads

    def taken(self, rows: list[list[int]], known: list[int], before: int) -> Any:
        """The cache of a block whose rows are these, in this order, with at most some slots too many: no copy."""
        for block in reversed(self._blocks):
            extra = block.slots - before
            if before > 0 and extra >= 0 and len(block.rows) == len(rows):
                ends = [len(own) - extra for own in block.rows]
                if ends == known and all(
                    own[:end] == row[:end] for own, row, end in zip(block.rows, rows, ends, strict=True)
                ):
                    self._forget(block)  # it changes now, and is no longer what it was if the model raises
                    if extra:
                        block.cache.crop(-extra)
                    return block.cache
        return None

    def gathered(self, found: list[tuple[int, Block | None, int]], known: list[int], before: int) -> Any:
        """A new cache, each row with what is known of it, from whichever block has that."""
        cache = self._cache_class()  # without a config it keeps all slots, of windowed layers too
        blocks = {id(block): block for _, block, _ in found if block is not None}
        if before == 0 or not blocks:
            return cache
        anywhere = next(iter(blocks))  # for rows of which nothing is known: what they take is masked
        sources = [(id(block) if block is not None else anywhere, place) for _, block, place in found]
        order = [i for key in blocks for i, source in enumerate(sources) if source[0] == key]
        back = torch.tensor(order).argsort()
        layers = len(next(iter(blocks.values())).cache.layers)
        for layer in range(layers):
            parts: list[tuple[Tensor, Tensor]] = []
            for key, block in blocks.items():
                keys, values = block.cache.layers[layer].keys, block.cache.layers[layer].values
                if keys is None:  # a layer that takes another one's
                    continue
                own = [i for i in order if sources[i][0] == key]
                places = torch.tensor([[sources[i][1]] for i in own])  # (b, 1)
                shifts = [block.slots - len(block.rows[sources[i][1]]) - (before - known[i]) for i in own]
                slots = (torch.arange(before) + torch.tensor(shifts).unsqueeze(-1)).clamp_(0, block.slots - 1)
                places, slots = places.to(keys.device), slots.to(keys.device)
                parts.append((keys[places, :, slots], values[places, :, slots]))  # [b, before, heads, ...]
            if parts:
                keys, values = (
                    torch.cat(side)[back.to(side[0].device)].transpose(1, 2) for side in zip(*parts, strict=True)
                )
                cache.update(keys, values, layer)
        return cache

    def remember(self, block: Block, parts: int = 1) -> None:
        """Keep this block, one of `parts` that its batch is in, and of the others as many as `keep` such batches."""
        self._blocks = [*self._blocks, block][-self._keep * parts :]
        self._index = sorted(
            ((row, block, place) for block in self._blocks for place, row in enumerate(block.rows)),
            key=lambda entry: entry[0],
        )

    def _forget(self, block: Block) -> None:
        self._blocks = [other for other in self._blocks if other is not block]
        self._index = [entry for entry in self._index if entry[1] is not block]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two rows have in common at their start; slices compare at the speed of memory."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
