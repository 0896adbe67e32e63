"""Speculation: drafts change what it costs, never the tokens ("exact"), and never their distribution ("rejection")."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import Draft, DraftModel, DraftTree, PromptLookup, generate, sample, stream_text

VOCABULARY = 11
TABLE = torch.randn(101, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 2


def causal(ids: Tensor) -> Tensor:
    """Logits that depend on all ids up to a position, exactly (integers), and on nothing after it."""
    return TABLE[((ids + 1) * torch.arange(1, ids.shape[1] + 1)).cumsum(-1) % 101]


def similar(ids: Tensor) -> Tensor:
    """A draft model: mostly of the same opinion."""
    return causal(ids) + torch.cos(causal(ids) * 3) / 2


class Strict:
    """A forward side with all methods, which holds the caller to their contract."""

    def __init__(self, longest: int = 1 << 30) -> None:
        self.longest = longest
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        raise AssertionError("last_logits is there to be used")

    def last_logits(self, ids: Tensor, lengths: Tensor, n: int) -> Tensor:
        ends = lengths.tolist()
        self.calls.append((len(ids), n))
        assert ids.dtype == torch.long
        assert 1 <= n <= min(ends)
        assert ids.shape[1] == max(ends) <= self.longest
        return torch.stack([row[end - n : end] for row, end in zip(causal(ids), ends, strict=True)])

    def tree_logits(self, ids: Tensor, parents: Tensor) -> Tensor:
        self.calls.append((len(ids), parents.shape[1]))
        rows = []
        for row, own in zip(ids, parents.tolist(), strict=True):
            first = own[0] + 1
            assert first + len(own) <= len(row)
            logits = []
            for node in range(len(own)):
                path, at = [], first + node
                while at >= first:
                    path.append(at)
                    assert own[at - first] < at
                    at = own[at - first]
                assert at == first - 1  # all of it leads back to the row, whose first node is its last token
                logits.append(causal(row[[*range(first), *reversed(path)]].unsqueeze(0))[0, -1])
            rows.append(torch.stack(logits))
        return torch.stack(rows)


class Windowed(Strict):
    """A model that has no positions beyond a length."""

    def __init__(self, max_length: int) -> None:
        super().__init__(longest=max_length)
        self.max_length = max_length

    def tree_logits(self, ids: Tensor, parents: Tensor) -> Tensor:
        for own in parents.tolist():
            positions = {own[0]: own[0]}
            for at, parent in enumerate(own, own[0] + 1):
                positions[at] = positions[parent] + 1
            assert max(positions.values()) < self.max_length
        return super().tree_logits(ids, parents)


class Counting:
    """A processor with state: it must be called once for each token, with the row's own ids."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        assert not self.ids or ids[0, :-1].tolist() == self.ids
        self.ids = ids[0].tolist()
        return scores + 0.5 * (torch.arange(VOCABULARY) % 2 == len(self.ids) % 2)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 1.5, "top_k": 5, "repetition_penalty": 1.3},
    {"top_p": 0.7, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"dry_multiplier": 0.8, "dry_allowed_length": 1, "xtc_probability": 0.7, "xtc_threshold": 0.05},
    {"no_repeat_ngram_size": 3, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    {"min_new_tokens": 2, "min_p": 0.05, "logit_bias": {(1, 5): -4.0, 9: 1.0}},
]
DRAFTERS: list[Callable[[], Any]] = [
    lambda: PromptLookup(4, min_match=1),
    lambda: PromptLookup(5, min_match=1, branches=3),
    lambda: DraftModel(similar, tokens=3),
    lambda: DraftTree(similar, widths=(3, 2, 1)),
    lambda: lambda ids, limits: [[row[-1]] * 9 for row in ids],
    lambda: lambda ids, limits: [[] for _ in ids],
    lambda: lambda ids, limits: [[(7 * len(row) + i) % VOCABULARY for i in range(len(row) % 6)] for row in ids],
    lambda: lambda ids, limits: [Draft(range_of(VOCABULARY), [-1] * VOCABULARY) for _ in ids],
    lambda: lambda ids, limits: [Draft([1, 2, 3, 4, 5], [-1, 0, 0, 2, -1]) if len(row) % 2 else [3] for row in ids],
]


def range_of(count: int) -> list[int]:
    return list(range(count))


rows_of_ids = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=4)


