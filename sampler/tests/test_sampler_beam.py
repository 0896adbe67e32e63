"""Beam search: the best continuations are found, rows are independent, and contradictions are refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import Beam, beam_search

VOCABULARY = 12
TABLE = torch.sin(torch.arange(VOCABULARY**2, dtype=torch.float64) ** 2 * 0.37).view(VOCABULARY, VOCABULARY).float() * 3


def table(ids: Tensor) -> Tensor:
    return TABLE[ids]


def found(beams: list[Beam]) -> list[tuple[tuple[int, ...], float]]:
    return [(beam.tokens, round(beam.score, 4)) for beam in beams]


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_as_many_beams_as_continuations_are_an_exhaustive_search(length_penalty: float) -> None:
    """All sequences of up to three tokens of four, where 0 stops; "never" gives none up that could still win."""
    logits = TABLE[:4, :4]
    logprobs = logits.log_softmax(-1).double()
    scored = {}
    for length in (1, 2, 3):
        for tokens in itertools.product(range(4), repeat=length):
            if 0 not in tokens[:-1] and (length == 3 or tokens[-1] == 0):
                path = itertools.pairwise((2, *tokens))
                scored[tokens] = float(sum(logprobs[a, b] for a, b in path)) / length**length_penalty
    [beams] = beam_search(
        lambda ids: logits[ids],
        [[2]],
        max_new_tokens=3,
        num_beams=64,
        stop_ids=0,
        length_penalty=length_penalty,
        early_stopping="never",
    )
    assert {beam.tokens for beam in beams} == set(scored)
    assert [beam.score for beam in beams] == pytest.approx([scored[beam.tokens] for beam in beams], abs=1e-5)
    assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)
    assert all(beam.finished == ("stop" if beam.tokens[-1] == 0 else "length") for beam in beams)
    assert all(beam.content == tuple(token for token in beam.tokens if token) for beam in beams)


GROUPS: list[tuple[list[int], dict[str, Any], list[tuple[tuple[int, ...], float]]]] = [
    (
        [0],
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "max_new_tokens": 6, "stop_ids": 3},
        [
            ((2, 8, 9, 6, 0, 2), -0.9853),
            ((2, 8, 9, 6, 3), -1.0231),
            ((2, 8, 9, 6, 3), -1.4231),
            ((2, 8, 9, 9, 8, 9), -1.4344),
        ],
    ),
    (
        [5, 7],
        {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0, "max_new_tokens": 5, "stop_ids": 4}
        | {"length_penalty": 0.0},
        [
            ((10, 10, 10, 10, 10), -4.9434),
            ((10, 10, 10, 10, 1), -5.1482),
            ((10, 1, 7, 9, 6), -6.1852),
            ((8, 9, 6, 0, 2), -6.3606),
            ((8, 9, 6, 3, 9), -6.7155),
            ((9, 8, 9, 6, 3), -6.7838),
        ],
    ),
    (
        [2],
        {"num_beams": 6, "num_beam_groups": 2, "diversity_penalty": 0.8, "max_new_tokens": 7, "stop_ids": 1}
        | {"early_stopping": True},
        [
            ((8, 9, 6, 0, 2, 8, 9), -1.0442),
            ((8, 9, 6, 0, 2, 8, 11), -1.0619),
            ((9, 6, 0, 2, 8, 9, 6), -1.0906),
            ((8, 9, 6, 3, 9, 6, 3), -1.0952),
            ((9, 6, 0, 2, 8, 9, 8), -1.2209),
            ((9, 6, 3, 9, 6, 3, 4), -1.2219),
        ],
    ),
    (
        [9],
        {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 2.0, "max_new_tokens": 6, "stop_ids": 10}
        | {"length_penalty": 2.0, "early_stopping": "never"},
        [
            ((8, 9, 6, 3, 9, 6), -0.1812),
            ((6, 3, 9, 6, 3, 9), -0.1846),
            ((9, 6, 3, 9, 6, 3), -0.1973),
            ((6, 0, 2, 8, 11, 5), -0.2478),
        ],
    ),
    (
        [1],
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.3, "max_new_tokens": 4}
        | {"repetition_penalty": 1.3},
        [((7, 9, 6, 3), -1.1024), ((7, 9, 6, 0), -1.1084), ((7, 10, 10, 10), -1.2751), ((7, 10, 10, 1), -1.3417)],
    ),
]


@pytest.mark.parametrize(("prompt", "options", "beams"), GROUPS)
def test_groups_equal_what_transformers_4_49_gave_for_this_table(
    prompt: list[int], options: dict[str, Any], beams: list[tuple[tuple[int, ...], float]]
) -> None:
    """The last transformers with a group beam search of its own, on the same logits."""
    [result] = beam_search(table, [prompt], **options)
    assert found(result) == beams


def test_without_its_groups_a_search_returns_variants_of_one_text() -> None:
    def first_tokens(**options: Any) -> int:
        [beams] = beam_search(table, [[9]], max_new_tokens=6, num_beams=4, length_penalty=0.0, **options)
        return len({beam.tokens[0] for beam in beams})

    assert first_tokens(num_beam_groups=4, diversity_penalty=2.0) > first_tokens()


OPTIONS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 3, "length_penalty": 2.0},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": -0.5},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7},
    {"num_beams": 2, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 2},
]
NEUTRAL = {"num_beam_groups": 1, "diversity_penalty": 0.0, "length_penalty": 1.0, "early_stopping": False}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPTIONS), st.integers(2, 6)), min_size=1, max_size=4), st.data())
def test_a_batch_equals_its_rows_alone_in_any_order(chosen: list[tuple[dict, int]], data: st.DataObject) -> None:
    prompts = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4)) for _ in chosen]
    stops = [data.draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=2)) for _ in chosen]
    names = {name for options, _ in chosen for name in options}

    def of(rows: list[int]) -> list[list[Beam]]:
        each: dict[str, Any] = {name: [chosen[row][0].get(name, NEUTRAL.get(name)) for row in rows] for name in names}
        lengths = [chosen[row][1] for row in rows]
        return beam_search(
            table, [prompts[row] for row in rows], max_new_tokens=lengths, stop_ids=[stops[row] for row in rows], **each
        )

    order = data.draw(st.permutations(range(len(chosen))))
    alone = [of([row])[0] for row in range(len(chosen))]
    assert [found(beams) for beams in of(order)] == [found(alone[row]) for row in order]


def test_a_prompt_goes_through_the_forward_once_before_it_fans_out() -> None:
    shapes = []

    def forward(ids: Tensor) -> Tensor:
        shapes.append(tuple(ids.shape))
        return TABLE[ids]

    beam_search(forward, [[1, 2, 3]], max_new_tokens=3, num_beams=6, num_beam_groups=2, diversity_penalty=1.0)
    assert shapes == [(1, 3), (6, 4), (6, 5)]


def test_last_logits_is_used_where_it_is_there() -> None:
    class LastOnly:
        def __call__(self, ids: Tensor) -> Tensor:
            raise AssertionError("last_logits is there to be used")

        def last_logits(self, ids: Tensor, lengths: Tensor, n: int) -> Tensor:
            return torch.stack([TABLE[row[end - n : end]] for row, end in zip(ids, lengths.tolist(), strict=True)])

    prompts = [[1, 2], [7]]
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3}
    assert beam_search(LastOnly(), prompts, **options) == beam_search(table, prompts, **options)


def test_of_equally_likely_continuations_the_lower_ids_are_followed() -> None:
    [beams] = beam_search(lambda ids: torch.zeros(*ids.shape, 5000), [[0]], max_new_tokens=2, num_beams=3)
    assert [beam.tokens for beam in beams] == [(0, 0), (0, 1), (0, 2)]


def test_raw_logprobs_are_the_models_own_and_the_score_is_what_was_searched_with() -> None:
    [beams] = beam_search(table, [[4]], max_new_tokens=5, num_beams=3, repetition_penalty=1.5, length_penalty=0.0)
    for beam in beams:
        ids = torch.tensor([4, *beam.tokens])
        own = TABLE[ids[:-1]].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        assert beam.logprobs == pytest.approx(own.tolist(), abs=1e-6)
        assert beam.score <= sum(beam.logprobs) + 1e-6


def test_excluded_ids_are_never_taken_and_few_candidates_make_few_beams() -> None:
    [beams] = beam_search(table, [[0]], max_new_tokens=2, num_beams=8, allowed_token_ids=[3, 9])
    assert sorted(beam.tokens for beam in beams) == [(3, 3), (3, 9), (9, 3), (9, 9)]
    with pytest.raises(ValueError, match="row 0, step 0: no token is left"):
        beam_search(table, [[0]], max_new_tokens=2, num_beams=2, bad_words_ids=[[i] for i in range(VOCABULARY)])


def test_a_padded_head_is_never_reached_into() -> None:
    [beams] = beam_search(lambda ids: TABLE[ids % 6], [[0]], max_new_tokens=4, num_beams=6, vocab_size=6)
    assert max(max(beam.tokens) for beam in beams) < 6


def test_likely_stop_ids_leave_the_other_beams_running() -> None:
    """Five stop ids lead at every step, and stopping early is worth less than going on."""
    logits = torch.tensor([0.0, 4.0, 4.0, 4.0, 4.0, 4.0, 0.1])
    [beams] = beam_search(
        lambda ids: logits.expand(*ids.shape, -1),
        [[0]],
        max_new_tokens=3,
        num_beams=2,
        stop_ids=[1, 2, 3, 4, 5],
        length_penalty=16,
        early_stopping="never",
    )
    assert [beam.tokens for beam in beams] == [(6, 6, 1), (6, 6, 2)]


def test_stopping_early_ends_the_search_with_the_first_full_set() -> None:
    shapes = []

    def forward(ids: Tensor) -> Tensor:
        shapes.append(tuple(ids.shape))
        return torch.tensor([0.0, 4.0, 3.9, 0.1]).expand(*ids.shape, -1)

    options: dict[str, Any] = {"max_new_tokens": 9, "num_beams": 2, "stop_ids": 1, "length_penalty": 2.0}
    [beams] = beam_search(forward, [[0]], early_stopping=True, **options)
    assert [beam.tokens for beam in beams] == [(2, 1), (1,)]
    assert shapes == [(1, 1), (2, 2)]
    [beams] = beam_search(forward, [[0]], early_stopping=False, **options)
    assert [len(beam.tokens) for beam in beams] == [9, 9]


def test_min_new_tokens_keeps_the_stop_ids_away() -> None:
    [beams] = beam_search(table, [[0]], max_new_tokens=6, num_beams=4, stop_ids=[2, 8], min_new_tokens=4)
    assert all(len(beam.tokens) >= 5 or not {2, 8} & set(beam.tokens) for beam in beams)
    assert any(beam.finished == "stop" for beam in beams)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2.0}, "num_beams is 2.0"),
        ({"num_beams": None}, "num_beams is None"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "num_beams is 4, which num_beam_groups, 3"),
        ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups is 2 and diversity_penalty 0.0"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "num_beam_groups is 1 and diversity_penalty 1.0"),
        ({"diversity_penalty": -1.0}, "diversity_penalty is -1.0"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
        ({"length_penalty": 99}, "length_penalty is 99"),
        ({"early_stopping": "always"}, "early_stopping is 'always'; it must be True, False or 'never'"),
        ({"early_stopping": [True, False]}, "early_stopping has 2 values for 1 rows"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop_ids": 12}, "stop_ids: row 0 holds the id 12, and the vocabulary has 12"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"max_new_tokens": 2, "num_beams": 2}
    with pytest.raises(ValueError, match=message):
        beam_search(table, [[1]], **defaults | options)


@pytest.mark.parametrize(
    "name", ["temperature", "top_k", "top_p", "seed", "mirostat_tau", "xtc_probability", "stop_strings"]
)
def test_settings_of_drawing_contradict_a_beam_search(name: str) -> None:
    options: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=f"beam_search takes no {name}; it draws nothing"):
        beam_search(table, [[1]], max_new_tokens=2, num_beams=2, **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "row 1, step 0: the logits contain nan"),
        (math.inf, "contain inf"),
        (-math.inf, "all logits are -inf"),
    ],
)
def test_logits_that_cannot_be_searched_are_named_with_row_and_step(value: float, message: str) -> None:
    def forward(ids: Tensor) -> Tensor:
        logits = TABLE[ids].clone()
        logits[1:] = value
        return logits

    with pytest.raises(ValueError, match=message):
        beam_search(forward, [[1], [2]], max_new_tokens=2, num_beams=2)
