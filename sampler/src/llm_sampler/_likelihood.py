"""Log-probabilities of the last tokens of many sequences, in as few rows and logits as they need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from ._forward import Forward, padded, placed
from ._settings import plain

_MOST_ASKED = 4096  # positions whose logits one forward gives, but for those of a single row


@dataclass(frozen=True, slots=True)
class Request:
    """ids: the whole sequence; its last n tokens are to be scored; name: how errors call it."""

    ids: tuple[int, ...]
    n: int
    name: str

    @property
    def fed(self) -> tuple[int, ...]:
        """What the model has to see: all but the last token."""
        return self.ids[:-1]

    @property
    def start(self) -> int:
        """The first position whose logits are needed."""
        return len(self.ids) - 1 - self.n


@dataclass(slots=True)
class _Leaf:
    """A row to compute, and the requests that are answered by it: what they feed, it starts with."""

    fed: tuple[int, ...]
    start: int
    requests: list[int] = field(default_factory=list)

    @property
    def needed(self) -> int:
        return len(self.fed) - self.start


def log_likelihoods(
    forward: Forward, requests: Sequence[Request], *, batch_size: int, pad_id: int, device: torch.device
) -> list[tuple[tuple[float, ...], bool]]:
    """For each request the log-probabilities of its n tokens, and whether each was the most likely one.

    Uses `forward_func.gather_logprobs` where there is one, otherwise logits and the gather below.
    """
    batch_size = plain(batch_size)
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be an integer >= 1")
    _check_ids(requests, forward.vocab_size)
    results: list[tuple[tuple[float, ...], bool]] = [((), False)] * len(requests)
    for batch in _batches(_leaves(requests), batch_size):
        n = max(leaf.needed for leaf in batch)
        targets, places = _targets(batch, requests, n)
        rows = [torch.tensor(leaf.fed) for leaf in batch]
        ids = padded(rows, pad_id, device)
        lengths = [len(row) for row in rows]
        members = [requests[index] for leaf in batch for index in leaf.requests]
        logprobs, best = _gathered(forward, ids, lengths, targets, members)
        for index, row, first, slots in places:
            request = requests[index]
            values = tuple(logprobs[row][first + j][slot] for j, slot in enumerate(slots))
            _check(values, request)
            greedy = best[row][first : first + request.n] == list(request.ids[-request.n :])
            results[index] = values, greedy
    return results


@torch.no_grad()
def gather_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """From logits [B, n, V] and ids [B, n, K]: their log-probabilities [B, n, K] (float32), the likeliest ids [B, n].

    Where logits are NaN, +inf or all -inf, the log-probabilities are NaN. The likeliest of equals is the lowest id.
    """
    logprobs = torch.empty(targets.shape, dtype=torch.float32)
    best = torch.empty(targets.shape[:2], dtype=torch.long)
    for row, own in enumerate(logits):  # one row at a time: float32 copies of all would be as large as the logits
        values = own.float()
        highest, likeliest = values.max(-1)
        chosen = values.gather(-1, targets[row].to(values.device)) - values.logsumexp(-1, keepdim=True)
        logprobs[row] = chosen.masked_fill_(~highest.isfinite().unsqueeze(-1), torch.nan)
        best[row] = likeliest
    return logprobs, best


def _leaves(requests: Sequence[Request]) -> list[_Leaf]:
    """Rows for all requests, so that none starts with another: those with the same beginning lie together."""
    leaves: list[_Leaf] = []
    for index in sorted(range(len(requests)), key=lambda index: requests[index].fed, reverse=True):  # longer ones first
        fed, start = requests[index].fed, requests[index].start
        # more logits of a row that is computed anyway, as long as they cost less than a row of its own
        if not (leaves and leaves[-1].fed[: len(fed)] == fed and leaves[-1].start - start <= len(fed)):
            leaves.append(_Leaf(fed, start))
        leaves[-1].start = min(leaves[-1].start, start)
        leaves[-1].requests.append(index)
    return leaves


def _batches(leaves: list[_Leaf], size: int) -> Iterator[list[_Leaf]]:
    """Batches of at most `size` rows: same contexts together, similar lengths together, the longest first.

    The logits asked for are those of the last n positions of each row: n is at most the shortest row, and where rows
    need very different numbers, or more than _MOST_ASKED positions together, they go apart.
    """
    contexts = [list(group) for _, group in groupby(leaves, key=lambda leaf: leaf.fed[: leaf.start + 1])]
    contexts.sort(key=lambda group: max(len(leaf.fed) for leaf in group), reverse=True)
    batch: list[_Leaf] = []
    for leaf in (leaf for group in contexts for leaf in group):
        together = [*batch, leaf]
        n = max(leaf.needed for leaf in together)
        asked, needed = n * len(together), sum(leaf.needed for leaf in together)
        if batch and (
            len(together) > size
            or n > min(len(leaf.fed) for leaf in together)
            or asked > min(2 * needed + 256, _MOST_ASKED)
        ):
            yield batch
            together = [leaf]
        batch = together
    if batch:
        yield batch


def _targets(
    batch: list[_Leaf], requests: Sequence[Request], n: int
) -> tuple[Tensor, list[tuple[int, int, int, list[int]]]]:
    """The distinct ids asked for at each of the last n positions, [B, n, K], and where each request finds its own:
    (request, row, first position, for each token its place among the K).
    """
    asked: list[list[dict[int, int]]] = [[{} for _ in range(n)] for _ in batch]
    places = []
    for row, leaf in enumerate(batch):
        for index in leaf.requests:
            request = requests[index]
            first = request.start - (len(leaf.fed) - n)
            slots = [
                asked[row][first + j].setdefault(token, len(asked[row][first + j]))
                for j, token in enumerate(request.ids[-request.n :])
            ]
            places.append((index, row, first, slots))
    width = max(len(ids) for row in asked for ids in row)
    return torch.tensor([[[*ids, *[0] * (width - len(ids))] for ids in row] for row in asked]), places


def _gathered(
    forward: Forward, ids: Tensor, lengths: list[int], targets: Tensor, members: list[Request]
) -> tuple[list[list[list[float]]], list[list[int]]]:
    where = members[0].name + (f" and {len(members) - 1} more" if len(members) > 1 else "")
    gather = getattr(forward.forward_func, "gather_logprobs", None)
    if gather is None:
        logits = forward(ids, lengths, targets.shape[1], where)
        _check_ids(members, logits.shape[-1])
        logprobs, best = gather_logprobs(logits, targets)
    else:
        try:
            logprobs, best = gather(ids, torch.tensor(lengths, device=ids.device), targets.to(ids.device))
        except Exception as error:
            placed(error, "forward_func.gather_logprobs", where, ids)
            raise
        if logprobs.shape != targets.shape or best.shape != targets.shape[:2]:
            raise ValueError(
                f"{where}: forward_func.gather_logprobs returned {list(logprobs.shape)} and {list(best.shape)}; "
                f"log-probabilities {list(targets.shape)} and the likeliest ids {list(targets.shape[:2])} are needed"
            )
    return logprobs.tolist(), best.tolist()


def _check_ids(requests: Sequence[Request], vocabulary: int | None) -> None:
    for request in requests:
        if vocabulary is not None and max(request.ids) >= vocabulary:
            place = next(place for place, token in enumerate(request.ids) if token >= vocabulary)
            behind = place > request.start
            raise ValueError(
                f"{request.name}{'' if behind else ', its context'} holds the id {request.ids[place]} at position "
                f"{place - request.start - 1 if behind else place}, and the vocabulary has {vocabulary}; "
                "does the tokenizer belong to this model?"
            )


def _check(logprobs: tuple[float, ...], request: Request) -> None:
    for place, value in enumerate(logprobs):
        if not value <= 0.01:  # NaN too; a rounding may leave a little more than 0
            raise ValueError(
                f"{request.name} met logits that are NaN, +inf, or all -inf, for its token {place}; forward_func must "
                "return finite logits, -inf only for what is excluded (float16 that overflows is a common cause)"
            )
