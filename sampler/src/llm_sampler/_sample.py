"""The loop: logits of the active rows, stages, draw, and one `Step` for each token that all of them gain."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ._draw import draw, row_key, uniform
from ._forward import Forward, ForwardFunc, Rows, padded, rows_of
from ._scores import Scores
from ._settings import PerRow, order_of, per_row, seeds_of, settings_of, stops_of
from ._stages import Apply, History, chain

_PART = 1 << 20  # logits that are worked on at once on a CPU: what they take stays in its cache

Finished: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Step:
    """One token for each row that was still active; all fields run parallel to `rows`.

    rows: indices into input_ids. logprobs: natural log-probabilities of the tokens under the model itself, which no
    parameter changes; processed_logprobs: under the distribution that was drawn from. finished: "stop" (the token is a
    stop id), "length" (it is the last that max_new_tokens allows) or None.
    """

    rows: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    processed_logprobs: tuple[float, ...]
    finished: tuple[Finished | None, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """All that was generated for one row; `tokens` ends with the stop id where `finished` is "stop"."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    processed_logprobs: tuple[float, ...]
    finished: Finished

    @property
    def content(self) -> tuple[int, ...]:
        """The tokens without the stop id."""
        return self.tokens[:-1] if self.finished == "stop" else self.tokens


