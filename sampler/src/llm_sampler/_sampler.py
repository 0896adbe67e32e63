"""From the logits of some rows to a token for each: stages, draw, and what the token does to the row.

Nothing here knows where the logits come from. Speculation calls `choose` for several positions of a row, one after the
other; what a row holds moves in `accept` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._draw import draw, log_probabilities
from ._row import History, Row, Table
from ._scores import Scores, peaks_of
from ._stages import Apply, chain
from ._step import Finished, Step, Top

_LOG2_E = math.log2(math.e)
_PART = 1 << 19  # logits that are worked on at once on a CPU: what they take stays in its cache


class Drawn(NamedTuple):
    """A token for one row, its natural log-probabilities before and after the stages, and the most likely tokens."""

    token: int
    logprob: float | None
    processed_logprob: float
    top: Top = ()
    processed_top: Top = ()


@dataclass(slots=True)
class Processed:
    """The distributions of some rows at one position. scores: after the stages; what is not in them has no mass.

    logits [B, V]: as they came; `logits - highest - norm` are the natural log-probabilities before the stages. highest,
    norm [B, 1]: float32, the latter None where nobody asks for these. The scores are valid until the sampler processes
    others: their memory is used again.
    """

    rows: Sequence[Row]
    logits: Tensor
    highest: Tensor
    norm: Tensor | None
    scores: Scores


class Sampler:
    """The stages of all rows, and the rows' ids as a tensor.

    settings: one value per row for each setting of a stage. order: names of the stages. vocab_size: ids from here on
    have no mass. logprobs: whether to say what the tokens have before the stages. top_logprobs: how many of the most
    likely tokens each row reports.
    """

    def __init__(
        self,
        table: Table,
        settings: dict[str, list],
        order: Sequence[str],
        *,
        vocab_size: int | None = None,
        logprobs: bool = False,
        top_logprobs: Sequence[int] | None = None,
    ):
        self.table = table
        self.settings = settings
        self._order = order
        self.vocab_size = vocab_size
        self._logprobs = logprobs
        self._top = top_logprobs
        self._wide = any(settings["processors"])  # foreign processors are made for all columns of the head
        self._chains: dict[tuple[int, ...], list[Apply]] = {}
        self._pages: Tensor | None = None
        self._memory: tuple[Tensor, Tensor] | None = None

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> list[Drawn]:
        """The token that each of `rows` draws from its logits [B, V]. Changes nothing: the same call gives the same.

        Raises ValueError naming row and step where the logits cannot be sampled.
        """
        size = _PART // logits.shape[-1] + 1 if logits.device.type == "cpu" else len(rows)
        if len(rows) > size:
            parts = [slice(start, start + size) for start in range(0, len(rows), size)]
            return [drawn for part in parts for drawn in self.choose(logits[part], rows[part])]
        return self.draw(self.process(logits, rows), [row.uniform() for row in rows])

    def process(self, logits: Tensor, rows: Sequence[Row]) -> Processed:
        """The distribution that each of `rows` draws its next token from, given its logits [B, V]."""
        values = logits.detach().float()
        owned = values.dtype != logits.dtype
        work, spare = self._memory_for(values)
        known = values if self._wide or self.vocab_size is None else values[:, : self.vocab_size]
        peaks = peaks_of(known)
        highest = (known if peaks is None else peaks).amax(-1, keepdim=True)
        if known.shape != values.shape:
            highest = torch.maximum(highest, values[:, self.vocab_size :].amax(-1, keepdim=True))
        norm = None
        if self._logprobs:
            # two to the power of it: torch has that vectorised, four times as fast as e to the power of it
            norm = torch.sub(values, highest, out=work).mul_(_LOG2_E).exp2_().sum(-1, keepdim=True).log_()
        if self.vocab_size is not None and self._wide:
            values = values if owned else values.clone()
            values[:, self.vocab_size :] = -torch.inf
            known, owned, peaks = values, True, None
        scores = Scores(known, None, known.shape[-1], owned, peaks, spare)
        history = History(self.table, rows, logits.device)
        for stage in self._stages(rows, logits.device):
            scores = stage(scores, history)
        return Processed(rows, logits, highest, norm, scores)

    def draw(self, processed: Processed, uniforms: list[float]) -> list[Drawn]:
        """One token per row with one number in [0, 1) for each."""
        return self.drawn(processed, *draw(processed.scores, uniforms))

    def drawn(self, processed: Processed, tokens: Tensor, logprobs: Tensor) -> list[Drawn]:
        """What is said of tokens [B, 1] that have these log-probabilities [B, 1] after the stages."""
        rows, scores, logits, norm = processed.rows, processed.scores, processed.logits, processed.norm
        columns = [tokens, processed.highest, logprobs]
        if norm is not None:
            place = tokens.clamp(max=logits.shape[-1] - 1)  # where nothing was left, which is told below
            columns.append(logits.gather(-1, place).float() - processed.highest - norm)
        if tokens.device.type == "cpu":
            chosen, peaks, afters, *raw = ([value for [value] in column.tolist()] for column in columns)
        else:
            chosen, peaks, afters, *raw = torch.cat(columns, -1).T.tolist()  # the one transfer from the device
        if not math.isfinite(sum(peaks) + sum(afters)):  # in one go: as a rule all are
            index = next(i for i, both in enumerate(zip(peaks, afters, strict=True)) if not math.isfinite(sum(both)))
            raise _error(rows[index], peaks[index], float(scores.values[index].max()))
        befores = raw[0] if raw else [None] * len(rows)
        if self._top is None:
            return [
                Drawn(int(token), *both) for token, both in zip(chosen, zip(befores, afters, strict=True), strict=True)
            ]
        assert norm is not None
        counts = [self._top[row.index] for row in rows]
        before = logits.float() - processed.highest - norm
        raw_tops = _most_likely(Scores(before, None, logits.shape[-1]), counts)
        after = scores.with_values(log_probabilities(scores.values).float())
        columns = (befores, afters, raw_tops, _most_likely(after, counts))
        return [Drawn(int(token), *others) for token, others in zip(chosen, zip(*columns, strict=True), strict=True)]

    def accept(self, rows: Sequence[Row], drawn: Sequence[Drawn]) -> Step:
        """Let each row gain its token, and say what that came to. A row that has finished must not come again."""
        tokens, logprobs, processed_logprobs, tops, processed_tops = zip(*drawn, strict=True)
        outcomes: list[tuple[Finished | None, str]] = [
            row.take(token, logprob) for row, token, logprob in zip(rows, tokens, processed_logprobs, strict=True)
        ]
        self.table.append(rows)
        finished, texts = zip(*outcomes, strict=True)
        if any(finished):
            over = {row.index for row, why in zip(rows, finished, strict=True) if why is not None}
            self._chains = {key: stages for key, stages in self._chains.items() if over.isdisjoint(key)}
        return Step(
            tuple([row.index for row in rows]),
            tokens,
            logprobs if self._logprobs else None,
            processed_logprobs,
            finished,
            texts if rows[0].text is not None else None,
            tops if self._top is not None else None,
            processed_tops if self._top is not None else None,
        )

    def among(self, rows: Sequence[Row], of: Sequence[int]) -> Sampler:
        """A sampler for other rows, counted from 0: each has the settings of one in `of`, but no foreign processors."""
        settings = {name: [values[index] for index in of] for name, values in self.settings.items()}
        table = Table(rows, self.table.pad_id, self.table.device)
        return Sampler(table, settings | {"processors": [()] * len(rows)}, self._order, vocab_size=self.vocab_size)

    def _memory_for(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors like `values`, the same each time: fresh pages cost more than the work. The second is for scores."""
        if self._memory is None or self._memory[0].shape != values.shape or self._memory[0].device != values.device:
            rows, vocabulary = values.shape
            if self._pages is None or self._pages.shape[1] < rows or self._pages.device != values.device:
                with torch.inference_mode(False):  # as Table's ids
                    self._pages = values.new_empty(2 if self._logprobs else 1, rows, vocabulary)
            work, spare = self._pages[0, :rows], self._pages[-1, :rows]  # without logprobs nobody writes to the first
            self._memory = work, spare if self._wide else spare[:, : self.vocab_size]
        return self._memory

    def _stages(self, rows: Sequence[Row], device: torch.device) -> list[Apply]:
        key = tuple(row.index for row in rows)
        if key not in self._chains:
            if len(self._chains) > len(self.table.rows) + 8:  # the groups that rows come in change as rows finish
                self._chains.clear()
            self._chains[key] = chain(self._order, self.settings, key, device)
        return self._chains[key]


