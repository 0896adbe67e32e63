"""Beam search: the continuations that are most likely as a whole, with diverse groups where they are wanted."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ._forward import Forward, ForwardFunc, Rows
from ._prepare import check_ids, prepared
from ._row import History, Row, Table
from ._scores import Scores
from ._settings import REQUIRED, Ids, Setting, number
from ._stages import STAGES, chain, order_of

EarlyStopping: TypeAlias = bool | Literal["never"]


@dataclass(frozen=True, slots=True)
class Beam:
    """A finished continuation; `tokens` ends with the stop id where `finished` is "stop".

    score: the sum of the log-probabilities that were searched with, divided by `len(tokens) ** length_penalty`.
    logprobs: natural log-probabilities of the tokens under the model itself, which no setting changes.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    finished: Literal["stop", "length"]

    @property
    def content(self) -> tuple[int, ...]:
        """The tokens without the stop id."""
        return self.tokens[:-1] if self.finished == "stop" else self.tokens


def beam_search(
    forward_func: ForwardFunc,
    input_ids: Rows,
    *,
    max_new_tokens: int | Sequence[int],
    num_beams: int | Sequence[int],
    length_penalty: float | Sequence[float] = 1.0,
    early_stopping: EarlyStopping | Sequence[EarlyStopping] = False,
    num_beam_groups: int | Sequence[int] = 1,
    diversity_penalty: float | Sequence[float] = 0.0,
    stop_ids: Ids = None,
    order: str | Sequence[str] | None = None,
    vocab_size: int | None = None,
    pad_id: int = 0,
    device: torch.device | str | None = None,
    **settings: Any,
) -> list[list[Beam]]:
    """The best finished beams of each row, best first: as a rule num_beams of them. As Hugging Face's `generate`.

    Every argument up to stop_ids is one value, or a sequence with one per row. Rows are searched independently of each
    other; all their beams go through the forward together, and a prompt goes through it once before it fans out.

    Args:
        num_beams: how many continuations are followed, and how many finished ones are kept.
        length_penalty: scores are sums of log-probabilities divided by `length ** length_penalty`: above 0 favours
            long beams, below 0 short ones.
        early_stopping: when a row with num_beams finished beams is done. True: at once. False: when its best running
            beam, at its present length, is no better than the worst finished one. "never": when it cannot become so.
        num_beam_groups, diversity_penalty: follow groups of num_beams / num_beam_groups, one after the other: in each
            step a token costs a group the penalty for each beam of earlier groups that took it (Vijayakumar et al. 2016).
        settings: those of `sample` that do not belong to drawing, such as repetition_penalty. As in Hugging Face they
            work on log-probabilities, which are not normalised again.

    Other arguments and errors as in `sample`.

    Example:
        >>> import torch
        >>> after = torch.tensor([[0., .6, .4], [.4, .3, .3], [0., .1, .9]]).log()  # 1 is likelier, 2 pays later
        >>> [[best, second]] = beam_search(lambda ids: after[ids], [[0]], max_new_tokens=2, num_beams=2)
        >>> best.tokens, second.tokens, round(best.score, 3)
        ((2, 2), (1, 0), -0.511)
    """
    forward = Forward(forward_func)
    for name in settings:
        if name not in _SETTINGS:
            raise TypeError(
                f"beam_search takes no {name}; it draws nothing and its beams keep no state: of what sample takes, "
                f"there are {', '.join(_SETTINGS)}"
            )
    given: dict[str, Any] = dict.fromkeys(("processors", "decode", "stop_strings", "top_logprobs")) | settings
    given |= {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "seed": 0, "n": 1, "order": order}
    given["logprobs"] = False  # they are computed here, for all beams at once
    given |= {"input_ids": input_ids, "vocab_size": vocab_size, "pad_id": pad_id, "device": device}
    prompts, sampler = prepared(given)
    if forward.vocab_size is not None:
        check_ids(prompts, sampler, forward.vocab_size)
    names = order_of(order, sampler.settings)
    groups = _groups(prompts, num_beams, length_penalty, early_stopping, num_beam_groups, diversity_penalty)
    for step in itertools.count():
        beams = list(dict.fromkeys(beam for group in groups for beam in group.running))
        if not beams:
            break
        for place, beam in enumerate(beams):
            beam.row.index = place
        table = Table([beam.row for beam in beams], pad_id, sampler.table.of(prompts).device)
        logits = forward(
            table.of(table.rows),
            [len(row.ids) for row in table.rows],
            1,
            f"step {step}",
            [beam.prompt for beam in beams],
        )[:, 0]
        if step == 0:
            check_ids(prompts, sampler, logits.shape[-1])
        logprobs = _log_softmax(logits, [beam.prompt for beam in beams], step)
        taken: list[Counter[int]] = [Counter() for _ in prompts]  # in this step, by a prompt's groups so far
        for group in groups:
            if group.running:
                rows, earlier = [beam.row for beam in group.running], taken[group.prompt]
                values = _charged(logprobs[[row.index for row in rows]], earlier, group.diversity_penalty)
                scores = Scores(values[:, :vocab_size], None, min(values.shape[-1], vocab_size or values.shape[-1]))
                history = History(table, rows, logits.device)
                for stage in chain(names, sampler.settings, [group.prompt] * len(rows), logits.device):
                    scores = stage(scores, history)
                earlier.update(group.take(_candidates(group, scores, logprobs), step))
    return [
        sorted((beam for group in groups if group.prompt == index for beam in group.finished), key=lambda b: -b.score)
        for index in range(len(prompts))
    ]