class Case:
    """Rows with settings of their own, of which any can be sampled together."""

    def __init__(self, rows: list[list[int]], data: st.DataObject) -> None:
        self.rows = rows
        chosen = [data.draw(st.sampled_from(SETTINGS)) for _ in rows]
        self.each: dict[str, list] = {name: [c.get(name) for c in chosen] for name in {n for c in chosen for n in c}}
        self.each["max_new_tokens"] = [data.draw(st.integers(2, 12)) for _ in rows]
        self.each["stop_ids"] = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2)) for _ in rows]
        self.each["seed"] = [data.draw(st.integers(0, 3)) for _ in rows]
        self.processors = [data.draw(st.sampled_from([None, Counting])) for _ in rows]

    def of(self, indices: Sequence[int], forward: Any = causal, **options: Any) -> list:
        options |= {name: [values[i] for i in indices] for name, values in self.each.items()}
        made = [self.processors[i] for i in indices]
        prompts = [self.rows[i] for i in indices]
        return generate(forward, prompts, processors=lambda row: made[row] and made[row](), top_logprobs=2, **options)


@settings(max_examples=60, deadline=None)
@given(rows_of_ids, st.data())
def test_exact_speculation_gives_the_tokens_of_plain_sampling_whatever_is_drafted(
    rows: list[list[int]], data: st.DataObject
) -> None:
    case = Case(rows, data)
    every = range(len(rows))
    longest = max(len(row) + most for row, most in zip(rows, case.each["max_new_tokens"], strict=True))
    plain = case.of(every)
    for drafter in [data.draw(st.sampled_from(DRAFTERS)) for _ in range(2)]:
        drafted = case.of(every, Strict(longest + 40), drafter=drafter())
        assert [row.tokens for row in drafted] == [row.tokens for row in plain]
        assert [row.finished for row in drafted] == [row.finished for row in plain]
        for got, want in zip(drafted, plain, strict=True):
            assert got.logprobs == pytest.approx(want.logprobs, abs=1e-5)
            assert got.processed_logprobs == pytest.approx(want.processed_logprobs, abs=1e-5)
            assert [[i for i, _ in top] for top in got.top_logprobs] == [
                [i for i, _ in top] for top in want.top_logprobs
            ]


@settings(max_examples=30, deadline=None)
@given(rows_of_ids, st.data())
def test_by_rejection_too_a_batch_equals_its_rows_alone_in_any_order(
    rows: list[list[int]], data: st.DataObject
) -> None:
    case = Case(rows, data)
    drafter = data.draw(st.sampled_from(DRAFTERS))
    options: dict[str, Any] = {"speculation": "rejection"}
    alone = [case.of([i], Strict(), drafter=drafter(), **options)[0] for i in range(len(rows))]
    order = data.draw(st.permutations(range(len(rows))))
    together = case.of(order, Strict(), drafter=drafter(), **options)
    assert [row.tokens for row in together] == [alone[i].tokens for i in order]
    assert [row.finished for row in together] == [alone[i].finished for i in order]


@pytest.mark.parametrize("drafter", range(len(DRAFTERS)))
def test_greedy_text_is_the_same_in_every_mode(drafter: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0, "repetition_penalty": 1.2}
    plain = generate(causal, [[1], [2, 3]], **options)
    for speculation in ("exact", "rejection"):
        drafted = generate(Strict(), [[1], [2, 3]], drafter=DRAFTERS[drafter](), speculation=speculation, **options)
        assert [row.tokens for row in drafted] == [row.tokens for row in plain]


def test_the_simple_form_serves_chains() -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 1}
    plain = generate(causal, [[1], [2, 3, 4]], **options)
    for drafter in (PromptLookup(4, min_match=1), DraftModel(similar), lambda ids, limits: [[1], [2] * 5][: len(ids)]):
        assert generate(causal, [[1], [2, 3, 4]], drafter=drafter, **options) == plain


@pytest.mark.parametrize("options", SETTINGS)
def test_a_model_that_drafts_for_itself_is_always_right(options: dict[str, Any]) -> None:
    """Stages see the drafted rows as they see the rows; mirostat's own state moves with what is accepted alone."""
    tokens = 1 if "mirostat_tau" in options else 4
    drafter = DraftModel(causal, tokens)
    steps = sample(causal, [[1], [2, 3]], max_new_tokens=16, seed=0, drafter=drafter, **options)
    assert sum(len(step.rows) for step in steps) == 32
    assert steps.stats.drafted == steps.stats.accepted > 0
    assert steps.stats.forwards == 1 + math.ceil(15 / (tokens + 1))


