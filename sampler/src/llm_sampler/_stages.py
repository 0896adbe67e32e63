"""The stages that turn raw logits into the distribution that is drawn from, one function each, and their order.

A stage is built for the rows in the forward from one value per row, and maps `Scores` to `Scores`. Adding one takes a
function, a line in `STAGES` and a place in the orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._scores import Scores


@dataclass(frozen=True, slots=True)
class History:
    """What the rows hold so far: ids [B, T], right-padded; lengths[b] of row b are its own, prompts[b] its prompt."""

    ids: Tensor
    lengths: Tensor
    prompts: Tensor


Apply = Callable[[Scores, History], Scores]


@dataclass(frozen=True, slots=True)
class Stage:
    build: Callable[[list, torch.device], Apply]
    neutral: float
    allowed: Callable[[float], bool]
    says: str
    kind: type = float


def chain(order: Sequence[str], settings: dict[str, list], rows: Sequence[int], device: torch.device) -> list[Apply]:
    """The stages that do anything to any of `rows`, in order."""
    applies = []
    for name in order:
        values = [settings[name][row] for row in rows]
        if any(value != STAGES[name].neutral for value in values):
            applies.append(STAGES[name].build(values, device))
    return applies


def repetition_penalty(penalty: list, device: torch.device) -> Apply:
    """Divide positive logits and multiply negative ones, once per distinct token, prompt included (Keskar 2019)."""
    p = _column(penalty, device)

    def apply(scores: Scores, history: History) -> Scores:
        scores = scores.widened()
        own = torch.arange(history.ids.shape[-1], device=device) < history.lengths.unsqueeze(-1)
        tokens = torch.where(own, history.ids, history.ids[:, :1])  # padding repeats the first token, and counts once
        value = scores.values.gather(-1, tokens)
        return _scattered(scores, tokens, torch.where(value > 0, value / p, value * p))

    return apply


def presence_penalty(penalty: list, device: torch.device) -> Apply:
    """Subtract once from every token that was generated."""
    p = _column(penalty, device)

    def apply(scores: Scores, history: History) -> Scores:
        scores = scores.widened()
        counts = _generated(scores, history)
        return _scattered(scores, history.ids, scores.values.gather(-1, history.ids) - p * (counts > 0))

    return apply


def frequency_penalty(penalty: list, device: torch.device) -> Apply:
    """Subtract from every token as often as it was generated."""
    p = _column(penalty, device)

    def apply(scores: Scores, history: History) -> Scores:
        scores = scores.widened()
        counts = _generated(scores, history)
        return _scattered(scores, history.ids, scores.values.gather(-1, history.ids) - p * counts)

    return apply


def temperature(temperature: list, device: torch.device) -> Apply:
    """Divide by it; where it is 0, keep the most likely token only."""
    greedy = torch.tensor([t == 0 for t in temperature], device=device).unsqueeze(-1)
    divisor = _column([t or 1.0 for t in temperature], device)

    def apply(scores: Scores, history: History) -> Scores:
        if all(t == 0 for t in temperature):
            return scores.best()
        values = scores.values / divisor
        if any(t == 0 for t in temperature):
            best = scores.best().ids
            ids = scores.ids if scores.ids is not None else torch.arange(values.shape[-1], device=device)
            values = values.masked_fill(greedy & (ids != best), -torch.inf)
        return Scores(values, scores.ids, scores.vocabulary)

    return apply


def top_k(k: list, device: torch.device) -> Apply:
    """Keep the k most likely tokens and every tie with the k-th (Fan et al. 2018)."""
    largest = max(value for value in k if value != _NO_LIMIT)
    limited = torch.tensor([value != _NO_LIMIT for value in k], device=device).unsqueeze(-1)
    place = torch.tensor([min(value, largest) - 1 for value in k], device=device).unsqueeze(-1)

    def apply(scores: Scores, history: History) -> Scores:
        values = scores.largest(largest)
        threshold = values.gather(-1, place.clamp(max=values.shape[-1] - 1))
        return scores.at_least(torch.where(limited, threshold, -torch.inf))

    return apply


def top_p(p: list, device: torch.device) -> Apply:
    """Keep the smallest set of most likely tokens with mass >= p, the lower id first on ties (Holtzman et al. 2019)."""
    share = torch.tensor(p, dtype=torch.float64, device=device).unsqueeze(-1)

    def apply(scores: Scores, history: History) -> Scores:
        highest = scores.values.amax(-1, keepdim=True).double()
        needed = share * (scores.values.double() - highest).exp().cumsum(-1)[:, -1:]
        head = scores
        for k in (64, 512, 4096):  # the set is a small one as a rule: look for it there before sorting a vocabulary
            if scores.values.shape[-1] < 16 * k:
                break
            head = scores.at_least(scores.largest(k)[:, -1:])
            if bool(((head.values.double() - highest).exp().sum(-1, keepdim=True) > needed).all()):
                break
            head = scores
        values, place = head.values.sort(dim=-1, descending=True, stable=True)
        mass = (values.double() - highest).exp().cumsum(-1)
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
        keep = torch.zeros_like(place, dtype=torch.bool).scatter_(-1, place, (before < needed) | (share == 1))
        return head.masked(keep)

    return apply


def min_p(p: list, device: torch.device) -> Apply:
    """Keep the tokens with at least p times the probability of the most likely one (Nguyen et al. 2024)."""
    distance = _column([math.log(value) if value > 0 else -math.inf for value in p], device)

    def apply(scores: Scores, history: History) -> Scores:
        return scores.at_least(scores.values.amax(-1, keepdim=True) + distance)

    return apply


_NO_LIMIT = 1 << 62

STAGES: dict[str, Stage] = {
    "repetition_penalty": Stage(repetition_penalty, 1.0, lambda v: 0 < v < math.inf, "> 0"),
    "presence_penalty": Stage(presence_penalty, 0.0, math.isfinite, "a finite number"),
    "frequency_penalty": Stage(frequency_penalty, 0.0, math.isfinite, "a finite number"),
    "temperature": Stage(temperature, 1.0, lambda v: 0 <= v < math.inf, ">= 0 (0 takes the most likely token)"),
    "top_k": Stage(top_k, _NO_LIMIT, lambda v: v >= 1, "an integer >= 1, or None for no limit", int),
    "top_p": Stage(top_p, 1.0, lambda v: 0 < v <= 1, "in (0, 1]"),
    "min_p": Stage(min_p, 0.0, lambda v: 0 <= v <= 1, "in [0, 1]"),
}

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
HUGGING_FACE_ORDER = (*_PENALTIES, "temperature", "top_k", "top_p", "min_p")
LLAMA_CPP_ORDER = (*_PENALTIES, "top_k", "top_p", "min_p", "temperature")


def _column(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(-1)


def _scattered(scores: Scores, tokens: Tensor, values: Tensor) -> Scores:
    return Scores(scores.values.scatter(-1, tokens, values), None, scores.vocabulary)


def _generated(scores: Scores, history: History) -> Tensor:
    """How often each token of history.ids was generated by its own row [B, T]; 0 for what is only prompt or padding."""
    position = torch.arange(history.ids.shape[-1], device=history.ids.device)
    own = (position >= history.prompts.unsqueeze(-1)) & (position < history.lengths.unsqueeze(-1))
    counts = torch.zeros_like(scores.values).scatter_add_(-1, history.ids, own.float())
    return counts.gather(-1, history.ids)
