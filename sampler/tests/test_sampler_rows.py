"""A row among others is the row alone, bit for bit: exact ties show any sum that depends on who else is there."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import HUGGING_FACE_ORDER, DraftModel, _sampler, _truncate, generate, sample
from llm_sampler._row import History, Row, Table
from llm_sampler._scores import Scores
from llm_sampler._stages import STAGES

SIZES = [23, 5003]  # few candidates are sorted, many are counted into bins
SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_n_sigma": {"top_n_sigma": 1.0},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.05},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05},
    "eta_cutoff": {"eta_cutoff": 0.2},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.125},
    "mirostat": {"mirostat_tau": 1.5, "mirostat_eta": 0.5},
    "repetition_penalty": {"repetition_penalty": 2.0},
}


def whole_logits(count: int, size: int, seed: int) -> Tensor:
    """Rows of whole numbers times log 2, so that probabilities are in simple ratios; some rows flat, some peaked."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.randint(1, 12, (count, 1), generator=g)
    logits = (torch.randn(count, size, generator=g) * spread).round() * math.log(2)
    logits[torch.rand(count, size, generator=g) < torch.rand(count, 1, generator=g)] = -math.inf
    logits[:, 1] = 0.0
    return logits


def drawn(logits: Tensor, rows: list[int], options: dict[str, Any]) -> list:
    """Three tokens of each row; its prompt tells the model which logits are its own."""
    own = [logits.roll(shift, dims=1) for shift in range(3)]

    def forward(ids: Tensor) -> Tensor:
        return own[ids.shape[1] - 1][ids[:, :1]].expand(-1, ids.shape[1], -1)

    prompts = [[row] for row in rows]
    return generate(forward, prompts, max_new_tokens=3, seed=[row + 7 for row in rows], top_logprobs=3, **options)


def differences(logits: Tensor, options: dict[str, Any], order: Any = None) -> list[int]:
    rows = list(range(len(logits)))
    together = drawn(logits, rows, {**options, "order": order})
    alone = [drawn(logits, [row], {**options, "order": order})[0] for row in rows]
    return [
        row
        for row in rows
        if (together[row].tokens, together[row].processed_logprobs, together[row].top_processed_logprobs)
        != (alone[row].tokens, alone[row].processed_logprobs, alone[row].top_processed_logprobs)
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("after", [{}, {"top_k": 12}, {"min_p": 2**-7}], ids=["alone", "after top_k", "after min_p"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_stage_gives_a_row_the_same_whoever_is_beside_it(name: str, after: dict[str, Any], size: int) -> None:
    order = [*after, *(stage for stage in HUGGING_FACE_ORDER if stage == name and stage not in after)]
    for seed in range(4):
        assert differences(whole_logits(6, size, seed), {**SETTINGS[name], **after}, order) == []


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from(SIZES),
    st.lists(st.sampled_from(sorted(SETTINGS)), min_size=2, max_size=5, unique=True),
    st.sampled_from([None, "llama.cpp", "as listed"]),
)
def test_so_does_any_chain_of_stages(seed: int, size: int, names: list[str], order: str | None) -> None:
    options = {key: value for name in names for key, value in SETTINGS[name].items()}
    assert differences(whole_logits(5, size, seed), options, names if order == "as listed" else order) == []


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1 << 30), st.data())
def test_so_do_rows_with_settings_of_their_own(seed: int, data: st.DataObject) -> None:
    logits = whole_logits(5, 5003, seed)
    choices = [data.draw(st.sampled_from([{}, *SETTINGS.values()])) for _ in logits]
    each = {key: [choice.get(key) for choice in choices] for key in {key for choice in choices for key in choice}}
    together = drawn(logits, list(range(5)), each)
    for row in range(5):
        [alone] = drawn(logits, [row], {key: values[row] for key, values in each.items()})
        assert (together[row].tokens, together[row].processed_logprobs) == (alone.tokens, alone.processed_logprobs)


