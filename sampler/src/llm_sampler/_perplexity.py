"""Perplexity of a text longer than what a model can see at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._forward import Forward, ForwardFunc, rows_of
from ._likelihood import Request, log_likelihoods
from ._settings import plain


@dataclass(frozen=True, slots=True)
class Perplexity:
    """logprobs: natural log-probabilities of the tokens that were scored; text: what they encode, where it was given."""

    logprobs: tuple[float, ...]
    text: str | None = None

    @property
    def sum(self) -> float:
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the negative mean log-probability of a token; infinite where a token has probability 0."""
        mean = -self.sum / len(self.logprobs)
        return math.exp(mean) if mean < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the scored tokens cost, per UTF-8 byte of the text: comparable between tokenizers."""
        if not self.text:
            raise ValueError("bits per byte need the text that the ids encode; give text=")
        return -self.sum / math.log(2) / len(self.text.encode())


def perplexity(
    forward_func: ForwardFunc,
    input_ids: Sequence[int] | Tensor,
    *,
    max_length: int,
    stride: int | None = None,
    text: str | None = None,
    batch_size: int = 8,
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> Perplexity:
    """How surprised a model is by a text of any length, seen through windows that overlap.

    Windows of max_length tokens begin every stride tokens (default: half of max_length); each scores the tokens that
    none before it has scored, so each has at least max_length - stride tokens in front of it. A small stride is more
    exact, and costs len / stride windows. What has nothing in front of it is not scored: the first token (put a
    begin-of-text token there to have all of the text scored), and with stride = max_length that of each window.

    These are the windows of transformers' documentation ("Perplexity of fixed-length models"), whose loop weighs a
    window that overlaps by one token too few; here every scored token weighs the same.

    Args:
        input_ids: the whole text's token ids, at least two. text: the text itself, for `Perplexity.bits_per_byte`.
        batch_size: windows per forward at most; fewer where together they score more than 4096 tokens. Other arguments
            and errors as in `score`.

    Example:
        >>> import torch
        >>> evenly = lambda ids: torch.zeros(*ids.shape, 4)
        >>> result = perplexity(evenly, [0, 1, 2, 3, 0, 1, 2], max_length=4, stride=2)
        >>> len(result.logprobs), round(result.perplexity, 4)
        (6, 4.0)
    """
    max_length, stride = plain(max_length), plain(stride)
    stride = max(1, max_length // 2) if stride is None and type(max_length) is int else stride
    if type(max_length) is not int or max_length < 2:
        raise ValueError(f"max_length is {max_length!r}; it must be an integer >= 2, such as the model's context")
    if type(stride) is not int or not 1 <= stride <= max_length:
        raise ValueError(f"stride is {stride!r}; it must be an integer from 1 to max_length={max_length}")
    forward = Forward(forward_func)
    rows, own_device = rows_of(input_ids)
    if len(rows) != 1:
        raise ValueError(f"input_ids holds {len(rows)} rows; give one text, call it once for each")
    ids = tuple(rows[0].tolist())
    if len(ids) < 2:
        raise ValueError("input_ids holds one token, and nothing in front of it; put a begin-of-text token there")
    requests: list[Request] = []
    scored = 1  # the first token has nothing in front of it
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        n = min(end - scored, end - begin - 1)
        if n:  # a last window of one token alone has nothing to score
            requests.append(Request(ids[begin:end], n, f"window {len(requests)}, tokens {begin} to {end - 1}"))
        scored = end
        if end == len(ids):
            break
    found = log_likelihoods(
        forward, requests, batch_size=batch_size, pad_id=pad_id, device=torch.device(device or own_device)
    )
    return Perplexity(tuple(value for logprobs, _ in found for value in logprobs), text)
