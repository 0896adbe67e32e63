"""The loop: rows are independent, and steps say what happened."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import llm_sampler
from llm_sampler import DraftModel, PromptLookup, generate, sample

VOCABULARY = 17


class Causal:
    """Logits that depend on all ids up to a position, exactly (integers), and on nothing after it."""

    def __init__(self) -> None:
        self.table = torch.randn(101, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 2
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.shapes.append(tuple(ids.shape))
        return self.table[((ids + 1) * torch.arange(1, ids.shape[1] + 1)).cumsum(-1) % 101]


class LastOnly(Causal):
    def __call__(self, ids: Tensor) -> Tensor:
        raise AssertionError("last_logits is there to be used")

    def last_logits(self, ids: Tensor, lengths: Tensor, n: int) -> Tensor:
        full = Causal.__call__(self, ids)
        return torch.stack([row[end - n : end] for row, end in zip(full, lengths.tolist(), strict=True)])


class Alternating:
    """A processor with state: it counts how often it was called, and must have been once for each token."""

    def __init__(self) -> None:
        self.length: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        assert ids.shape[0] == scores.shape[0] == 1
        assert self.length in (None, ids.shape[1] - 1)
        self.length = ids.shape[1]
        return scores + 0.5 * (torch.arange(VOCABULARY) % 2 == self.length % 2)


class Odd:
    """A processor that writes into what it is given."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, int(ids[0, -1])] -= 1.0
        return scores


SETTINGS: list[dict] = [
    {},
    {"temperature": 0.0},
    {"temperature": 1.3, "top_k": 5},
    {"top_p": 0.7, "repetition_penalty": 1.5},
    {"min_p": 0.1, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"temperature": 0.0, "frequency_penalty": 2.0},
    {"logit_bias": {3: 2.0, (1, 5): -4.0, 9: -math.inf}, "top_n_sigma": 1.5},
    {"bad_words_ids": [[4], [1, 2], [7, 7, 7]], "typical_p": 0.7},
    {"allowed_token_ids": [1, 2, 3, 4, 9, 16], "xtc_probability": 0.7, "xtc_threshold": 0.05},
    {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_sequence_breakers": [5], "dry_penalty_last_n": 9},
    {"no_repeat_ngram_size": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    {"min_new_tokens": 1, "epsilon_cutoff": 0.05, "eta_cutoff": 0.1},
]
prompts = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(prompts, st.data())
def test_a_batch_equals_its_rows_alone_in_any_order(rows: list[list[int]], data: st.DataObject) -> None:
    count = len(rows)
    chosen = [data.draw(st.sampled_from(SETTINGS)) for _ in rows]
    each = {name: [c.get(name) for c in chosen] for name in {name for c in chosen for name in c}}
    own = [data.draw(st.sampled_from([None, Alternating, Odd])) for _ in rows]
    lengths = [data.draw(st.integers(1, 6)) for _ in rows]
    stops = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=3)) for _ in rows]
    seeds = [data.draw(st.integers(0, 3)) for _ in rows]
    forward = data.draw(st.sampled_from([Causal, LastOnly]))
    order = data.draw(st.permutations(range(count)))

    def of(indices: Sequence[int]) -> list:
        options = {name: [values[i] for i in indices] for name, values in each.items()}
        return generate(
            forward(),
            [rows[i] for i in indices],
            max_new_tokens=[lengths[i] for i in indices],
            stop_ids=[stops[i] for i in indices],
            seed=[seeds[i] for i in indices],
            processors=lambda row: own[indices[row]] and own[indices[row]](),
            logprobs=True,
            **options,
        )

    alone = [of([i])[0] for i in range(count)]
    assert [row.tokens for row in of(order)] == [alone[i].tokens for i in order]
    assert [row.finished for row in of(order)] == [alone[i].finished for i in order]
    for got, want in zip(of(order), order, strict=True):
        assert got.logprobs == pytest.approx(alone[want].logprobs, abs=1e-5)
        assert got.processed_logprobs == pytest.approx(alone[want].processed_logprobs, abs=1e-5)


