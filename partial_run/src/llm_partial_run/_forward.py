"""The whole model as a pure function of ids, with a cache that finds what it has already computed by content."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._caches import SpilledCaches
from ._prefixes import Prefixes

if TYPE_CHECKING:
    from ._run import PartialRun

SHARED = 256  # tokens: computing a prefix once for several rows is worth a pass of its own from here on


class Forward:
    """`forward_func`: input_ids [B, T] -> logits [B, T, V], and `last_logits`. Rows are right-padded.

    Keys and values of the last rows seen are kept. Each call gets the whole ids; the longest prefix of a row that some
    cache row has is taken from there, by a copy where two rows want the same one, and the rest is computed. So rows
    may grow, shrink, change places, be dropped or fan out, and the result depends on nothing but the ids.
    """

    def __init__(self, run: PartialRun):
        self._run = run
        self._caches = run.new_caches()
        self._prefixes = Prefixes(run.plan.rows)  # what each cache row has keys and values of
        self._used = [0] * run.plan.rows  # when each was used last
        self._calls = 0

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of every position."""
        self._run.check_ids(input_ids)
        rows, length = input_ids.shape
        return self.last_logits(input_ids, torch.full((rows,), length), length)

    def last_logits(self, input_ids: Tensor, lengths: Tensor, n: int = 1) -> Tensor:
        """Logits [B, n, V] of the last n positions of each row: `lengths[b] - n` to `lengths[b] - 1`.

        :raises ValueError: for ids beyond the vocabulary, rows that are empty or longer than the planned context, and more
            logits than the plan has memory for.
        """
        self._run.check_ids(input_ids)
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"n={n!r} has to be a whole number of positions, 1 or more")
        self._run.check_logits(len(input_ids) * n, min(len(input_ids), self._run.plan.rows) * n)
        lengths = torch.as_tensor(lengths)
        one_each = lengths.shape == input_ids.shape[:1] and not lengths.is_floating_point()
        if not one_each or not ((lengths >= 1) & (lengths <= input_ids.shape[1])).all():
            raise ValueError(
                f"lengths={lengths.tolist()} for input_ids {list(input_ids.shape)}: give a whole number for each row, from 1 "
                f"to {input_ids.shape[1]}"
            )
        prompts = [row[:length] for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
        for i, prompt in enumerate(prompts):
            if not 1 <= n <= len(prompt) <= self._run.plan.context:
                raise ValueError(
                    f"row {i} has {len(prompt)} tokens, and the last {n} are asked for; it has to have at least those, and "
                    f"at most context={self._run.plan.context}: shorten it, or plan for a larger context"
                )
        at_once = self._run.plan.rows
        with self._run.lock:  # from looking up which cache row has what until the pass that changes it has ended
            self._run.check_open()
            if len(prompts) <= at_once:
                return self._group(prompts, n)
            result = torch.empty(len(prompts), n, self._run.vocab_size, dtype=self._run.plan.dtype)
            for i in range(0, len(prompts), at_once):
                result[i : i + at_once] = self._group(prompts[i : i + at_once], n)
            return result

    def _group(self, prompts: list[list[int]], n: int) -> Tensor:
        self._share(prompts)
        rows, known = self._assign(prompts, n)
        low, high = min(rows), max(rows) + 1  # inputs go to their cache rows; rows between them idle
        starts, ends = [0] * (high - low), [0] * (high - low)
        for prompt, row, start in zip(prompts, rows, known, strict=True):
            starts[row - low], ends[row - low] = start, len(prompt)
            self._prefixes[row] = prompt[:start]  # what stays true if the pass fails
        width = max(end - start for start, end in zip(starts, ends, strict=True))
        ids = torch.zeros(high - low, width, dtype=torch.long)
        for prompt, row, start in zip(prompts, rows, known, strict=True):
            ids[row - low, : len(prompt) - start] = torch.tensor(prompt[start:])

        logits = self._passes(low, ids, torch.tensor(starts), torch.tensor(ends), n)[[row - low for row in rows]]
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            self._prefixes[row] = prompt
            if logits[i].isnan().any():  # as one in a slot would reach whoever has the row next
                self._prefixes[row] = []
                self._clear(row)
        return logits

    def _passes(self, first_row: int, ids: Tensor, starts: Tensor, ends: Tensor, n: int) -> Tensor:
        """Passes over as many tokens as are planned for one; logits [R, n, V] of the last n positions of each row."""
        rows, width = ids.shape
        plan = self._run.plan
        step = max(1, plan.tokens // rows)
        wanted: Tensor | None = None  # [R, n, D], filled as the passes come to them
        first_wanted = (ends - n)[:, None]  # [R, 1]
        result: Tensor | None = None
        for at in range(0, width, step):
            part = ids[:, at : at + step]
            natural = starts[:, None] + torch.arange(at, at + part.shape[1])  # [R, step]
            padding = natural >= ends[:, None]  # right of a row's end, and all of an idle row
            positions = natural.masked_fill(padding, 0)
            slots = natural.masked_fill(padding, plan.context) if padding.any() else None
            row, column = torch.where(~padding & (natural >= first_wanted))

            def collect(x: Tensor, row: Tensor = row, column: Tensor = column, natural: Tensor = natural) -> Tensor:
                nonlocal wanted
                if wanted is None:
                    wanted = x.new_zeros(rows, n, x.shape[-1])
                wanted[row, (natural - first_wanted)[row, column]] = x[row, column]
                return wanted

            result = self._run.run_pass(
                part,
                positions,
                self._caches,
                slots=slots,
                first_row=first_row,
                before_end=collect,
                with_end=at + step >= width,
            )
        assert result is not None
        return result

    def _share(self, prompts: list[list[int]]) -> None:
        """Compute a long prefix that all rows have, and no cache row has, once."""
        if len(prompts) < 2:
            return
        first, last = min(prompts), max(prompts)  # in order of their ids: what these two share, all share
        shared = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
        known, _ = self._prefixes.longest(shared)
        if (len(prompts) - 1) * (len(shared) - known) >= SHARED:
            self._group([shared], 1)

    def _assign(self, prompts: list[list[int]], n: int) -> tuple[list[int], list[int]]:
        """A cache row for each prompt, and how many of its tokens are there already.

        The longest match is served first. Where its rows are taken, the prefix is copied to the row unused for longest.
        """
        self._calls += 1
        matches = [self._prefixes.longest(prompt) for prompt in prompts]
        chosen: dict[int, int] = {}  # prompt -> cache row
        for i in sorted(range(len(prompts)), key=lambda i: -matches[i][0]):
            fitting = matches[i][1] - set(chosen.values())
            if fitting:
                chosen[i] = min(fitting, key=lambda row: (len(self._prefixes[row]), row))
        free = sorted(set(range(len(self._prefixes))) - set(chosen.values()), key=lambda row: (self._used[row], row))
        for i, (length, sources) in enumerate(matches):
            if i not in chosen:
                chosen[i] = free.pop(0)
                if length:
                    self._prefixes[chosen[i]] = []  # also if the copy fails
                    self._copy(min(sources), chosen[i], length)
        for row in chosen.values():
            self._used[row] = self._calls
        known = [min(length, len(prompt) - n) for (length, _), prompt in zip(matches, prompts, strict=True)]
        return [chosen[i] for i in range(len(prompts))], known

    def _copy(self, source: int, target: int, slots: int) -> None:
        if isinstance(self._caches, SpilledCaches):
            self._caches.copy(source, target, slots)
        else:
            for tensor in (tensor for cache in self._caches.values() for tensor in cache):
                tensor[target, :slots] = tensor[source, :slots]

    def _clear(self, row: int) -> None:
        if isinstance(self._caches, SpilledCaches):
            self._caches.zero(row)
        else:
            for tensor in (tensor for cache in self._caches.values() for tensor in cache):
                tensor[row] = 0