@dataclass(slots=True, eq=False)
class _Running:
    """A beam that may still grow; total: the sum of the log-probabilities that are searched with."""

    prompt: int
    row: Row
    logprobs: tuple[float, ...] = ()
    total: float = 0.0

    def extended(self, token: int, logprob: float, total: float) -> _Running:
        row = Row(0, [*self.row.ids, token], self.row.prompt, self.row.end, 0, 0, self.row.stops)
        return _Running(self.prompt, row, (*self.logprobs, logprob), total)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """One more token for a beam, and what it comes to."""

    beam: _Running
    token: int
    logprob: float
    total: float


@dataclass(slots=True)
class _Group:
    """Beams of one prompt that compete with each other alone; nothing runs once it is done."""

    prompt: int
    size: int
    length_penalty: float
    early_stopping: EarlyStopping
    diversity_penalty: float
    running: list[_Running]
    finished: list[Beam] = field(default_factory=list)

    def take(self, candidates: Sequence[_Candidate], step: int) -> list[int]:
        """Go on with the best of the candidates, which come best first; those of the first `size` may finish.

        Returns the tokens that the beams which were not stopped have taken.
        """
        if not candidates and not self.finished:
            raise ValueError(
                f"row {self.prompt}, step {step}: no token is left after the stages; check what excludes ids"
            )
        stops, budget = self.running[0].row.stops, self.running[0].row.end - self.running[0].row.prompt
        length = step + 1
        for candidate in candidates[: self.size]:
            if candidate.token in stops or length == budget:
                beam = candidate.beam.extended(candidate.token, candidate.logprob, candidate.total)
                self.finished.append(
                    Beam(
                        tuple(beam.row.ids[beam.row.prompt :]),
                        beam.logprobs,
                        beam.total / length**self.length_penalty,
                        "stop" if candidate.token in stops else "length",
                    )
                )
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.size]
        going_on = [candidate for candidate in candidates if candidate.token not in stops][: self.size]
        if length == budget or not self._can_improve(going_on, length, budget):
            self.running = []
        else:
            self.running = [c.beam.extended(c.token, c.logprob, c.total) for c in going_on]
        return [candidate.token for candidate in going_on]

    def _can_improve(self, going_on: list[_Candidate], length: int, budget: int) -> bool:
        if len(self.finished) < self.size or not going_on:
            return bool(going_on)
        if self.early_stopping is True:
            return False
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = budget
        return going_on[0].total / length**self.length_penalty > self.finished[-1].score


@torch.no_grad()
def _log_softmax(logits: Tensor, prompts: Sequence[int], step: int) -> Tensor:
    """Log-probabilities [beams, V] in float32."""
    values = logits.float()
    for prompt, peak in zip(prompts, values.amax(-1).tolist(), strict=True):
        if not math.isfinite(peak):
            wrong = "all logits are -inf" if peak == -math.inf else f"the logits contain {peak}"
            raise ValueError(
                f"row {prompt}, step {step}: {wrong}; forward_func must return logits that are finite in float32, "
                "-inf only for what is excluded (float16 that overflows is a common cause)"
            )
    return values.log_softmax(-1)