def test_a_single_seed_gives_each_row_its_own_stream() -> None:
    def flat(ids):
        return torch.zeros(*ids.shape, VOCABULARY)

    rows = generate(flat, [[0]] * 3, max_new_tokens=8, seed=4)
    assert len({row.tokens for row in rows}) == 3
    assert generate(flat, [[0]], max_new_tokens=8, seed=4)[0].tokens == rows[0].tokens


def test_no_seed_gives_fresh_text_and_leaves_torchs_generator_alone() -> None:
    state = torch.get_rng_state()

    def flat(ids):
        return torch.zeros(*ids.shape, VOCABULARY)

    assert len({generate(flat, [[0]], max_new_tokens=20)[0].tokens for _ in range(3)}) == 3
    assert torch.equal(state, torch.get_rng_state())


def test_sampling_that_is_taken_up_again_goes_on_with_the_same_text() -> None:
    [whole] = generate(Causal(), [[1, 2]], max_new_tokens=10, seed=3)
    [resumed] = generate(Causal(), [[1, 2, *whole.tokens[:4]]], max_new_tokens=6, seed=3)
    assert resumed.tokens == whole.tokens[4:]


def test_finished_rows_leave_the_forward_and_steps_say_why() -> None:
    follow = torch.eye(5).roll(1, dims=1) * 50  # 0 -> 1 -> 2 -> 3 -> 4 -> 0
    shapes = []

    def forward(ids: Tensor) -> Tensor:
        shapes.append(tuple(ids.shape))
        return follow[ids]

    steps = list(
        sample(forward, [[0, 0, 0, 0], [1], [2, 2]], max_new_tokens=[2, 9, 1], temperature=0, stop_ids=[[], [4], [3]])
    )
    assert [(s.rows, s.tokens, s.finished) for s in steps] == [
        ((0, 1, 2), (1, 2, 3), (None, None, "stop")),  # a stop id that is also the last token allowed: "stop"
        ((0, 1), (2, 3), ("length", None)),
        ((1,), (4,), ("stop",)),
    ]
    assert shapes == [(3, 4), (2, 5), (1, 3)]


def test_ids_handed_out_are_never_changed_afterwards() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def forward(ids: Tensor) -> Tensor:
        seen.append((ids, ids.clone()))
        return torch.zeros(*ids.shape, 4)

    generate(forward, [[1, 2, 3], [1]], max_new_tokens=4, seed=0)
    assert all(torch.equal(now, then) for now, then in seen)


def test_logits_handed_in_are_never_changed() -> None:
    logits = torch.randn(1, 1, 9000)
    before = logits.clone()
    for options in SETTINGS:
        generate(lambda ids: logits.expand(*ids.shape, -1), [[3]], max_new_tokens=1, **options)
    assert torch.equal(logits, before)


def test_raw_logprobs_are_the_models_own_whatever_the_settings() -> None:
    for options in SETTINGS:
        [row] = generate(Causal(), [[1, 2, 3]], max_new_tokens=5, seed=1, logprobs=True, **options)
        ids = torch.tensor([[1, 2, 3, *row.tokens]])
        want = Causal()(ids)[0, 2:-1].log_softmax(-1).gather(-1, ids[0, 3:, None])[:, 0]
        assert row.logprobs == pytest.approx(want.tolist(), abs=1e-5)


def test_vocab_size_masks_a_padded_head() -> None:
    def forward(ids):
        return torch.arange(8.0).expand(*ids.shape, 8)

    for options in (
        {"temperature": 0},
        {"seed": 1},
        {"seed": 1, "top_k": 3},
        {"temperature": 0, "frequency_penalty": 9.0},
    ):
        rows = generate(forward, [[0]] * 20, max_new_tokens=3, vocab_size=6, **options)
        assert max(max(row.tokens) for row in rows) <= 5


def test_order_decides_what_temperature_changes() -> None:
    def forward(ids):
        return torch.tensor([0.6, 0.3, 0.1]).log().expand(*ids.shape, 3)

    kept = {
        order: {row.tokens for row in generate(forward, [[0]] * 200, max_new_tokens=1, seed=0, order=order, **options)}
        for options in [{"temperature": 9.0, "top_p": 0.59}]
        for order in ("huggingface", "llama.cpp")
    }
    assert kept == {"huggingface": {(0,), (1,)}, "llama.cpp": {(0,)}}