def test_an_oracle_is_accepted_whole_and_the_statistics_say_so() -> None:
    prompts, length = [[1], [2, 3]], 21
    plain = generate(causal, prompts, max_new_tokens=length, seed=4)
    whole = [prompt + list(row.tokens) for prompt, row in zip(prompts, plain, strict=True)]

    def oracle(ids: list[list[int]], limits: list[int]) -> list[list[int]]:
        known = [next(text for text in whole if text[: len(row)] == row) for row in ids]
        return [text[len(row) :][: 4 if text == whole[0] else 9] for text, row in zip(known, ids, strict=True)]

    steps = sample(Strict(), prompts, max_new_tokens=length, seed=4, drafter=oracle)
    gained = [step.rows for step in steps]
    stats = steps.stats
    assert [row.forwards for row in stats.rows] == [1 + math.ceil(20 / 5), 1 + math.ceil(20 / 10)]
    assert [row.tokens for row in stats.rows] == [21, 21]
    assert [row.drafted for row in stats.rows] == [4 * 4, 9 * 2]
    assert [row.accepted for row in stats.rows] == [4 * 4, 9 * 2]
    assert (stats.forwards, stats.tokens, stats.drafted, stats.accepted) == (5, 42, 34, 34)
    assert stats.tokens_per_forward == 42 / 8
    assert gained[:11] == [(0, 1)] * 6 + [(1,)] * 5


def test_plain_sampling_counts_its_forwards_too() -> None:
    steps = sample(causal, [[1], [2, 3]], max_new_tokens=[2, 5], seed=0)
    assert steps.stats.forwards == 0
    next(steps)
    assert (steps.stats.forwards, steps.stats.tokens) == (1, 2)
    list(steps)
    assert [row.forwards for row in steps.stats.rows] == [2, 5]
    assert steps.stats.tokens_per_forward == 1


def test_no_more_is_drafted_than_the_row_may_still_gain() -> None:
    seen: list[list[int]] = []

    def drafter(ids: list[list[int]], limits: list[int]) -> list[list[int]]:
        seen.append(limits)
        return [[0] * 50] * len(ids)

    forward = Strict(longest=7)
    generate(forward, [[1, 2, 3], [4]], max_new_tokens=[5, 3], seed=0, drafter=drafter)
    assert seen[0] == [3, 1]
    assert max(n for _, n in forward.calls) == 4
    model = DraftModel(similar, tokens=9)
    generate(Strict(longest=7), [[1, 2, 3], [4]], max_new_tokens=[5, 3], seed=0, drafter=model)
    lookup = PromptLookup(9, min_match=1)
    generate(Strict(longest=7), [[1, 1, 1], [4]], max_new_tokens=[5, 3], temperature=0, drafter=lookup)


def test_a_prompt_goes_through_the_forward_once_before_it_fans_out() -> None:
    forward = Strict()
    generate(forward, [[1, 2]], n=5, max_new_tokens=3, seed=0, drafter=DraftModel(similar, 1))
    assert forward.calls[:2] == [(1, 1), (5, 2)]


def test_cancelled_rows_and_closed_steps_end_within_a_draft() -> None:
    plain = generate(causal, [[1], [2]], max_new_tokens=9, seed=0)

    def oracle(ids: list[list[int]], limits: list[int]) -> list[list[int]]:
        return [list(plain[row[0] - 1].tokens[len(row) - 1 :]) for row in ids]

    forward = Strict()
    steps = sample(forward, [[1], [2]], max_new_tokens=9, seed=0, drafter=oracle)
    for _ in range(4):
        assert next(steps).rows == (0, 1)
    steps.cancel(0)
    assert next(steps).rows == (1,)
    steps.close()
    assert next(steps, None) is None
    assert len(forward.calls) == 2


def test_stop_strings_and_streamed_text_are_those_of_plain_sampling() -> None:
    def decode(ids: list[int]) -> str:
        return "".join("abcdefghijk"[i] for i in ids)

    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 6, "decode": decode, "stop_strings": ["ab", "cd", "gh"]}
    plain = generate(causal, [[1], [2, 3]], **options)
    assert {row.finished for row in plain} == {"stop_string"}
    for drafter in (DraftModel(causal, 7), DraftTree(similar, (2, 2))):
        assert [row.text for row in generate(Strict(), [[1], [2, 3]], drafter=drafter, **options)] == [
            row.text for row in plain
        ]
    steps = sample(Strict(), [[1], [2, 3]], max_new_tokens=20, seed=6, drafter=DraftModel(similar, 7))
    [_, row] = generate(causal, [[1], [2, 3]], max_new_tokens=20, seed=6)
    assert "".join(stream_text(steps, decode, row=1)) == decode(list(row.tokens))


