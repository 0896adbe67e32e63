"""Stages that raise or lower single tokens, by what the row holds already or by what the caller asked for.

Each is built from one value per row. They touch the tokens concerned and no others: a gather and a scatter, in scores
that are made writable once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ._row import History
from ._scores import Scores
from ._truncate import column

_LARGEST_EXPONENT = 88.0  # of e, in float32


def repetition_penalty(penalty: list, *, device: torch.device):
    """Divide positive logits and multiply negative ones, once per distinct token, prompt included (Keskar 2019)."""
    p = column(penalty, device)

    def apply(scores: Scores, history: History) -> Scores:
        scores = scores.writable()
        value = scores.values.gather(-1, history.own)
        scores.values.scatter_(-1, history.own, torch.where(value > 0, value / p, value * p))
        return scores

    return apply


def presence_penalty(penalty: list, *, device: torch.device):
    """Subtract once from every token that was generated."""
    return _counted(penalty, device, lambda counts: counts > 0)


def frequency_penalty(penalty: list, *, device: torch.device):
    """Subtract from every token as often as it was generated."""
    return _counted(penalty, device, lambda counts: counts)


def dry(multiplier: list, base: list, allowed_length: list, breakers: list, last_n: list, *, device: torch.device):
    """Lower what would go on with a repeated sequence, by multiplier * base ** (its length - allowed_length).

    From p-e-w's "DRY" (2024), as in llama.cpp: repeats do not reach over a token of `breakers`, and no breaker is
    lowered. Only the last `last_n` tokens count, prompt included.
    """

    def penalties(index: int, ids: list[int], repeats: Iterable[tuple[int, int]]) -> dict[int, float]:
        longest: dict[int, int] = {}
        start = max(len(ids) - last_n[index], 0)
        for place, length in repeats:
            length = min(length, place - start)
            if length >= allowed_length[index] and ids[place] not in breakers[index]:
                longest[ids[place]] = max(length, longest.get(ids[place], 0))
        largest = _LARGEST_EXPONENT / math.log(base[index]) if base[index] > 1 else math.inf
        return {
            token: -multiplier[index] * base[index] ** min(length - allowed_length[index], largest)
            for token, length in longest.items()
        }

    def apply(scores: Scores, history: History) -> Scores:
        return _added(
            scores,
            (
                (index, token, value)
                for index, row in enumerate(history.rows)
                if multiplier[index]
                for token, value in penalties(index, row.ids, row.repeats(breakers[index])).items()
            ),
        )

    return apply


def no_repeat_ngram_size(size: list, *, device: torch.device):
    """Exclude every token that would complete n tokens which the row, prompt included, holds already."""

    def apply(scores: Scores, history: History) -> Scores:
        return _added(
            scores,
            (
                (index, token, -math.inf)
                for index, row in enumerate(history.rows)
                if size[index]
                for token in (
                    set(row.ids)
                    if size[index] == 1
                    else {row.ids[place] for place, length in row.repeats(_NONE) if length >= size[index] - 1}
                )
            ),
        )

    return apply


def logit_bias(bias: list, *, device: torch.device):
    """Add to the logits of ids; to that of the last of several ids where the row ends with the others."""
    single = [(index, key[0], value) for index, row in enumerate(bias) for key, value in row.items() if len(key) == 1]
    longer = [_by_last_of_prefix(row) for row in bias]
    places, values = _tensors(single, device)

    def apply(scores: Scores, history: History) -> Scores:
        scores = scores.writable()
        scores.values.index_put_(places, values, accumulate=True)
        return _added(
            scores,
            (
                (index, token, value)
                for index, (row, known) in enumerate(zip(history.rows, longer, strict=True))
                for prefix, token, value in known.get(row.ids[-1], ())
                if tuple(row.ids[-len(prefix) :]) == prefix
            ),
        )

    return apply


def bad_words_ids(words: list, *, device: torch.device):
    """Exclude the token that would complete one of these sequences."""
    return logit_bias([dict.fromkeys(row, -math.inf) for row in words], device=device)


def min_new_tokens(least: list, *, device: torch.device):
    """Exclude the stop ids until so many tokens have been generated."""

    def apply(scores: Scores, history: History) -> Scores:
        return _added(
            scores,
            (
                (index, token, -math.inf)
                for index, row in enumerate(history.rows)
                if row.step < least[index]
                for token in row.stops
            ),
        )

    return apply


def allowed_token_ids(allowed: list, *, device: torch.device):
    """Exclude all other ids."""
    rows: dict[frozenset[int], list[int]] = {}
    for index, ids in enumerate(allowed):
        if ids is not None:
            rows.setdefault(ids, []).append(index)
    places = [
        (torch.tensor(own, device=device).unsqueeze(-1), torch.tensor(sorted(ids), device=device))
        for ids, own in rows.items()
    ]  # (R, 1) and (K): a mask would take rows x vocabulary, for each group of rows
    limited = torch.tensor([ids is not None for ids in allowed], device=device).unsqueeze(-1)

    def apply(scores: Scores, history: History) -> Scores:
        scores = scores.writable()
        kept = [scores.values[place] for place in places]
        scores.values.masked_fill_(limited, -torch.inf)
        for place, values in zip(places, kept, strict=True):
            scores.values[place] = values
        return scores

    return apply


_NONE: frozenset[int] = frozenset()


def _counted(penalty: list, device: torch.device, of):
    p = column(penalty, device)

    def apply(scores: Scores, history: History) -> Scores:
        scores = scores.writable()
        ids, real = history.generated
        if not ids.shape[1]:
            return scores
        counts = torch.zeros_like(scores.values).scatter_add_(-1, ids, real).gather(-1, ids)
        scores.values.scatter_(-1, ids, scores.values.gather(-1, ids) - p * of(counts))
        return scores

    return apply


def _by_last_of_prefix(bias: dict[tuple[int, ...], float]) -> dict[int, list[tuple[tuple[int, ...], int, float]]]:
    known: dict[int, list[tuple[tuple[int, ...], int, float]]] = {}
    for (*prefix, token), value in bias.items():
        if prefix:
            known.setdefault(prefix[-1], []).append((tuple(prefix), token, value))
    return known


def _added(scores: Scores, changes: Iterable[tuple[int, int, float]]) -> Scores:
    """Add each (row, id, value) to the scores."""
    listed = list(changes)
    if not listed:
        return scores
    scores = scores.writable()
    places, values = _tensors(listed, scores.values.device)
    scores.values.index_put_(places, values, accumulate=True)
    return scores


def _tensors(changes: list[tuple[int, int, float]], device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    rows, tokens, values = zip(*changes, strict=True) if changes else ((), (), ())
    places = torch.tensor([rows, tokens], dtype=torch.long, device=device)
    return (places[0], places[1]), torch.tensor(values, dtype=torch.float32, device=device)