@pytest.mark.parametrize(
    "name", ["top_n_sigma", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "xtc", "mirostat"]
)
def test_what_is_masked_beside_a_rows_candidates_changes_nothing_at_exact_ties(name: str) -> None:
    """The same candidates alone, between masked ones, and in front of many of them, which is where neighbours lead."""
    g = torch.Generator().manual_seed(5)
    for trial in range(150):
        size = int(torch.randint(2, 90, (1,), generator=g))
        values = torch.randint(0, int(torch.randint(1, 5, (1,), generator=g)), (1, size), generator=g) * (
            math.log(2) if trial % 2 else 0.3
        )
        share = values.double().softmax(-1)[0].sort(descending=True).values
        tie = min(float(share[: int(torch.randint(1, size + 1, (1,), generator=g))].sum()), 1.0)
        one = min(float(share[int(torch.randint(0, size, (1,), generator=g))]), 0.999)
        setting = {"top_n_sigma": [1.0], "top_p": [tie], "typical_p": [tie], "xtc": [1.0]}.get(name, [one])
        survivors = []
        for width in (size, size + 5, 3 * size, 5003, 70_001):
            places = torch.randperm(width, generator=g)[:size].sort().values if width < 5003 else torch.arange(size)
            spread = torch.full((1, width), -math.inf)
            spread[0, places] = values[0]
            survivors.append(survivors_of(name, spread, setting, one)[places].tolist())
        assert survivors == [survivors[0]] * len(survivors)


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"top_k": 9, "repetition_penalty": 2.0}], ids=str)
def test_rows_that_are_worked_on_part_by_part_are_those_alone(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sampler, "_PART", 2 * 23)  # three rows at once
    assert differences(whole_logits(11, 23, seed=0), options) == []


@pytest.mark.parametrize("size", [5003, 8192])
def test_the_last_id_is_one_candidate_where_a_neighbour_keeps_all_of_its_own(size: int) -> None:
    logits = torch.zeros(2, size)
    logits[0, 256:384] = logits[0, 512:640] = 9.0  # two whole blocks of candidates
    logits[1, size - 1], logits[1, 70] = 20.0, 19.0
    options = {"top_k": 2, "repetition_penalty": 1.1}
    assert differences(logits, options, ["top_k", "repetition_penalty"]) == []


def test_drafts_of_the_last_id_are_taken_as_often_where_a_neighbour_keeps_all_of_its_own() -> None:
    size, count = 5003, 40
    logits = torch.randn(size, generator=torch.Generator().manual_seed(0))
    logits[size - 1] = logits[300] = 14.0
    guess = logits.clone()
    guess[size - 1] = 16.0

    def tokens(first: list[list[int]], allowed: list, seeds: list[int]) -> list[tuple[int, ...]]:
        rows = generate(
            lambda ids: logits.expand(*ids.shape, size),
            first + [[1]] * count,
            seed=seeds,
            allowed_token_ids=allowed,
            max_new_tokens=3,
            min_p=0.001,
            drafter=DraftModel(lambda ids: guess.expand(*ids.shape, size), tokens=1),
            speculation="rejection",
        )
        return [row.tokens for row in rows][len(first) :]

    alone = tokens([], [None] * count, list(range(count)))
    assert tokens([[0]], [range(256), *[None] * count], [99, *range(count)]) == alone


def test_a_tie_is_cut_at_the_same_place_beside_a_row_with_a_processor() -> None:
    """That row needs all columns of a padded head, and the others get them too."""
    logits = torch.full((65_600,), -math.inf)
    logits[:5] = torch.tensor([0.0, -0.3, -0.7, -1.1, -1.3])
    share = 0.6123590441464318  # the sum of the first two, but for what a probability is rounded to

    def kept(rows: list[list[int]]) -> list[int]:
        [first, *_] = generate(
            lambda ids: logits.expand(*ids.shape, -1),
            rows,
            max_new_tokens=1,
            top_p=share,
            vocab_size=65_000,
            processors={1: lambda ids, scores: scores}.get,
            top_logprobs=5,
            seed=0,
        )
        assert first.top_processed_logprobs is not None
        return [token for token, _ in first.top_processed_logprobs[0]]

    assert kept([[0], [0]]) == kept([[0]])


