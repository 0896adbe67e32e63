"""The loop: logits of the active rows, a token for each, and one `Step` for all of them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ._drafts import CustomDrafter, Drafter, drafter_of
from ._forward import Forward, ForwardFunc, Rows
from ._prepare import check_ids, prepared
from ._processors import Factory
from ._row import Row
from ._sampler import Sampler
from ._settings import Biases, Ids, PerRow, Strings, Words, plain
from ._speculate import drafted_steps
from ._stats import Stats
from ._step import Completion, Step, collected


def sample(
    forward_func: ForwardFunc,
    input_ids: Rows,
    *,
    max_new_tokens: int | Sequence[int],
    n: int = 1,
    temperature: PerRow = 1.0,
    top_k: PerRow = None,
    top_p: PerRow = None,
    min_p: PerRow = None,
    typical_p: PerRow = None,
    epsilon_cutoff: PerRow = None,
    eta_cutoff: PerRow = None,
    top_n_sigma: PerRow = None,
    xtc_probability: PerRow = None,
    xtc_threshold: PerRow = None,
    mirostat_tau: PerRow = None,
    mirostat_eta: PerRow = None,
    repetition_penalty: PerRow = None,
    presence_penalty: PerRow = None,
    frequency_penalty: PerRow = None,
    dry_multiplier: PerRow = None,
    dry_base: PerRow = None,
    dry_allowed_length: PerRow = None,
    dry_sequence_breakers: Ids = None,
    dry_penalty_last_n: PerRow = None,
    no_repeat_ngram_size: PerRow = None,
    logit_bias: Biases = None,
    bad_words_ids: Words = None,
    allowed_token_ids: Ids = None,
    processors: Factory | None = None,
    min_new_tokens: PerRow = None,
    stop_ids: Ids = None,
    stop_strings: Strings = None,
    decode: Callable[[list[int]], str] | None = None,
    logprobs: bool | None = None,
    top_logprobs: PerRow = None,
    seed: int | Sequence[int] | Tensor | None = None,
    drafter: Drafter | CustomDrafter | None = None,
    speculation: Literal["exact", "rejection"] = "exact",
    order: str | Sequence[str] | None = None,
    vocab_size: int | None = None,
    pad_id: int = 0,
    device: torch.device | str | None = None,
) -> Steps:
    """Sample from a causal model, one token per row and step.

    Every setting is one value, or a sequence with one per row; the defaults change nothing, temperature 0 is greedy.
    Rows may differ in length and leave the forward when they finish; each depends on its own prompt, settings and seed.
    What each setting does is said in the README, under its name.

    Args:
        forward_func: ids [B, T] (int64, right-padded) -> logits [B, T, V]; where it has a method
            `last_logits(ids, lengths [B], n) -> [B, n, V]`, that is called instead.
        input_ids: token ids, one sequence per row, or a tensor [T] or [B, T] without padding.
        n: rows for each prompt, one after the other: row i continues prompt i // n. Settings are given per prompt.
        processors: the row's index -> a processor `(ids [1, T], scores [1, V]) -> scores`, such as a constraint, several
            of them, or None; called once for each row.
        stop_ids: ids that end a row. stop_strings: texts that end it, for which `decode` is needed.
        decode: token ids -> text; with it, the steps hold the rows' text too.
        logprobs: whether the steps have the tokens' log-probabilities under the model itself, which take another pass over
            the vocabulary; by default where top_logprobs, how many of the most likely tokens to report, are asked for.
        seed: row i draws from the stream of (seed, i); with one seed per prompt, from that of (seed[i // n], i % n).
            None takes a fresh one. torch's own generators are neither read nor moved.
        drafter: guesses tokens, of which one forward checks several: `PromptLookup`, `DraftModel`, `DraftTree`, or a
            function of the rows' ids and of how many tokens each can use. speculation: "exact" gives the very tokens that
            there would be without it; "rejection" others, with the same probabilities.
        order: names of the stages, in the order in which they work; "huggingface" (default) or "llama.cpp".
        vocab_size: ids from here on are never drawn (a head that is padded beyond its tokenizer).
        device: where the ids are handed to forward_func; by default that of input_ids.

    Raises:
        ValueError, TypeError: at once where an argument is wrong; from the iterator, naming row and step, where
            forward_func returns something that cannot be sampled. What forward_func, a processor, a drafter or decode
            raises comes through as it is, with a note of where that was.

    Example:
        >>> import torch
        >>> after = torch.tensor([[0., 9., 0.], [0., 0., 9.], [9., 0., 0.]])   # 0 -> 1 -> 2 -> 0 ...
        >>> [step.tokens for step in sample(lambda ids: after[ids], [[0], [1]], max_new_tokens=2, temperature=0)]
        [(1, 2), (2, 0)]
    """
    arguments = dict(locals())
    forward = Forward(forward_func)
    rows, sampler = prepared(arguments)
    if forward.vocab_size is not None:
        check_ids(rows, sampler, forward.vocab_size)
    if speculation not in ("exact", "rejection"):
        raise ValueError(f"speculation is {speculation!r}; it must be 'exact' or 'rejection'")
    if drafter is None and speculation != "exact":
        raise ValueError(f"speculation is {speculation!r}, but there is no drafter; give one, such as PromptLookup()")
    drafts = None if drafter is None else drafter_of(drafter, forward)
    cancelled: set[int] = set()
    stats = Stats(rows=tuple(Stats() for _ in rows))
    steps = _steps(forward, rows, sampler, cancelled, stats, drafts, speculation == "rejection")
    return Steps(steps, cancelled, stats)


def generate(forward_func: ForwardFunc, input_ids: Rows, **options: Any) -> list[Completion]:
    """Run `sample` to its end, with its arguments: one `Completion` per row, in the order of input_ids.

    Example:
        >>> import torch
        >>> after = torch.tensor([[0., 9., 0.], [0., 0., 9.], [9., 0., 0.]])
        >>> [row] = generate(lambda ids: after[ids], [[0]], max_new_tokens=9, temperature=0, stop_ids=0)
        >>> row.tokens, row.content, row.finished
        ((1, 2, 0), (1, 2), 'stop')
    """
    return collected(sample(forward_func, input_ids, **options))


class Steps(Iterator[Step]):
    """The steps as they are computed; nothing is, before the next one is asked for. `stats` counts what they cost."""

    def __init__(self, steps: Generator[Step], cancelled: set[int], stats: Stats):
        self._steps = steps
        self._cancelled = cancelled
        self.stats = stats

    def __next__(self) -> Step:
        return next(self._steps)

    def cancel(self, row: int) -> None:
        """Leave a row out of all further steps and forwards."""
        row, count = plain(row), len(self.stats.rows)
        if type(row) is not int or not 0 <= row < count:
            raise ValueError(f"row {row!r} cannot be cancelled; there are {count} rows, counted from 0")
        self._cancelled.add(row)

    def close(self) -> None:
        """End it here; there are no further steps."""
        self._steps.close()


def _steps(
    forward: Forward,
    rows: list[Row],
    sampler: Sampler,
    cancelled: set[int],
    stats: Stats,
    drafter: Drafter | None,
    by_chance: bool,
) -> Generator[Step]:
    active, number = rows, 0
    while active := [row for row in active if row.index not in cancelled]:
        if number == 0:
            logits = first_logits(forward, active, sampler)
        else:
            ids, lengths = sampler.table.copy_of(active), [len(row.ids) for row in active]
            logits = forward(ids, lengths, 1, f"step {number}", [row.index for row in active])[:, 0]
        stats.forwarded(active)
        if drafter is not None:
            yield from drafted_steps(forward, active, logits, sampler, cancelled, stats, drafter, by_chance)
            return
        drawn = sampler.choose(logits, active)
        del logits  # they may be a view of the logits of all positions: not two of these at once
        step = sampler.accept(active, drawn)
        stats.gained(active)
        yield step
        active = [row for row, finished in zip(active, step.finished, strict=True) if finished is None]
        number += 1


def first_logits(forward: Forward, rows: list[Row], sampler: Sampler) -> Tensor:
    """Logits [B, V] after the prompts; rows with the same one share its computation."""
    prompts = [tuple(row.ids) for row in rows]
    one = dict(zip(prompts, rows, strict=True))  # any row with that prompt
    place = {prompt: index for index, prompt in enumerate(one)}
    distinct = list(one.values())
    ids, lengths = sampler.table.copy_of(distinct), [len(row.ids) for row in distinct]
    logits = forward(ids, lengths, 1, "step 0", [row.index for row in distinct])[:, 0]
    check_ids(rows, sampler, logits.shape[-1])
    return logits if len(distinct) == len(rows) else logits[[place[prompt] for prompt in prompts]]