def test_half_precision_logits_are_sampled_in_single() -> None:
    logits = torch.randn(1, 1, 64)
    low = generate(lambda ids: logits.bfloat16(), [[0]], max_new_tokens=1, seed=0)
    single = generate(lambda ids: logits.bfloat16().float(), [[0]], max_new_tokens=1, seed=0)
    assert low == single


def test_a_closed_generator_leaves_nothing_behind() -> None:
    forward = Causal()
    steps = sample(forward, [[1], [2]], max_new_tokens=100, seed=0)
    next(steps)
    calls = len(forward.shapes)
    gone = weakref.ref(forward)
    steps.close()  # type: ignore[attr-defined]
    assert len(forward.shapes) == calls
    assert next(steps, None) is None
    del forward
    gc.collect()
    assert gone() is None
    assert torch.is_grad_enabled()


def test_a_cancelled_row_is_in_no_further_step_or_forward() -> None:
    forward = Causal()
    steps = sample(forward, [[1], [2], [3]], max_new_tokens=3, seed=[1, 2, 3])
    steps.cancel(0)
    first = next(steps)
    assert first.rows == (1, 2)
    steps.cancel(1)
    assert [step.rows for step in steps] == [(2,), (2,)]
    assert forward.shapes == [(2, 1), (1, 2), (1, 3)]
    [alone] = generate(Causal(), [[3]], max_new_tokens=1, seed=[3])
    assert first.tokens[1] == alone.tokens[0]
    with pytest.raises(ValueError, match="row 3 cannot be cancelled; there are 3 rows"):
        steps.cancel(3)


def test_the_row_to_cancel_may_be_a_tensor_and_is_named_where_it_is_no_row() -> None:
    steps = sample(Causal(), [[1], [2]], max_new_tokens=3, seed=0)
    steps.cancel(torch.tensor(0))  # type: ignore[arg-type]
    assert [step.rows for step in steps] == [(1,)] * 3
    for wrong in (0.5, "a", None, True, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="cannot be cancelled; there are 2 rows"):
            steps.cancel(wrong)  # type: ignore[arg-type]


def test_the_most_likely_tokens_are_told_before_and_after_the_stages() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    [row] = generate(
        lambda ids: logits.expand(*ids.shape, 4), [[0]], max_new_tokens=2, temperature=0.5, top_k=2, top_logprobs=3
    )
    assert row.logprobs is not None
    assert row.top_logprobs is not None
    assert row.top_processed_logprobs is not None
    for token, own, top in zip(row.tokens, row.logprobs, row.top_logprobs, strict=True):
        assert own == dict(top)[token]
    for top, processed in zip(row.top_logprobs, row.top_processed_logprobs, strict=True):
        assert [token for token, _ in top] == [1, 3, 2]
        assert [p for _, p in top] == pytest.approx([math.log(p) for p in (0.4, 0.3, 0.2)])
        assert [token for token, _ in processed] == [1, 3]
        assert [p for _, p in processed] == pytest.approx([math.log(0.16 / 0.25), math.log(0.09 / 0.25)])


def test_each_row_says_how_many_tokens_it_wants_to_be_told_and_equals_come_by_id() -> None:
    rows = generate(
        lambda ids: torch.zeros(*ids.shape, 6000), [[0]] * 3, max_new_tokens=1, top_logprobs=[2, 0, None], seed=0
    )
    assert [row.top_logprobs and [[token for token, _ in top] for top in row.top_logprobs] for row in rows] == [
        [[0, 1]],
        [[]],
        [[]],
    ]
    [row] = generate(Causal(), [[0]], max_new_tokens=1)
    assert row.top_logprobs is None