@pytest.mark.parametrize("name", ["epsilon_cutoff", "eta_cutoff", "mirostat"])
def test_exact_sums_are_for_candidates_near_the_threshold_and_change_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: list[int] = []
    weights = _truncate._weights
    monkeypatch.setattr(_truncate, "_weights", lambda scores: exact.append(1) or weights(scores))
    g = torch.Generator().manual_seed(1)
    random = [torch.randn(1, 5003, generator=g) * 4 for _ in range(40)]
    ties = [whole_logits(1, 5003, seed)[:1] for seed in range(40)]
    for cases, most in ((random, 8), (ties, 40)):
        exact.clear()
        for values in cases:
            one = float(values.double().softmax(-1).flatten().topk(9).values[8])  # exactly as likely as one of them
            one = one if cases is ties else 0.9 * one
            kept = survivors_of(name, values, [one], one)
            with monkeypatch.context() as always:
                always.setattr(_truncate, "_NEAR", math.inf)
                want = survivors_of(name, values, [one], one)
            exact.pop()
            assert torch.equal(kept, want)
        assert len(exact) <= most


@pytest.mark.parametrize("vocabulary", [128_256, 262_144])
def test_thresholds_in_single_precision_are_nearer_to_the_exact_ones_than_what_is_taken_as_near(
    vocabulary: int,
) -> None:
    """One likely token above many equal ones: there the entropy, and with it eta's threshold, is rounded most."""
    for step in range(41):
        values = torch.full((1, vocabulary), 2 - math.log(vocabulary) - step / 10)
        values[0, 0] = 0.0
        scores = Scores(values, None, vocabulary)
        weights = _truncate._weights(scores)
        exact_total, exact_entropy = _truncate._log_total(scores, weights), _truncate._entropy(weights)
        log_total, entropy = _truncate._roughly(values, values.amax(-1, keepdim=True))
        assert abs(float(log_total - exact_total)) < _truncate._NEAR / 2
        assert abs(float((log_total - entropy()) - (exact_total - exact_entropy))) < _truncate._NEAR / 2


def survivors_of(name: str, values: Tensor, setting: list, threshold: float) -> Tensor:
    row = Row(0, [0], 1, end=9, shortest=0, key=0, stops=frozenset(), mirostat_tau=1.0)
    row.mu = -math.log2(threshold)
    second = {"xtc": [[threshold]], "mirostat": [[0.1]]}.get(name, [])
    cpu = torch.device("cpu")
    stage = STAGES[name].build(setting, *second, device=cpu)
    # of a vocabulary of 70,001: what is beyond these columns was dropped before
    scores = Scores(values, torch.arange(values.shape[1]).unsqueeze(0), 70_001)
    out = stage(scores, History(Table([row], 0, cpu), [row], cpu))
    return out.widened().values[0, : values.shape[1]].isfinite()


def test_what_settings_take_grows_neither_with_the_vocabulary_nor_with_the_groups_of_rows_that_came_before() -> None:
    rows, vocabulary = 24, 32_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)).expand(rows, 1, vocabulary)

    def held(**options: Any) -> Tensor:
        """Bytes of all tensors at the first and the last steps, when rows finish one after the other."""
        steps = sample(
            lambda ids: logits[: len(ids)].expand(-1, ids.shape[1], -1),
            [[0]] * rows,
            max_new_tokens=range(2, rows + 2),
            seed=0,
            **options,
        )
        found = []
        for step in steps:
            if len(step.rows) in (1, rows):
                gc.collect()
                found.append(sum(known.nbytes for known in gc.get_objects() if type(known) is Tensor))
        return torch.tensor(found)

    ids = list(range(0, vocabulary, 400))
    biased: dict[str, Any] = {"logit_bias": dict.fromkeys(ids, 1.0), "bad_words_ids": [[token + 1] for token in ids]}
    of_a_mask, plain = rows * vocabulary, held()
    for options in ({"allowed_token_ids": ids}, {"allowed_token_ids": [[row, *ids] for row in range(rows)]}, biased):
        assert bool((held(**options) - plain < of_a_mask / 2).all())
