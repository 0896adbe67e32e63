"""The candidates of each row while they pass through the stages, and how they are narrowed without sorting them all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 128
_WORTH_BLOCKS = 4096  # below this many candidates a plain pass is as fast
LOWEST = torch.finfo(torch.float32).min


@dataclass(slots=True)
class Scores:
    """values [B, K] float32, -inf where masked; ids [B, K] in rising order, or None where K is the vocabulary;
    `vocabulary` where a column is no candidate.

    Its fields are set once; not frozen, which takes as long as a stage. owned: nobody else has the values, so they may be
    written to. peaks: what `peaks_of` gives for the values. spare: memory for a copy of them.
    """

    values: Tensor
    ids: Tensor | None
    vocabulary: int
    owned: bool = False
    peaks: Tensor | None = None
    spare: Tensor | None = None

    def with_values(self, values: Tensor) -> Scores:
        """The same candidates with other values, which are nobody else's."""
        return Scores(values, self.ids, self.vocabulary, owned=True)

    def masked(self, keep: Tensor) -> Scores:
        return self.with_values(self.values.masked_fill(~keep, -torch.inf))

    def writable(self) -> Scores:
        """The same with every token of the vocabulary present and values that may be changed, by id."""
        scores = self.widened()
        if scores.owned:
            return scores.with_values(scores.values)
        return scores.with_values(scores.values.clone() if self.spare is None else self.spare.copy_(scores.values))

    def widened(self) -> Scores:
        """The same with every token of the vocabulary present."""
        if self.ids is None:
            return self
        full = self.values.new_full((self.values.shape[0], self.vocabulary + 1), -torch.inf)
        full = full.scatter_(-1, self.ids, self.values)[:, : self.vocabulary]
        return Scores(full.contiguous(), None, self.vocabulary, owned=True)

    def best(self) -> Scores:
        """Only the largest of each row, the lower id on ties."""
        values, ids = self.values, self.ids
        peaks = peaks_of(values) if self.peaks is None else self.peaks
        if peaks is not None:
            highest, block = peaks.max(-1, keepdim=True)  # the first of equals
            if len(values) == 1 and values.device.type == "cpu":  # a number from there costs less than a gather
                start = int(block) * _BLOCK
                index = values[:, start : start + _BLOCK].max(-1, keepdim=True).indices + start
            else:
                index = torch.add(_take(_blocks(values), block).argmax(-1, keepdim=True), block, alpha=_BLOCK)
        else:
            highest, index = values.max(-1, keepdim=True)
        return Scores(highest, index if ids is None else ids.gather(-1, index), self.vocabulary, owned=True)

    def largest(self, k: int) -> tuple[Tensor, Scores]:
        """The k largest values of each row in falling order [B, k], fewer where fewer are left; and all >= the last."""
        scores = self
        if self.values.shape[-1] >= max(_WORTH_BLOCKS, 4 * _BLOCK * k):
            # k blocks have a maximum of at least the k-th largest maximum, so the k-th largest value is no smaller
            peaks = _blocks(self.values).amax(-1) if self.peaks is None else self.peaks
            scores = self._at_least(peaks.topk(k).values[:, -1:], peaks)
        return scores.values.topk(min(k, scores.values.shape[-1])).values, scores

    def at_least(self, threshold: Tensor) -> Scores:
        """Only the candidates with value >= threshold [B, 1]; as few columns as the fullest row needs."""
        return self._at_least(threshold, peaks_of(self.values) if self.peaks is None else self.peaks)

    def _at_least(self, threshold: Tensor, peaks: Tensor | None) -> Scores:
        values, ids = self.values, self.ids
        threshold = threshold.clamp(min=LOWEST)
        if peaks is not None:
            blocks = _blocks(values)
            count = int((peaks >= threshold).sum(-1).amax())
            if count * _BLOCK * 2 <= values.shape[-1]:
                chosen = peaks.topk(max(count, 1)).indices.sort(-1).values  # [B, count]
                index = (chosen.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)
                past = index >= values.shape[-1]  # what fills the last block up stands for no id, not for the last one
                index.clamp_(max=values.shape[-1] - 1)
                ids = (index if ids is None else ids.gather(-1, index)).masked_fill_(past, self.vocabulary)
                values = _take(blocks, chosen)
        keep = values >= threshold
        counts = keep.sum(-1)
        width = max(int(counts.amax()), 1)
        if width == values.shape[-1]:
            return Scores(values, ids, self.vocabulary).masked(keep)
        if width * 2 > values.shape[-1] and ids is None:
            return self.masked(keep)
        row, column, place = placed(keep, counts)
        kept = values.new_full((values.shape[0], width), -torch.inf)
        kept[row, place] = values[row, column]
        kept_ids = torch.full_like(kept, self.vocabulary, dtype=torch.long)
        kept_ids[row, place] = column if ids is None else ids[row, column]
        return Scores(kept, kept_ids, self.vocabulary, owned=True)


def peaks_of(values: Tensor) -> Tensor | None:
    """The largest value of each block of candidates [B, N], or None where there are so few that nobody needs it."""
    return _blocks(values).amax(-1) if values.shape[-1] >= _WORTH_BLOCKS else None


def placed(keep: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column, and place among those of its row of all that `keep` [B, K] holds; counts [B]: how many in each row."""
    row, column = keep.nonzero(as_tuple=True)
    return row, column, torch.arange(len(row), device=row.device) - (counts.cumsum(-1) - counts)[row]


def _blocks(values: Tensor) -> Tensor:
    """values [B, K] as [B, N, BLOCK], filled up with -inf: a fast pass over their maxima saves a slow partial sort."""
    if values.shape[-1] % _BLOCK:
        values = pad(values, (0, -values.shape[-1] % _BLOCK), value=-torch.inf)
    return values.reshape(values.shape[0], -1, _BLOCK)


def _take(blocks: Tensor, chosen: Tensor) -> Tensor:
    """The chosen [B, M] blocks of each row, one after the other: [B, M * BLOCK]."""
    return blocks.gather(1, chosen.unsqueeze(-1).expand(-1, -1, _BLOCK)).flatten(1)