def test_a_padded_head_of_either_model_is_cut_at_vocab_size() -> None:
    def wider(ids: Tensor) -> Tensor:
        return torch.nn.functional.pad(similar(ids), (0, 5), value=30.0)

    options: dict[str, Any] = {"max_new_tokens": 9, "seed": 0, "vocab_size": 10}
    plain = generate(causal, [[1]], **options)
    assert generate(Strict(), [[1]], drafter=DraftModel(wider), **options) == plain
    generate(Strict(), [[1]], drafter=DraftTree(wider, (2, 1)), speculation="rejection", **options)
    with pytest.raises(ValueError, match="its model has a vocabulary of 16, and forward_func one of 11"):
        generate(causal, [[1]], max_new_tokens=3, drafter=DraftModel(wider))


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.2}, {"vocab_size": 10, "top_k": 3}])
def test_a_smaller_model_with_fewer_logits_than_there_are_tokens_is_named(settings: dict[str, Any]) -> None:
    def narrower(ids: Tensor) -> Tensor:
        return similar(ids)[..., :9]

    options: dict[str, Any] = {"max_new_tokens": 9, "seed": 0, "vocab_size": VOCABULARY, **settings}
    message = f"drafter: its model has a vocabulary of 9, and forward_func one of {options['vocab_size']}; .* at most"
    for drafter in (DraftModel(narrower), DraftTree(narrower, (2, 1))):
        with pytest.raises(ValueError, match=message):
            generate(Strict(), [[1, 7, 2, 7, 3]], drafter=drafter, **options)
    options["vocab_size"] = 9
    plain = generate(Strict(), [[1, 7, 2, 7, 3]], **options)
    assert generate(Strict(), [[1, 7, 2, 7, 3]], drafter=DraftModel(narrower), **options) == plain


@pytest.mark.parametrize("drafter", [PromptLookup(4, min_match=1), DraftModel(similar, 3)])
def test_rows_that_gain_different_numbers_of_tokens_are_penalised_where_the_model_alone_knows_pad_id(
    drafter: Any,
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 1, "frequency_penalty": 0.1, "presence_penalty": 0.2}
    options |= {"vocab_size": 6, "pad_id": VOCABULARY - 1}
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2], [4]]
    plain = generate(causal, prompts, **options)
    assert generate(Strict(), prompts, drafter=drafter, **options) == plain


IN_SMALL_WINDOWS: list[Callable[[], Any]] = [
    lambda: DraftModel(Windowed(9), 4),
    lambda: DraftTree(Windowed(9), (2, 2, 1)),
]


@pytest.mark.parametrize("drafter", range(len(DRAFTERS + IN_SMALL_WINDOWS)))
def test_rows_that_end_before_the_models_window_end_there_with_drafts_too(drafter: int) -> None:
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9]]
    unbounded = [row.tokens for row in generate(causal, prompts, max_new_tokens=20, seed=0)]
    steps = [max(step for step in range(20) if tokens[step] not in tokens[:step]) for tokens in unbounded]
    stops = [[tokens[step]] for tokens, step in zip(unbounded, steps, strict=True)]
    window = max(len(prompt) + step for prompt, step in zip(prompts, steps, strict=True))
    options: dict[str, Any] = {"max_new_tokens": 40, "seed": 0, "stop_ids": stops}
    plain = generate(Windowed(window), prompts, **options)
    assert {row.finished for row in plain} == {"stop"}
    drafted = generate(Windowed(window), prompts, drafter=(DRAFTERS + IN_SMALL_WINDOWS)[drafter](), **options)
    assert [row.tokens for row in drafted] == [row.tokens for row in plain]


@pytest.mark.parametrize("limit", [0, 2.5, True, "9"])
def test_a_max_length_that_is_no_length_is_named(limit: Any) -> None:
    with pytest.raises(ValueError, match=f"forward_func.max_length is {limit!r}; it must be an integer >= 1, or None"):
        sample(Windowed(limit), [[1]], max_new_tokens=2)