def test_a_row_takes_the_same_token_whatever_is_reported_of_it() -> None:
    plain = generate(Causal(), [[1, 2]], max_new_tokens=9, seed=1, temperature=1.5)
    told = generate(
        Causal(), [[1, 2]], max_new_tokens=9, seed=1, temperature=1.5, top_logprobs=5, decode=lambda ids: "x" * len(ids)
    )
    assert [row.tokens for row in plain] == [row.tokens for row in told]
    assert told[0].text == "x" * 9


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"mirostat_tau": 2.0}, {"top_p": 0.5, "vocab_size": 5}], ids=str
)
def test_without_the_models_own_log_probabilities_all_else_is_the_same(options: dict[str, Any]) -> None:
    told = generate(Causal(), [[1, 2], [3]], max_new_tokens=9, seed=1, logprobs=True, **options)
    plain = generate(Causal(), [[1, 2], [3]], max_new_tokens=9, seed=1, **options)
    assert plain == [dataclasses.replace(row, logprobs=None) for row in told]
    [step] = sample(Causal(), [[1, 2], [3]], max_new_tokens=1, **options)
    assert step.logprobs is None
    assert len(step.processed_logprobs) == 2


def test_gradients_stay_enabled_between_steps_and_are_off_in_the_forward() -> None:
    inside = []

    def forward(ids: Tensor) -> Tensor:
        inside.append(torch.is_grad_enabled())
        return torch.zeros(*ids.shape, 4)

    for _ in sample(forward, [[1]], max_new_tokens=2):
        assert torch.is_grad_enabled()
    assert inside == [False, False]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.8, "top_p": 0.9},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"dry_multiplier": 0.8, "no_repeat_ngram_size": 2},
        {"logit_bias": {1: 1.0}, "vocab_size": 5, "top_logprobs": 2},
        {"processors": lambda row: lambda ids, scores: scores, "vocab_size": 5},
        {"drafter": PromptLookup(2, min_match=1)},
        {"drafter": DraftModel(Causal(), tokens=2), "speculation": "rejection"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_inference_mode_may_begin_and_end_between_steps(options: dict[str, Any]) -> None:
    want = generate(Causal(), [[1, 2], [3]], max_new_tokens=9, seed=0, **options)
    for begins, ends in ((0, 1), (1, 3), (2, 40)):
        steps = sample(Causal(), [[1, 2], [3]], max_new_tokens=9, seed=0, **options)
        tokens: list[list[int]] = [[], []]
        for index in range(40):
            with torch.inference_mode(begins <= index < ends):
                step = next(steps, None)
            if step is None:
                break
            for row, token in zip(step.rows, step.tokens, strict=True):
                tokens[row].append(token)
        assert [tuple(row) for row in tokens] == [row.tokens for row in want]


def test_what_was_prepared_in_inference_mode_is_sampled_outside_of_it() -> None:
    with torch.inference_mode():
        steps = sample(Causal(), [[1, 2, 3], [4]], max_new_tokens=2, seed=0)
        steps.cancel(0)  # the other's tokens have place beside its prompt
    assert [step.rows for step in steps] == [(1,), (1,)]


def test_what_the_forward_raises_comes_through_as_it_is_with_a_note_of_the_step() -> None:
    failure = OSError("disk gone")

    class Failing(Causal):
        def __call__(self, ids: Tensor) -> Tensor:
            if ids.shape[1] == 3:
                raise failure
            return super().__call__(ids)

    steps = sample(Failing(), [[1]], max_new_tokens=9, seed=0)
    before = [next(steps), next(steps)]
    with pytest.raises(OSError, match="disk gone") as raised:
        next(steps)
    assert raised.value is failure
    assert vars(failure)["__notes__"] == ["raised by forward_func in step 2"]
    assert next(steps, None) is None
    [whole] = generate(Causal(), [[1]], max_new_tokens=9, seed=0)
    known = [1, *(step.tokens[0] for step in before)]
    [rest] = generate(Causal(), [known], max_new_tokens=7, seed=0)
    assert (*known[1:], *rest.tokens) == whole.tokens


def test_tensors_and_one_flat_row_are_taken_as_prompts() -> None:
    want = generate(Causal(), [[1, 2, 3]], max_new_tokens=4, seed=0)
    for ids in ([1, 2, 3], torch.tensor([1, 2, 3]), torch.tensor([[1, 2, 3]]), [torch.tensor([1, 2, 3])], ((1, 2, 3),)):
        assert generate(Causal(), ids, max_new_tokens=4, seed=0) == want


def test_all_public_names_are_there() -> None:
    assert all(hasattr(llm_sampler, name) for name in llm_sampler.__all__)
    assert list(itertools.islice(sample(Causal(), [[0]], max_new_tokens=2), 1))