def sample(
    forward_func: ForwardFunc,
    input_ids: Rows,
    *,
    max_new_tokens: int | Sequence[int],
    temperature: PerRow = 1.0,
    top_k: PerRow = None,
    top_p: PerRow = None,
    min_p: PerRow = None,
    repetition_penalty: PerRow = None,
    presence_penalty: PerRow = None,
    frequency_penalty: PerRow = None,
    stop_ids: int | Sequence[int] | Sequence[Sequence[int]] = (),
    seed: int | Sequence[int] | None = None,
    order: str | Sequence[str] | None = None,
    vocab_size: int | None = None,
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> Iterator[Step]:
    """Sample from a causal model, one token per row and step.

    Every setting is one value, or a sequence with one per row; the defaults change nothing, temperature 0 is greedy.
    Rows may differ in length and leave the forward when they finish; each depends on its own prompt, settings and seed.

    Args:
        forward_func: ids [B, T] (int64, right-padded) -> logits [B, T, V]; where it has a method
            `last_logits(ids, lengths [B], n) -> [B, n, V]`, that is called instead.
        input_ids: token ids, one sequence per row, or a tensor [T] or [B, T] without padding.
        stop_ids: ids that end a row; one sequence for all rows, or one sequence per row.
        seed: row i draws from the stream of (seed, i); with one seed per row, from that of (seed[i], 0). None takes a
            fresh one. torch's own generators are neither read nor moved.
        order: names of the stages, in the order in which they work; "huggingface" (default) or "llama.cpp".
        vocab_size: ids from here on are never drawn (a head that is padded beyond its tokenizer).
        device: where the ids are handed to forward_func; by default that of input_ids.

    Raises:
        ValueError, TypeError: at once where an argument is wrong; from the iterator, naming row and step, where
            forward_func returns something that cannot be sampled. What forward_func raises comes through as it is.

    Example:
        >>> import torch
        >>> after = torch.tensor([[0., 9., 0.], [0., 0., 9.], [9., 0., 0.]])   # 0 -> 1 -> 2 -> 0 ...
        >>> [step.tokens for step in sample(lambda ids: after[ids], [[0], [1]], max_new_tokens=2, temperature=0)]
        [(1, 2), (2, 0)]
    """
    forward = Forward(forward_func)
    rows, own_device = rows_of(input_ids)
    if not (type(vocab_size) is int and vocab_size >= 1) and vocab_size is not None:
        raise ValueError(f"vocab_size is {vocab_size!r}; it must be an integer >= 1")
    if type(pad_id) is not int or pad_id < 0:
        raise ValueError(f"pad_id is {pad_id!r}; it must be an id that the model knows, >= 0")
    if vocab_size is not None:
        _check_prompts(rows, vocab_size)
    count = len(rows)
    settings = settings_of(
        count,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    budgets = per_row("max_new_tokens", max_new_tokens, count, int, lambda v: v >= 1, "an integer >= 1")
    return _steps(
        forward,
        rows,
        torch.device(device) if device is not None else own_device,
        settings=settings,
        order=order_of(order, settings),
        ends=[len(row) + budget for row, budget in zip(rows, budgets, strict=True)],
        stops=stops_of(stop_ids, count),
        keys=[row_key(*source) for source in seeds_of(seed, count, secrets.randbits)],
        vocab_size=vocab_size,
        pad_id=pad_id,
    )


def generate(forward_func: ForwardFunc, input_ids: Rows, **options: Any) -> list[Completion]:
    """Run `sample` to its end, with its arguments: one `Completion` per row, in the order of input_ids.

    Example:
        >>> import torch
        >>> after = torch.tensor([[0., 9., 0.], [0., 0., 9.], [9., 0., 0.]])
        >>> [row] = generate(lambda ids: after[ids], [[0]], max_new_tokens=9, temperature=0, stop_ids=0)
        >>> row.tokens, row.content, row.finished
        ((1, 2, 0), (1, 2), 'stop')
    """
    gained: dict[int, list[tuple]] = {}
    for step in sample(forward_func, input_ids, **options):
        for row, *rest in zip(
            step.rows, step.tokens, step.logprobs, step.processed_logprobs, step.finished, strict=True
        ):
            gained.setdefault(row, []).append(tuple(rest))
    completions = []
    for row in sorted(gained):
        tokens, logprobs, processed, finished = zip(*gained[row], strict=True)
        completions.append(Completion(tokens, logprobs, processed, finished[-1]))
    return completions


def _steps(
    forward: Forward,
    prompts: list[Tensor],
    device: torch.device,
    *,
    settings: dict[str, list],
    order: tuple[str, ...],
    ends: list[int],
    stops: list[frozenset[int]],
    keys: list[int],
    vocab_size: int | None,
    pad_id: int,
) -> Iterator[Step]:
    active = list(range(len(prompts)))
    lengths = [len(prompt) for prompt in prompts]
    ids = padded(prompts, pad_id, device)
    parts: list[tuple[slice, list[Apply]]] = []
    number = 0
    while active:
        logits = forward(ids, lengths, 1, f"step {number}")[:, 0]
        if number == 0:
            _check_prompts(prompts, min(logits.shape[-1], vocab_size or logits.shape[-1]))
        if not parts:  # the stages hold one value per active row
            size = _PART // logits.shape[-1] + 1 if logits.device.type == "cpu" else len(active)
            parts = [(slice(start, start + size), []) for start in range(0, len(active), size)]
            parts = [(part, chain(order, settings, active[part], logits.device)) for part, _ in parts]
        chosen: list[tuple[int, float, float]] = []
        for part, stages in parts:
            rows = active[part]
            history = History(ids[part].to(logits.device), lengths[part], [len(prompts[row]) for row in rows])
            uniforms = [uniform(keys[row], length) for row, length in zip(rows, lengths[part], strict=True)]
            chosen += _choose(logits[part], vocab_size, stages, history, uniforms, rows, number)
        tokens, raw, processed = zip(*chosen, strict=True)
        lengths = [length + 1 for length in lengths]
        finished: tuple[Finished | None, ...] = tuple(
            "stop" if token in stops[row] else "length" if length == ends[row] else None
            for row, token, length in zip(active, tokens, lengths, strict=True)
        )
        yield Step(tuple(active), tokens, raw, processed, finished)

        keep = [index for index, reason in enumerate(finished) if reason is None]
        if not keep:
            return
        if len(keep) < len(active):
            parts = []
            ids = ids[torch.tensor(keep, device=ids.device)]
            active, lengths, tokens = ([items[index] for index in keep] for items in (active, lengths, tokens))
        ids = _extended(ids, lengths, tokens, pad_id)
        number += 1


@torch.no_grad()
def _choose(
    logits: Tensor,
    vocab_size: int | None,
    stages: list[Apply],
    history: History,
    uniforms: list[float],
    rows: Sequence[int],
    number: int,
) -> list[tuple[int, float, float]]:
    """From logits [B, V], for each row: the token, its raw and its processed log-probability."""
    values = logits.float()
    highest = values.amax(-1, keepdim=True)
    norm = (values - highest).exp_().sum(-1, keepdim=True).log_() + highest
    allowed = values if vocab_size is None else values[:, :vocab_size]
    scores = Scores(allowed, None, allowed.shape[-1])
    for stage in stages:
        scores = stage(scores, history)
    left = scores.values.amax(-1)
    tokens, processed = draw(scores, uniforms)
    tokens = tokens.clamp(max=values.shape[-1] - 1)  # where nothing was left, which is told below
    raw = (values.gather(-1, tokens.unsqueeze(-1)) - norm).squeeze(-1)
    table = torch.stack([processed, highest.squeeze(-1), left, tokens, raw])  # float64, as the first
    processeds, peaks, lefts, chosen, raws = table.tolist()  # the one transfer from the device
    for row, peak, remaining in zip(rows, peaks, lefts, strict=True):
        if not math.isfinite(peak):
            wrong = "all logits are -inf" if peak == -math.inf else f"the logits contain {peak}"
            raise ValueError(
                f"row {row}, step {number}: {wrong}; forward_func must return finite logits, "
                "-inf only for what is excluded (float16 that overflows is a common cause)"
            )
        if not math.isfinite(remaining):
            wrong = "no token is left" if remaining == -math.inf else f"a score became {remaining}"
            raise ValueError(f"row {row}, step {number}: {wrong} after the stages; check vocab_size and the penalties")
    return [(int(token), *logprobs) for token, *logprobs in zip(chosen, raws, processeds, strict=True)]


def _extended(ids: Tensor, lengths: list[int], tokens: Sequence[int], pad_id: int) -> Tensor:
    """A new tensor (the forward side may have kept the old one) in which each row ends with its token."""
    width = max(lengths)
    new = ids.new_full((len(lengths), width), pad_id)
    kept = min(width, ids.shape[-1])
    new[:, :kept] = ids[:, :kept]
    ends = torch.tensor([length - 1 for length in lengths], device=ids.device).unsqueeze(-1)
    return new.scatter_(-1, ends, torch.tensor(tokens, device=ids.device).unsqueeze(-1))


def _check_prompts(rows: Sequence[Tensor], vocabulary: int) -> None:
    for index, row in enumerate(rows):
        if int(row.max()) >= vocabulary:
            raise ValueError(
                f"input_ids: row {index} holds the id {int(row.max())}, and the vocabulary has {vocabulary}; "
                "does the tokenizer belong to this model?"
            )
