"""Stages that change the shape of the distribution, or keep only some of its tokens.

Each is built from one value per row and narrows `Scores`; the most likely token survives all but typical and XTC, and
at least one survives each. How many candidates a row has beside its own, masked ones, depends on its neighbours; so
sums that decide are exact, or taken one after the other, and masked candidates change not even a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._row import XTC, History
from ._scores import LOWEST, Scores, placed

NO_LIMIT = 1 << 62
_MOST = (1 << 63) - 1
_LN_2, _LOG2_E = math.log(2), math.log2(math.e)
_TINY = 1e-6  # temperatures by which a logit may not be divided in float32
_LEAST = torch.finfo(torch.float32).tiny
_WORTH_BINS = 4096  # below this many candidates sorting them is as fast
_FEW = 128
_BINS, _BINS_PER_NAT = 4096, 64
_NEAR = 2e-5  # by less than half of that, sums in float32 move a threshold
_BITS = 40  # of a weight, for every row the same; their sum is below 2 ** 63 in vocabularies up to 2 ** 22


def temperature(temperature: list, *, device: torch.device):
    """Divide by it; where it is 0, keep the most likely token only."""
    greedy = torch.tensor([t == 0 for t in temperature], device=device).unsqueeze(-1)
    divisor = column([max(t, _LEAST) if t else 1.0 for t in temperature], device)
    tiny = torch.tensor([0 < t < _TINY for t in temperature], device=device).unsqueeze(-1)

    def apply(scores: Scores, history: History) -> Scores:
        if all(t == 0 for t in temperature):
            return scores.best()
        values = scores.values
        if any(0 < t < _TINY for t in temperature):  # quotients of distances to the largest cannot overflow
            highest = values.amax(-1, keepdim=True).clamp(min=LOWEST)
            values = (values - highest.masked_fill(~tiny, 0)).div_(divisor)
        else:
            values = values.div_(divisor) if scores.owned else values / divisor
        if any(t == 0 for t in temperature):
            best = scores.best().ids
            ids = scores.ids if scores.ids is not None else torch.arange(values.shape[-1], device=device)
            values = values.masked_fill(greedy & (ids != best), -torch.inf)
        return scores.with_values(values)

    return apply


def top_n_sigma(n: list, *, device: torch.device):
    """Keep logits within n standard deviations of the largest one (Tang et al. 2024); masked ones do not count."""
    factor = column(n, device)

    def apply(scores: Scores, history: History) -> Scores:
        values = scores.values
        present = values > -torch.inf
        count = present.sum(-1, keepdim=True)
        known = values.double().masked_fill_(~present, 0)
        mean = known.cumsum(-1)[:, -1:] / count
        variance = known.sub_(mean).masked_fill_(~present, 0).square_().cumsum_(-1)[:, -1:] / count
        within = (factor * variance.sqrt()).masked_fill_(factor == torch.inf, torch.inf)  # where that is inf * 0 too
        return scores.at_least((values.amax(-1, keepdim=True) - within).float())

    return apply


def top_k(k: list, *, device: torch.device):
    """Keep the k most likely tokens and every tie with the k-th (Fan et al. 2018)."""
    largest = max(value for value in k if value != NO_LIMIT)
    every = NO_LIMIT not in k
    limited = torch.tensor([value != NO_LIMIT for value in k], device=device).unsqueeze(-1)
    place = torch.tensor([min(value, largest) - 1 for value in k], device=device).unsqueeze(-1)

    def apply(scores: Scores, history: History) -> Scores:
        values, head = scores.largest(largest)
        threshold = values.gather(-1, place.clamp(max=values.shape[-1] - 1))
        return head.at_least(threshold) if every else scores.at_least(torch.where(limited, threshold, -torch.inf))

    return apply


def top_p(p: list, *, device: torch.device):
    """Keep the smallest set of most likely tokens with mass >= p, the lower id first on ties (Holtzman et al. 2019)."""
    share = _precise(p, device)

    def apply(scores: Scores, history: History) -> Scores:
        weights = _weights(scores)
        needed, head = _share_of(weights, share), scores
        if scores.values.shape[-1] >= _WORTH_BINS:  # the set is a small one as a rule: look for it among the first few
            values, head = scores.largest(_FEW)
            head = head.at_least(values[:, -1:])
            few = _weights(head)
            if bool((few.sum(-1, keepdim=True) < needed).any()):
                head = scores
            else:
                weights = few
        return head.masked(_smallest_set(head.values, weights, needed))

    return apply


def min_p(p: list, *, device: torch.device):
    """Keep the tokens with at least p times the probability of the most likely one (Nguyen et al. 2024)."""
    distance = column([math.log(value) if value > 0 else -math.inf for value in p], device)

    def apply(scores: Scores, history: History) -> Scores:
        return scores.at_least(scores.values.amax(-1, keepdim=True) + distance)

    return apply


def typical_p(p: list, *, device: torch.device):
    """Keep the smallest set with mass >= p of tokens whose surprisal is nearest to the entropy (Meister et al. 2022)."""
    share = _precise(p, device)

    def apply(scores: Scores, history: History) -> Scores:
        weights = _weights(scores)
        # |-log p - H|, inf if masked
        distance = (scores.values.double() - _log_total(scores, weights)).add_(_entropy(weights)).abs_()
        return scores.masked(_smallest_set(-distance, weights, _share_of(weights, share)))

    return apply


def epsilon_cutoff(epsilon: list, *, device: torch.device):
    """Keep the tokens with probability >= epsilon, and the most likely one (Hewitt et al. 2022)."""
    threshold = _precise([math.log(value) if value > 0 else -math.inf for value in epsilon], device)

    def apply(scores: Scores, history: History) -> Scores:
        return _with_logprob(scores, lambda entropy: threshold)

    return apply


def eta_cutoff(epsilon: list, *, device: torch.device):
    """Keep probabilities >= min(epsilon, sqrt(epsilon) * exp(-entropy)), and the largest (Hewitt et al. 2022)."""
    log_epsilon = _precise([math.log(value) if value > 0 else -math.inf for value in epsilon], device)

    def apply(scores: Scores, history: History) -> Scores:
        return _with_logprob(scores, lambda entropy: torch.minimum(log_epsilon, log_epsilon / 2 - entropy()))

    return apply


def xtc(probability: list, threshold: list, *, device: torch.device):
    """With `probability`, drop all tokens that reach `threshold` but the least likely of them, if there are two."""
    limit = _precise(threshold, device)

    def apply(scores: Scores, history: History) -> Scores:
        happens = [row.uniform(XTC) < p for row, p in zip(history.rows, probability, strict=True)]
        if not any(happens):
            return scores
        weights = _weights(scores)
        reach = weights >= _share_of(weights, limit)
        least = scores.values.masked_fill(~reach, torch.inf).amin(-1, keepdim=True)
        places = torch.arange(reach.shape[-1], device=device)
        # the higher id of equals
        last = places.masked_fill(~(reach & (scores.values == least)), -1).amax(-1, keepdim=True)
        drop = reach & (places != last) & torch.tensor(happens, device=device).unsqueeze(-1)
        return scores.masked(~drop)

    return apply


def mirostat(tau: list, eta: list, *, device: torch.device):
    """Keep the tokens with at most `mu` bits of surprise, which each row moves so that it meets tau (Basu et al. 2021).

    The second version of it: mu starts at 2 tau and falls by eta * (surprise of the token drawn - tau).
    """
    on = torch.tensor([value is not None for value in tau], device=device).unsqueeze(-1)

    def apply(scores: Scores, history: History) -> Scores:
        mu = _precise([row.mu for row in history.rows], device)
        least = torch.where(on, -mu * _LN_2, -torch.inf)
        return _with_logprob(scores, lambda entropy: least)

    return apply


def column(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(-1)


def _precise(values: list, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device).unsqueeze(-1)


def _weights(scores: Scores) -> Tensor:
    """Each candidate's probability relative to the largest [B, K], as a multiple of 2 ** -_BITS: sums are exact."""
    values = scores.values
    # exp, not exp2, which is faster, but rounds a row's last few values otherwise than those before them
    return _whole(values.double().sub_(values.amax(-1, keepdim=True)).exp_())