def _most_likely(scores: Scores, counts: Sequence[int]) -> list[Top]:
    """The most likely `counts[b]` tokens of each row by log-probabilities, the lower id first on ties, with these."""
    if not max(counts):
        return [()] * len(counts)
    _, head = scores.largest(max(counts))
    values, place = head.values.sort(dim=-1, descending=True, stable=True)
    values, place = values[:, : max(counts)], place[:, : max(counts)]
    ids = place if head.ids is None else head.ids.gather(-1, place)
    return [
        tuple(zip(ids[:count], logprobs[:count], strict=True))[: sum(p > -math.inf for p in logprobs[:count])]
        for ids, logprobs, count in zip(ids.tolist(), values.tolist(), counts, strict=True)
    ]


def _error(row: Row, highest: float, left: float) -> ValueError:
    """Why nothing can be drawn, from the largest logit in float32 before and after the stages."""
    place = f"row {row.index}, step {row.step}"
    if not math.isfinite(highest):
        wrong = "all logits are -inf" if highest == -math.inf else f"the logits contain {highest}"
        return ValueError(
            f"{place}: {wrong}; forward_func must return logits that are finite in float32, "
            "-inf only for what is excluded (float16 that overflows is a common cause)"
        )
    wrong = "no token is left" if left == -math.inf else f"a score became {left}"
    return ValueError(
        f"{place}: {wrong} after the stages; check vocab_size, temperature, penalties, constraints and what excludes ids"
    )
