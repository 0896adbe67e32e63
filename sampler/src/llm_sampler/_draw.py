"""Randomness that belongs to a row and a position, and the draw from a distribution with it."""

from __future__ import annotations

import torch
from torch import Tensor

from ._scores import Scores

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def row_key(seed: int, row: int) -> int:
    """The key of row `row`'s stream of random numbers under `seed`."""
    return _mix(_mix(seed) ^ row)


def uniform(key: int, position: int, purpose: int = 0) -> float:
    """The one uniform in [0, 1) with 53 bits that belongs to `position` in the stream `key`, for each purpose.

    It is computed from its arguments alone (the finalizer of SplitMix64, Steele et al. 2014, as a counter-based
    generator), so neither the batch nor what was drawn before can change it.
    """
    return (_mix(key ^ position ^ purpose << 48) >> 11) * 2.0**-53


def draw(scores: Scores, uniforms: list[float]) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF in float64: token ids [B, 1] and their log-probabilities [B, 1].

    Candidates are walked in the order of their ids and summed one after the other, so that masked ones change nothing,
    not even a rounding: the outcome is the same whether they were dropped or are -inf. A row without any candidate
    comes out as NaN or -inf, for the caller to report.
    """
    values, ids = scores.values, scores.ids
    if values.shape[-1] == 1 and ids is not None:
        return ids, values - values  # 0, or NaN where nothing is left
    highest = values.amax(-1, keepdim=True)
    cdf = values.double().sub_(highest).exp_().cumsum_(-1)  # in place: fresh pages cost more than the sums
    total = cdf[:, -1:].contiguous()
    target = torch.tensor(uniforms, dtype=torch.float64, device=values.device).unsqueeze(-1) * total
    last = torch.searchsorted(cdf, total)  # the last token with mass
    index = torch.minimum(torch.searchsorted(cdf, target, right=True), last).clamp_(max=values.shape[-1] - 1)
    tokens = index if ids is None else ids.gather(-1, index)
    return tokens, values.gather(-1, index).double() - highest - total.log()


def log_probabilities(values: Tensor) -> Tensor:
    """Of candidates [..., K] in float64; masked ones are -inf, and change nothing for the others, as in `draw`."""
    distances = values.double() - values.amax(-1, keepdim=True)
    return distances - distances.exp().cumsum_(-1)[..., -1:].log()


def _mix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