def _whole(parts: Tensor) -> Tensor:
    return parts.mul_(2.0**_BITS).round_().long()


def _total(weights: Tensor) -> Tensor:
    """Their sum [B, 1] in float64, the largest probability being 1."""
    return weights.sum(-1, keepdim=True).double().mul_(2.0**-_BITS)


def _share_of(weights: Tensor, share: Tensor) -> Tensor:
    """The least whole number that is `share` [B, 1] of their sum; more than there is where that is 1."""
    needed = (share * weights.sum(-1, keepdim=True)).ceil_().long()
    return needed.masked_fill_(share == 1, _MOST)


def _log_total(scores: Scores, weights: Tensor) -> Tensor:
    """log of the sum of exp(values), [B, 1] in float64."""
    return _total(weights).log_().add_(scores.values.amax(-1, keepdim=True))


def _entropy(weights: Tensor) -> Tensor:
    """Of each row [B, 1], in nats."""
    total = _total(weights)
    surprise = _total(_whole(torch.special.entr(weights * 2.0**-_BITS)))
    return total.log().add_(surprise / total)


def _with_logprob(scores: Scores, least: Callable[[Callable[[], Tensor]], Tensor]) -> Scores:
    """The candidates with log-probability >= least(entropy) [B, 1], and the most likely ones in any case.

    Thresholds are found in float32; exact sums are for rows that have a candidate so near to it that they decide.
    """
    values, highest = scores.values, scores.values.amax(-1, keepdim=True)
    log_total, entropy = _roughly(values, highest)
    threshold = least(entropy) + log_total
    low, high = (torch.minimum((threshold + off).float(), highest) for off in (-_NEAR, _NEAR))
    head = scores.at_least(low)
    rows = ((head.values > -torch.inf) & (head.values < high)).any(-1).nonzero().squeeze(-1)
    if not len(rows):
        return head
    some = Scores(values[rows], None, scores.vocabulary)
    weights = _weights(some)
    log_total = log_total.index_copy(0, rows, _log_total(some, weights))
    threshold = least(lambda: entropy().index_copy(0, rows, _entropy(weights))) + log_total
    return head.at_least(torch.minimum(threshold.float(), highest))


