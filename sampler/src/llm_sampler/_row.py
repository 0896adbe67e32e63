"""What one row holds: its ids, its stream of random numbers, and the state that its own tokens move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ._draw import uniform
from ._note import noted
from ._repeats import Repeats
from ._step import Finished
from ._text import StopText

DRAW, XTC = 0, 1  # what a row's uniforms at one position are for; further purposes take further numbers


@dataclass(slots=True, eq=False)
class Row:
    """One row. What is drawn for it next depends on this and its logits alone, not on its neighbours.

    index: its place in input_ids. ids: the prompt (the first `prompt` of them) and what was generated. end: the length
    at which it finishes. shortest: tokens that it must generate before a stop id or a stop string may end it, as `end`
    and a processor that is complete still may. key: of its stream of random numbers. processors: its own instances of
    foreign ones. text: where stop strings or text are asked for. mu: what mirostat's two settings have moved.
    """

    index: int
    ids: list[int]
    prompt: int
    end: int
    shortest: int
    key: int
    stops: frozenset[int]
    processors: Sequence[Any] = ()
    text: StopText | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float = 0.0
    mu: float = field(init=False)
    _repeats: dict[frozenset[int], Repeats] = field(default_factory=dict)
    _completions: list[Callable[[list[int]], bool]] = field(init=False)

    def __post_init__(self) -> None:
        self._completions = [own.is_complete for own in self.processors if hasattr(own, "is_complete")]
        self.mu = 2 * (self.mirostat_tau or 0.0)

    @property
    def step(self) -> int:
        """How many tokens it has generated."""
        return len(self.ids) - self.prompt

    def uniform(self, purpose: int = DRAW) -> float:
        """Its number in [0, 1) for its next token; each purpose has its own."""
        return uniform(self.key, len(self.ids), purpose)

    def repeats(self, breakers: frozenset[int]) -> Repeats:
        """Where what the row ends with has occurred before; followed from the first call on."""
        if breakers not in self._repeats:
            self._repeats[breakers] = Repeats(self.ids, breakers)
        return self._repeats[breakers]

    def take(self, token: int, processed_logprob: float) -> tuple[Finished | None, str]:
        """Let it gain `token`: why it has finished, if it has, and the text that is now certain."""
        self.ids.append(token)
        for repeats in self._repeats.values():
            repeats.push(token)
        if self.mirostat_tau is not None:
            self.mu -= self.mirostat_eta * (-processed_logprob / _LN_2 - self.mirostat_tau)
        finished: Finished | None = None
        piece, at_stop_string = "", False
        if token in self.stops:
            finished = "stop"
        elif self.text is not None:
            with noted("decode", self._last):
                piece, at_stop_string = self.text.push(token, may_stop=self.step >= self.shortest)
        if at_stop_string:
            finished = "stop_string"
        elif finished is None and self._is_complete():
            finished = "complete"
        elif finished is None and len(self.ids) == self.end:
            finished = "length"
        if finished in ("stop", "complete", "length") and self.text is not None:
            with noted("decode", self._last):
                piece += self.text.flush()
        return finished, piece

    def _is_complete(self) -> bool:
        if not self._completions:
            return False
        with noted("is_complete", self._last):
            return any(complete(self.ids) for complete in self._completions)

    @property
    def _last(self) -> str:
        """Its last token, in words."""
        return f"row {self.index}, step {self.step - 1}"


class Table:
    """The ids of all rows as one tensor [N, capacity] that grows; what was written once is never changed."""

    def __init__(self, rows: Sequence[Row], pad_id: int, device: torch.device):
        self.rows = rows
        self.pad_id = pad_id
        self.device = device
        with torch.inference_mode(False):  # else they may not be written to when that mode has ended
            prompts = [torch.tensor(row.ids) for row in rows]
            self._ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=pad_id).to(device)

    def append(self, rows: Sequence[Row]) -> None:
        """Write the last id of each of `rows`, which has just gained it."""
        width = max(len(row.ids) for row in rows)
        if width > self._ids.shape[1]:
            with torch.inference_mode(False):
                grown = self._ids.new_full((len(self._ids), width + width // 2 + 16), self.pad_id)
            grown[:, : self._ids.shape[1]] = self._ids
            self._ids = grown
        if len(rows) == 1:
            self._ids[rows[0].index, width - 1] = rows[0].ids[-1]
            return
        places = torch.tensor([[row.index, len(row.ids) - 1, row.ids[-1]] for row in rows], device=self._ids.device)
        self._ids[places[:, 0], places[:, 1]] = places[:, 2]

    def of(self, rows: Sequence[Row]) -> Tensor:
        """The ids of `rows`, right-padded [B, T]; for reading only."""
        first, width = rows[0].index, max(len(row.ids) for row in rows)
        if all(row.index == first + place for place, row in enumerate(rows)):
            return self._ids[first : first + len(rows), :width]
        return self._ids[torch.tensor([row.index for row in rows], device=self._ids.device), :width]

    def copy_of(self, rows: Sequence[Row]) -> Tensor:
        """The same in memory of its own, to be handed out."""
        return self.of(rows).clone()


class History:
    """What `rows` hold so far, as tensors on the device of the logits, made when a stage asks for them."""

    def __init__(self, table: Table, rows: Sequence[Row], device: torch.device):
        self.rows = rows
        self._table = table
        self._device = device

    @cached_property
    def ids(self) -> Tensor:
        """[B, T], right-padded."""
        return self._table.of(self.rows).to(self._device)

    @cached_property
    def own(self) -> Tensor:
        """The ids with padding replaced by the row's first one: [B, T], each token at least once, no other."""
        if len({len(row.ids) for row in self.rows}) == 1:
            return self.ids
        lengths = torch.tensor([len(row.ids) for row in self.rows], device=self._device).unsqueeze(-1)
        return torch.where(torch.arange(self.ids.shape[1], device=self._device) < lengths, self.ids, self.ids[:, :1])

    @cached_property
    def generated(self) -> tuple[Tensor, Tensor]:
        """What each row generated, [B, G], right-padded with 0; and which of them are real, as 1.0."""
        steps = torch.tensor([row.step for row in self.rows], device=self._device).unsqueeze(-1)
        starts = torch.tensor([row.prompt for row in self.rows], device=self._device).unsqueeze(-1)
        place = torch.arange(max(row.step for row in self.rows), device=self._device)
        ids = self.ids.gather(-1, (starts + place).clamp_(max=self.ids.shape[1] - 1))
        real = place < steps
        return ids.masked_fill_(~real, 0), real.float()  # pad_id may be beyond the vocabulary


_LN_2 = 0.6931471805599453
