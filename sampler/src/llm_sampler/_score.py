"""Log-probabilities of given continuations, and choosing between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._forward import Forward, ForwardFunc, padded, rows_of


@dataclass(frozen=True, slots=True)
class Score:
    """Natural log-probabilities of a continuation's tokens; is_greedy: each was the most likely one (ties count)."""

    logprobs: tuple[float, ...]
    is_greedy: bool

    @property
    def sum(self) -> float:
        return float(sum(self.logprobs))

    @property
    def mean(self) -> float:
        return self.sum / len(self.logprobs)


@dataclass(frozen=True, slots=True)
class Choice:
    """index: the best choice; scores: all of them; probabilities: softmax over what they were compared by."""

    index: int
    scores: tuple[Score, ...]
    probabilities: tuple[float, ...]


def score(
    forward_func: ForwardFunc,
    context: Sequence[int] | Tensor,
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> list[Score]:
    """How likely a model finds each of `continuations` (token ids) after `context` (token ids, at least one).

    One row is computed for each sequence that no other one starts with: choices of one token share a single row.
    batch_size: rows per forward at most. device: where ids are handed to forward_func, by default that of context.
    Encode context and continuation together where a tokenizer may join them, and cut behind the context's ids.

    Raises:
        ValueError: where an argument is wrong, or forward_func returns something other than logits, with what to do.

    Example:
        >>> import torch
        >>> evenly = lambda ids: torch.zeros(*ids.shape, 4)
        >>> [round(result.sum, 4) for result in score(evenly, [0], [[1], [2, 3]])]
        [-1.3863, -2.7726]
    """
    forward = Forward(forward_func)
    contexts, own_device = rows_of(context, "context")
    if len(contexts) != 1:
        raise ValueError(f"context holds {len(contexts)} rows; score takes one context, call it once for each")
    if isinstance(continuations, Sequence) and continuations and isinstance(continuations[0], int):
        raise ValueError("continuations is one flat sequence of ids; give a sequence of them, as in [[1, 2]]")
    targets, _ = rows_of(continuations, "continuations")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; it must be an integer >= 1")
    start = len(contexts[0])
    results: list[Score | None] = [None] * len(targets)
    for members in _batches(_leaves(targets), targets, start, batch_size):
        rows = [torch.cat([contexts[0], targets[leaf][:-1]]) for leaf, _ in members]
        lengths = [len(row) for row in rows]
        n = max(lengths) - start + 1
        ids = padded(rows, pad_id, torch.device(device) if device is not None else own_device)
        logits = forward(ids, lengths, n, f"continuations {[leaf for leaf, _ in members]}")  # (B, n, V)
        for row, (leaf, covered) in enumerate(members):
            own = logits[row, n - len(targets[leaf]) :]  # the row's last positions: one for each token of the leaf
            for index in covered:
                results[index] = _result(own[: len(targets[index])], targets[index], index)
    return [result for result in results if result is not None]


def multiple_choice(
    forward_func: ForwardFunc,
    context: Sequence[int] | Tensor,
    choices: Sequence[Sequence[int]],
    *,
    by: Literal["sum", "mean"] = "sum",
    batch_size: int = 32,
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> Choice:
    """Which of `choices` (token ids) a model finds most likely after `context`; the first of equals.

    by: compare log-probabilities summed ("sum", the probability of the whole choice), or per token ("mean", for choices
    of different length). Other arguments and errors as in `score`.

    Example:
        >>> import torch
        >>> after = torch.tensor([[0., 2., 1.], [0., 0., 0.], [0., 0., 0.]])
        >>> multiple_choice(lambda ids: after[ids], [0], [[2], [1]]).index
        1
    """
    if by not in ("sum", "mean"):
        raise ValueError(f"by is {by!r}; it must be 'sum' or 'mean'")
    scores = score(forward_func, context, choices, batch_size=batch_size, pad_id=pad_id, device=device)
    values = torch.tensor([getattr(result, by) for result in scores], dtype=torch.float64)
    if bool((values == -torch.inf).all()):
        raise ValueError("every choice has probability 0; check that the choices' ids belong to this model")
    return Choice(int(values.argmax()), tuple(scores), tuple(values.softmax(0).tolist()))


def _leaves(targets: Sequence[Tensor]) -> list[tuple[int, list[int]]]:
    """(index, indices it covers): one covers another whose ids, all but the last of which are fed, it starts with."""
    fed = [tuple(target[:-1].tolist()) for target in targets]
    leaves: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(targets)), key=lambda index: fed[index], reverse=True):  # longer before its prefixes
        if leaves and fed[leaves[-1][0]][: len(fed[index])] == fed[index]:
            leaves[-1][1].append(index)
        else:
            leaves.append((index, [index]))
    return leaves


def _batches(
    leaves: list[tuple[int, list[int]]], targets: Sequence[Tensor], start: int, size: int
) -> Iterator[list[tuple[int, list[int]]]]:
    """Batches of at most `size` rows in which the longest continuation is no longer than the shortest row."""
    batch: list[tuple[int, list[int]]] = []
    for leaf in sorted(leaves, key=lambda leaf: len(targets[leaf[0]])):
        if batch and (len(batch) == size or len(targets[leaf[0]]) > start + len(targets[batch[0][0]]) - 1):
            yield batch
            batch = []
        batch.append(leaf)
    yield batch


@torch.no_grad()
def _result(logits: Tensor, target: Tensor, index: int) -> Score:
    """logits [n, V] and the n tokens that were to come."""
    target = target.to(logits.device)
    if int(target.max()) >= logits.shape[-1]:
        raise ValueError(
            f"continuations: row {index} holds the id {int(target.max())}, and the vocabulary has {logits.shape[-1]}; "
            "does the tokenizer belong to this model?"
        )
    logits = logits.float()
    highest = logits.amax(-1)
    if not bool(highest.isfinite().all()):
        raise ValueError(
            f"continuations: row {index} met logits that are NaN, +inf, or all -inf; forward_func must return finite "
            "logits, -inf only for what is excluded (float16 that overflows is a common cause)"
        )
    chosen = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return Score(tuple((chosen - logits.logsumexp(-1)).tolist()), bool((chosen == highest).all()))
