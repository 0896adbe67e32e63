"""From the logits of some rows to a token for each: stages, draw, and what the token does to the row.

Nothing here knows where the logits come from. Speculation calls `choose` for several positions of a row, one after the
other; what a row holds moves in `accept` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._draw import draw
from ._row import History, Row, Table
from ._scores import Scores
from ._stages import Apply, chain
from ._step import Finished, Step, Top

_PART = 1 << 20  # logits that are worked on at once on a CPU: what they take stays in its cache


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token for one row, its natural log-probabilities before and after the stages, and the most likely tokens."""

    token: int
    logprob: float
    processed_logprob: float
    top: Top = ()
    processed_top: Top = ()


@dataclass(frozen=True, slots=True)
class Processed:
    """The distributions of some rows at one position. scores: after the stages; what is not in them has no mass.

    logits [B, V]: as they came. highest, norm [B, 1]: their largest and their log-sum-exp, in float32.
    """

    rows: Sequence[Row]
    logits: Tensor
    highest: Tensor
    norm: Tensor
    scores: Scores


class Sampler:
    """The stages of all rows, and the rows' ids as a tensor.

    settings: one value per row for each setting of a stage. order: names of the stages. vocab_size: ids from here on
    have no mass. top_logprobs: how many of the most likely tokens each row reports.
    """

    def __init__(
        self,
        table: Table,
        settings: dict[str, list],
        order: Sequence[str],
        *,
        vocab_size: int | None = None,
        top_logprobs: Sequence[int] | None = None,
    ):
        self.table = table
        self.settings = settings
        self._order = order
        self.vocab_size = vocab_size
        self._top = top_logprobs
        self._wide = any(settings["processors"])  # foreign processors are made for all columns of the head
        self._chains: dict[tuple[int, ...], list[Apply]] = {}

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn]:
        """The token that each of `rows` draws from its logits [B, V]. Changes nothing: the same call gives the same.

        Raises ValueError naming row and step where the logits cannot be sampled.
        """
        size = _PART // logits.shape[-1] + 1 if logits.device.type == "cpu" else len(rows)
        drawn: list[Drawn] = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            drawn += self.draw(self.process(logits[start : start + size], part), [row.uniform() for row in part])
        return drawn

    @torch.no_grad()
    def process(self, logits: Tensor, rows: Sequence[Row]) -> Processed:
        """The distribution that each of `rows` draws its next token from, given its logits [B, V]."""
        values = logits.float()
        highest = values.amax(-1, keepdim=True)
        norm = (values - highest).exp_().sum(-1, keepdim=True).log_().add_(highest)
        owned = values is not logits
        if self.vocab_size is not None and self._wide:
            values = values if owned else values.clone()
            values[:, self.vocab_size :] = -torch.inf
            owned = True
        elif self.vocab_size is not None:
            values = values[:, : self.vocab_size]
        scores = Scores(values, None, values.shape[-1], owned)
        history = History(self.table, rows, logits.device)
        for stage in self._stages(rows, logits.device):
            scores = stage(scores, history)
        return Processed(rows, logits, highest, norm, scores)

    @torch.no_grad()
    def draw(self, processed: Processed, uniforms: list[float]) -> list[Drawn]:
        """One token per row with one number in [0, 1) for each."""
        rows, scores, logits = processed.rows, processed.scores, processed.logits
        left = scores.values.amax(-1)
        tokens, logprobs = draw(scores, uniforms)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # where nothing was left, which is told below
        raw = (logits.gather(-1, tokens.unsqueeze(-1)).float() - processed.norm).squeeze(-1)
        table = torch.stack([tokens, raw, logprobs, processed.highest.squeeze(-1), left])  # float64, as logprobs
        chosen, raws, logprobs, peaks, lefts = table.tolist()  # the one transfer from the device
        for row, peak, remaining in zip(rows, peaks, lefts, strict=True):
            _check(row, peak, remaining)
        tops: list[tuple[Top, ...]] = [()] * len(rows)
        if self._top is not None:
            counts = [self._top[row.index] for row in rows]
            raw_tops = _most_likely(Scores(logits.float(), None, logits.shape[-1]), processed.norm, counts)
            norm = scores.values.logsumexp(-1, keepdim=True)
            tops = list(zip(raw_tops, _most_likely(scores, norm, counts), strict=True))
        return [
            Drawn(int(token), logprob, processed_logprob, *top)
            for token, logprob, processed_logprob, top in zip(chosen, raws, logprobs, tops, strict=True)
        ]

    def accept(self, rows: Sequence[Row], drawn: Sequence[Drawn]) -> Step:
        """Let each row gain its token, and say what that came to. A row that has finished must not come again."""
        outcomes: list[tuple[Finished | None, str]] = [
            row.take(one.token, one.processed_logprob) for row, one in zip(rows, drawn, strict=True)
        ]
        self.table.append(rows)
        finished, texts = zip(*outcomes, strict=True)
        return Step(
            tuple(row.index for row in rows),
            tuple(one.token for one in drawn),
            tuple(one.logprob for one in drawn),
            tuple(one.processed_logprob for one in drawn),
            finished,
            texts if rows[0].text is not None else None,
            tuple(one.top for one in drawn) if self._top is not None else None,
            tuple(one.processed_top for one in drawn) if self._top is not None else None,
        )

    def _stages(self, rows: Sequence[Row], device: torch.device) -> list[Apply]:
        key = tuple(row.index for row in rows)
        if key not in self._chains:
            if len(self._chains) > len(self.table.rows) + 8:  # the groups that rows come in change as rows finish
                self._chains.clear()
            self._chains[key] = chain(self._order, self.settings, key, device)
        return self._chains[key]


def _most_likely(scores: Scores, norm: Tensor, counts: Sequence[int]) -> list[Top]:
    """The most likely `counts[b]` tokens of each row, the lower id first on ties, with their log-probabilities."""
    if not max(counts):
        return [()] * len(counts)
    _, head = scores.largest(max(counts))
    values, place = head.values.sort(dim=-1, descending=True, stable=True)
    values, place = values[:, : max(counts)], place[:, : max(counts)]
    ids = place if head.ids is None else head.ids.gather(-1, place)
    logprobs = values - norm
    return [
        tuple(zip(ids[:count], logprobs[:count], strict=True))[: sum(p > -math.inf for p in logprobs[:count])]
        for ids, logprobs, count in zip(ids.tolist(), logprobs.tolist(), counts, strict=True)
    ]


def _check(row: Row, peak: float, remaining: float) -> None:
    if not math.isfinite(peak):
        wrong = "all logits are -inf" if peak == -math.inf else f"the logits contain {peak}"
        raise ValueError(
            f"row {row.index}, step {row.step}: {wrong}; forward_func must return finite logits, "
            "-inf only for what is excluded (float16 that overflows is a common cause)"
        )
    if not math.isfinite(remaining):
        wrong = "no token is left" if remaining == -math.inf else f"a score became {remaining}"
        raise ValueError(
            f"row {row.index}, step {row.step}: {wrong} after the stages; "
            "check vocab_size, penalties, constraints and what excludes ids"
        )
