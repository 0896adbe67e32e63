"""Scores are the sums of the log-probabilities that one naive pass per continuation gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import Score, multiple_choice, score

VOCABULARY = 5
TABLE = torch.randn(23, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2


class Forward:
    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self.rows += len(ids)
        return TABLE[((ids + 1) * torch.arange(1, ids.shape[1] + 1)).cumsum(-1) % 23]


class LastOnly(Forward):
    def last_logits(self, ids: Tensor, lengths: Tensor, n: int) -> Tensor:
        assert n <= int(lengths.min())
        return torch.stack(
            [row[end - n : end] for row, end in zip(Forward.__call__(self, ids), lengths.tolist(), strict=True)]
        )


def naive(context: list[int], continuation: list[int]) -> list[float]:
    ids = torch.tensor([context + continuation])
    logprobs = Forward()(ids).log_softmax(-1)[0]
    return [float(logprobs[len(context) - 1 + i, token]) for i, token in enumerate(continuation)]


ids = st.integers(0, VOCABULARY - 1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(ids, min_size=1, max_size=4),
    st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(1, 4),
    st.sampled_from([Forward, LastOnly]),
)
def test_scores_equal_naive_scores(context: list[int], continuations: list, size: int, kind: type[Forward]) -> None:
    results = score(kind(), context, continuations, batch_size=size)
    for result, continuation in zip(results, continuations, strict=True):
        assert result.logprobs == pytest.approx(naive(context, continuation), abs=1e-5)
        assert result.sum == pytest.approx(sum(result.logprobs))
        assert result.mean == pytest.approx(result.sum / len(continuation))


def test_choices_of_one_token_cost_one_row() -> None:
    forward = Forward()
    score(forward, [1, 2], [[token] for token in range(VOCABULARY)])
    assert forward.rows == 1


def test_a_prefix_of_another_continuation_costs_no_row() -> None:
    forward = Forward()
    score(forward, [1], [[1], [1, 2], [1, 2, 3], [4, 4, 4], [4, 4, 0]])
    assert forward.rows == 2


def test_is_greedy_says_whether_argmax_would_write_it() -> None:
    first = int(Forward()(torch.tensor([[1]]))[0, -1].argmax())
    second = int(Forward()(torch.tensor([[1, first]]))[0, -1].argmax())
    assert [s.is_greedy for s in score(Forward(), [1], [[first, second], [first, (second + 1) % 5]])] == [True, False]


def test_choices_compare_by_sum_or_mean_and_ties_go_to_the_first() -> None:
    def evenly(ids):
        return torch.zeros(*ids.shape, 4)

    assert multiple_choice(evenly, [0], [[1, 2], [3], [2]]).index == 1
    assert multiple_choice(evenly, [0], [[1, 2], [3]], by="mean").index == 0
    answer = multiple_choice(evenly, [0], [[3], [2]])
    assert answer.probabilities == pytest.approx((0.5, 0.5))
    assert answer.scores[0] == Score((pytest.approx(-math.log(4)),), True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("context", "continuations", "options", "message"),
    [
        ([], [[1]], {}, "context"),
        ([[1], [2]], [[1]], {}, "context holds 2 rows"),
        ([1], [], {}, "continuations holds no row"),
        ([1], [1, 2], {}, "one flat sequence"),
        ([1], [[1], []], {}, "continuations: row 1 is empty"),
        ([1], [[1], [5]], {}, "continuations: row 1 holds the id 5"),
        ([1], [[1], [-1]], {}, "continuations: row 1 holds the id -1"),
        ([1], [[1]], {"batch_size": 0}, "batch_size is 0"),
        ([1], [[1]], {"by": "length"}, "by is 'length'"),
    ],
)
def test_bad_arguments_name_their_place(context: list, continuations: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiple_choice(Forward(), context, continuations, **options)


def test_logits_that_are_not_finite_name_the_continuation() -> None:
    with pytest.raises(ValueError, match="row 0 met logits"):
        score(lambda ids: torch.full((*ids.shape, 4), math.nan), [1], [[1]])


def test_choices_that_are_all_impossible_are_an_error() -> None:
    with pytest.raises(ValueError, match="every choice has probability 0"):
        multiple_choice(lambda ids: torch.tensor([0.0, -math.inf]).expand(*ids.shape, 2), [0], [[1]])