def _roughly(values: Tensor, highest: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """log of the sum of exp(values) [B, 1], and what gives the entropy, by sums in float32."""
    parts = (values - highest).mul_(_LOG2_E).exp2_()
    total = parts.sum(-1, keepdim=True).double()
    return total.log() + highest, lambda: total.log() + (highest - values).mul_(parts).nansum(-1, keepdim=True) / total


def _smallest_set(order: Tensor, weights: Tensor, needed: Tensor) -> Tensor:
    """Which candidates [B, K] are taken, by falling `order` and then rising id, until their weights reach `needed`.

    Where there are many, they are counted into bins of `order`, and only those of the bin where it is reached sorted.
    """
    if order.shape[-1] < _WORTH_BINS:
        return _first_sorted(order, weights, needed)
    bins = (order.amax(-1, keepdim=True) - order).mul_(_BINS_PER_NAT).nan_to_num_(nan=0.0).clamp_(max=_BINS - 1).long()
    mass = weights.new_zeros(len(order), _BINS).scatter_add_(-1, bins, weights).cumsum_(-1)
    border = (mass < needed).sum(-1, keepdim=True).clamp_(max=_BINS - 1)
    before = mass.gather(-1, (border - 1).clamp(min=0)).masked_fill_(border == 0, 0)
    inside = bins == border
    counts = inside.sum(-1)
    row, column, place = placed(inside, counts)
    shape = len(order), int(counts.amax())
    few_order, few_weights = order.new_full(shape, -torch.inf), weights.new_zeros(shape)
    few_order[row, place], few_weights[row, place] = order[row, column], weights[row, column]
    keep = bins < border
    keep[row, column] = _first_sorted(few_order, few_weights, needed - before)[row, place]
    return keep


def _first_sorted(order: Tensor, weights: Tensor, needed: Tensor) -> Tensor:
    place = order.sort(dim=-1, descending=True, stable=True).indices
    mass = weights.gather(-1, place).cumsum_(-1)
    before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], dim=-1)
    return torch.zeros_like(place, dtype=torch.bool).scatter_(-1, place, before < needed)