@torch.no_grad()
def _charged(logprobs: Tensor, taken: Counter[int], penalty: float) -> Tensor:
    """Log-probabilities [beams, V] less the penalty for each time that a token was taken."""
    if not (penalty and taken):
        return logprobs
    tokens = torch.tensor(list(taken), device=logprobs.device)
    charges = -penalty * torch.tensor(list(taken.values()), dtype=torch.float32, device=logprobs.device)
    return logprobs.index_add(-1, tokens, charges.expand(len(logprobs), -1))


@torch.no_grad()
def _candidates(group: _Group, scores: Scores, logprobs: Tensor) -> list[_Candidate]:
    """The best continuations of the group's beams by one token, best first; of equals the lower beam and id.

    scores [beams of the group, V]; logprobs [all beams, V]. So many that enough are left if all others are stop ids.
    """
    count = max(2, 1 + len(group.running[0].row.stops)) * group.size
    largest, head = scores.largest(count)
    head = head.at_least(largest[:, -1:])
    totals = torch.tensor([beam.total for beam in group.running], dtype=torch.float64, device=logprobs.device)
    totals, best = (totals.unsqueeze(-1) + head.values).flatten().sort(descending=True, stable=True)
    totals, best = totals[:count], best[:count]
    parents = best // head.values.shape[-1]
    tokens = best % head.values.shape[-1] if head.ids is None else head.ids.flatten()[best]
    tokens = tokens.clamp(max=logprobs.shape[-1] - 1)  # where nothing was left, which is left out below
    places = torch.tensor([beam.row.index for beam in group.running], device=logprobs.device)[parents]
    columns = (parents, tokens, logprobs[places, tokens], totals)
    return [
        _Candidate(group.running[parent], token, logprob, total)
        for parent, token, logprob, total in zip(*(column.tolist() for column in columns), strict=True)
        if total > -math.inf
    ]


def _groups(
    prompts: Sequence[Row], num_beams: Any, length_penalty: Any, early_stopping: Any, num_groups: Any, penalty: Any
) -> list[_Group]:
    """The groups of all prompts, each of which starts with the prompt alone."""
    count = len(prompts)
    sizes = _COUNT.per_row("num_beams", num_beams, count)
    parts = _COUNT.per_row("num_beam_groups", num_groups, count)
    exponents = _EXPONENT.per_row("length_penalty", length_penalty, count)
    early = _EARLY.per_row("early_stopping", early_stopping, count)
    penalties = _PENALTY.per_row("diversity_penalty", penalty, count)
    groups = []
    for row, size, part, exponent, stopping, charge in zip(
        prompts, sizes, parts, exponents, early, penalties, strict=True
    ):
        if size % part:
            raise ValueError(f"row {row.index}: num_beams is {size}, which num_beam_groups, {part}, does not divide")
        if (part > 1) != (charge > 0):
            raise ValueError(
                f"row {row.index}: num_beam_groups is {part} and diversity_penalty {charge}; "
                "groups differ by the penalty alone, so give both or neither"
            )
        start = _Running(row.index, Row(0, row.ids, row.prompt, row.end, 0, 0, row.stops))
        groups += [_Group(row.index, size // part, exponent, stopping, charge, [start]) for _ in range(part)]
    return groups


def _early(name: str, value: Any) -> EarlyStopping:
    if not isinstance(value, bool) and value != "never":
        raise ValueError(f"{name} is {value!r}; it must be True, False or 'never'")
    return value


_COUNT = number(REQUIRED, lambda v: v >= 1, "an integer >= 1", int)
_EXPONENT = number(REQUIRED, lambda v: abs(v) <= 16, "in [-16, 16]")
_PENALTY = number(REQUIRED, lambda v: 0 <= v < math.inf, "a number >= 0")
_EARLY = Setting(REQUIRED, lambda value: not isinstance(value, Sequence) or isinstance(value, str), _early)
_BEFORE_DRAWING = itertools.takewhile(lambda name: name != "processors", STAGES)
_SETTINGS = [setting for name in _BEFORE_DRAWING for setting in STAGES[name].settings]
