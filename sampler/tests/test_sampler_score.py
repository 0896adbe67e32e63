"""Scores are the sums of the log-probabilities that one naive pass per continuation gives, in fewer rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import Score, multiple_choice, score

VOCABULARY = 5
TABLE = torch.randn(23, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2


class Forward:
    """A causal model: the logits at a position depend on all ids up to it. Counts what it computes."""

    def __init__(self) -> None:
        self.rows = 0
        self.logits = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self.rows += len(ids)
        self.logits += ids.numel()
        return TABLE[((ids + 1) * torch.arange(1, ids.shape[1] + 1)).cumsum(-1) % 23]


class LastOnly(Forward):
    def last_logits(self, ids: Tensor, lengths: Tensor, n: int) -> Tensor:
        assert n <= int(lengths.min())
        logits = Forward.__call__(self, ids)
        self.logits += len(ids) * n - ids.numel()
        return torch.stack([row[end - n : end] for row, end in zip(logits, lengths.tolist(), strict=True)])


class Gathering(LastOnly):
    """As a remote model does it: log-probabilities travel, logits do not."""

    def gather_logprobs(self, ids: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = LastOnly.last_logits(self, ids, lengths, targets.shape[1])
        return logits.log_softmax(-1).gather(-1, targets), logits.argmax(-1)

    def last_logits(self, ids: Tensor, lengths: Tensor, n: int) -> Tensor:
        raise AssertionError("asked for logits where it offers to gather")


def naive(context: list[int], continuation: list[int]) -> list[float]:
    ids = torch.tensor([context + continuation])
    logprobs = Forward()(ids).log_softmax(-1)[0]
    return [float(logprobs[len(context) - 1 + i, token]) for i, token in enumerate(continuation)]


def greedy(context: list[int], length: int) -> list[int]:
    ids = list(context)
    for _ in range(length):
        ids.append(int(Forward()(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(context) :]


def evenly(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, 4)


token = st.integers(0, VOCABULARY - 1)
contexts = st.lists(token, min_size=1, max_size=4)
choices = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=8)
kinds = st.sampled_from([Forward, LastOnly, Gathering])


@settings(max_examples=100, deadline=None)
@given(contexts, choices, st.integers(1, 4), kinds)
def test_scores_equal_naive_scores(context: list[int], continuations: list, size: int, kind: type[Forward]) -> None:
    results = score(kind(), context, continuations, batch_size=size)
    for result, continuation in zip(results, continuations, strict=True):
        assert result.logprobs == pytest.approx(naive(context, continuation), abs=1e-5)
        assert result.sum == pytest.approx(sum(result.logprobs))
        assert result.mean == pytest.approx(result.sum / len(continuation))
        assert result.is_greedy == (continuation == greedy(context, len(continuation)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(contexts, choices), min_size=1, max_size=5), st.integers(1, 5), kinds)
def test_many_questions_at_once_score_as_each_alone(questions: list, size: int, kind: type[Forward]) -> None:
    options: dict[str, Any] = dict(end_id=1, baseline=[0], batch_size=size)
    together = score(kind(), [context for context, _ in questions], [own for _, own in questions], **options)
    for (context, own), results in zip(questions, together, strict=True):
        for continuation, result in zip(own, results, strict=True):
            assert result.logprobs == pytest.approx(naive(context, [*continuation, 1]), abs=1e-5)
            assert result.baseline == pytest.approx(sum(naive([0], [*continuation, 1])), abs=1e-5)
            assert result.pmi == pytest.approx(result.sum - result.baseline)  # type: ignore[operator]


def test_choices_of_one_token_cost_one_row() -> None:
    forward = Forward()
    score(forward, [1, 2], [[token] for token in range(VOCABULARY)])
    assert forward.rows == 1


def test_a_prefix_of_another_continuation_costs_no_row() -> None:
    forward = Forward()
    score(forward, [1], [[1], [1, 2], [1, 2, 3], [4, 4, 4], [4, 4, 0]])
    assert forward.rows == 2


def test_the_same_sequence_in_many_questions_is_computed_once() -> None:
    forward = Forward()
    score(forward, [[1, 2]] * 9 + [[1, 2, 3]], [[[1], [2]]] * 10)
    assert forward.rows == 1


def test_the_baseline_of_the_same_choices_is_computed_once_for_all_questions() -> None:
    forward = Forward()
    score(forward, [[1, q] for q in range(5)], [[[3, 1], [3, 2]]] * 5, baseline=[4])
    assert forward.rows == 5 + 1


def test_logits_are_asked_for_at_the_continuations_only() -> None:
    forward = LastOnly()
    score(forward, [[1] * 50, [2] * 40], [[[1, 2], [3, 4]], [[0], [3]]])
    assert forward.rows == 3
    assert forward.logits == 3 * 2
    forward = LastOnly()
    score(forward, [[0] + [1] * 300], [[[1], [2]]], baseline=[0])
    assert forward.logits == 2, "the one position of the baseline is a row of its own, not 300 logits of the context's"


def test_one_long_continuation_does_not_make_the_short_ones_pay_for_its_logits() -> None:
    forward = LastOnly()
    score(forward, [1] * 400, [[2] * 400] + [[token, token] for token in range(VOCABULARY)] * 6)
    assert forward.logits < 2 * (400 + VOCABULARY * 2) + 2 * 256


def test_choices_compare_by_what_is_asked_for_and_ties_go_to_the_first() -> None:
    assert multiple_choice(evenly, [0], [[1, 2], [3], [2]]).index == 1
    assert multiple_choice(evenly, [0], [[1, 2], [3]], by="mean").index == 0
    answer = multiple_choice(evenly, [0], [[3], [0]])
    assert answer.probabilities == pytest.approx((0.5, 0.5))
    assert answer.scores[0] == Score((pytest.approx(-math.log(4)),), False)  # type: ignore[arg-type]
    assert answer.scores[1].is_greedy, "of equals greedy sampling takes the lowest id"


def test_many_questions_get_an_answer_each() -> None:
    after = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]])
    answers = multiple_choice(lambda ids: after[ids], [[0], [1]], [[[2], [1]], [[2], [1]]])
    assert [answer.index for answer in answers] == [1, 0]


def test_pmi_takes_away_what_a_choice_has_without_the_question() -> None:
    after = torch.tensor([[0.0, 3.0, 2.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])  # 1 is likely after anything
    assert multiple_choice(lambda ids: after[ids], [0], [[1], [2]]).index == 0
    assert multiple_choice(lambda ids: after[ids], [0], [[1], [2]], by="pmi", baseline=[1]).index == 1


def test_with_an_end_token_a_choice_that_begins_another_need_not_win() -> None:
    end = 3
    after = torch.tensor([[0.0, 4.0, 0.0, 0.0], [0.0, 0.0, 6.0, 0.0], [0.0, 0.0, 0.0, 6.0], [0.0, 0.0, 0.0, 0.0]])
    short, long = [1], [1, 2]
    assert multiple_choice(lambda ids: after[ids], [0], [short, long]).index == 0
    assert multiple_choice(lambda ids: after[ids], [0], [short, long], end_id=end).index == 1


# Text


def letters(text: str) -> list[int]:
    return [" abé".index(letter) for letter in text]


def test_text_is_compared_per_character_or_byte_without_its_leading_space() -> None:
    two, three = score(evenly, "a", [" aa", " éa"], encode=letters)
    assert two.sum == pytest.approx(-3 * math.log(4))
    assert two.per_character == pytest.approx(two.sum / 2)
    assert three.per_character == pytest.approx(three.sum / 2)
    assert three.per_byte == pytest.approx(three.sum / 3)
    assert multiple_choice(evenly, "a", [" ab", " éa"], by="per_byte", encode=letters).index == 1


def test_text_scores_as_its_ids() -> None:
    by_text = score(Forward(), ["ab", "b"], [["a", "bb"], [" é"]], encode=letters, baseline=" ")
    by_ids = score(
        Forward(),
        [letters("ab"), letters("b")],
        [[letters("a"), letters("bb")], [letters(" é")]],
        baseline=letters(" "),
    )
    for texts, ids in zip(by_text, by_ids, strict=True):
        assert [(t.logprobs, t.baseline) for t in texts] == [(i.logprobs, i.baseline) for i in ids]


# What can be wrong


@pytest.mark.parametrize(
    ("context", "continuations", "options", "message"),
    [
        ([], [[1]], {}, "^context is empty; it needs at least one token"),
        ([[1], [2]], [[1]], {}, "2 contexts and 1 sequences"),
        ([[1], []], [[[1]], [[1]]], {}, "question 1: context is empty; it needs at least one token"),
        ([1], [], {}, "continuations holds no row"),
        ([[1], [2]], [[[1]], []], {}, "question 1: continuations holds no row"),
        ([1], [1, 2], {}, "one flat sequence"),
        ([1], [[1], []], {}, "continuations: row 1 is empty"),
        ([1], [[1], [5]], {}, "continuations: row 1 holds the id 5 at position 0"),
        ([1], [[1], [2, -1]], {}, "continuations: row 1 holds the id -1"),
        ([[1], [2]], [[[1]], [[1], [2, 7]]], {}, "question 1: continuations: row 1 holds the id 7 at position 1"),
        ([1], [[1]], {"batch_size": 0}, "batch_size is 0"),
        ([1], [[1]], {"by": "length"}, "by is 'length'"),
        ([1], [[1]], {"by": "pmi"}, "compares with a baseline"),
        ([1], [[1]], {"by": "pmi", "baseline": []}, "baseline is empty; it needs at least one token"),
        ([1], [[1]], {"by": "pmi", "baseline": [[1], [2]]}, "baseline holds 2 rows; one is needed"),
        ([1], (row for row in [[1], [5]]), {}, "continuations: row 1 holds the id 5 at position 0"),
        ([1], [[1]], {"by": "per_byte"}, "encode="),
        ([1], [[1]], {"end_id": -1}, "end_id is -1"),
        ([1], [[1]], {"begin_ids": [0]}, "begin_ids go before text"),
        ("a", ["b"], {}, "give encode="),
        ("a", "bb", {"encode": letters}, "continuations is one text; give a sequence"),
        (["a", "b"], [["a"], "bb"], {"encode": letters}, "question 1: continuations is one text; give a sequence"),
        (["a", "b"], [["a"], ["b", ""]], {"encode": letters}, "question 1: continuations: row 1 is empty"),
        ("", ["b"], {"encode": letters}, "begin_ids"),
        ("a", ["b"], {"encode": letters, "boundary": "loose"}, "boundary is 'loose'"),
        ("a", ["b", " "], {"encode": letters, "by": "per_byte"}, "nothing to count"),
    ],
)
def test_bad_arguments_name_their_place(context: list, continuations: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiple_choice(Forward(), context, continuations, **options)


def test_questions_and_continuations_may_be_generated() -> None:
    expected = [score(Forward(), [1], [[1], [2, 3]]), score(Forward(), [2], [[4]])]
    assert score(Forward(), [1], (ids for ids in [[1], [2, 3]])) == expected[0]
    questions = lambda: [(ids for ids in [[1], [2, 3]]), (ids for ids in [[4]])]  # noqa: E731
    assert score(Forward(), (ids for ids in [[1], [2]]), (each for each in questions())) == expected
    assert score(Forward(), "a", (text for text in ["b", "bb"]), encode=letters) == score(
        Forward(), "a", ["b", "bb"], encode=letters
    )
    answers = multiple_choice(Forward(), (ids for ids in [[1], [2]]), questions())
    assert [list(answer.scores) for answer in answers] == expected


def test_ids_and_text_are_not_mixed() -> None:
    with pytest.raises(TypeError, match="continuations are text, and the context is ids"):
        score(Forward(), [1], ["b"], encode=letters)
    with pytest.raises(TypeError, match="row 0 is list"):
        score(Forward(), "a", [[1]], encode=letters)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_cannot_be_scored_name_question_continuation_and_token(wrong: float) -> None:
    def forward(ids: Tensor) -> Tensor:
        logits = evenly(ids)
        logits[ids == 3] = wrong
        return logits

    with pytest.raises(ValueError, match="question 1: continuations: row 1 met logits that are NaN.* for its token 1"):
        score(forward, [[0], [1]], [[[1], [2]], [[1], [3, 0]]])


def test_a_forward_that_gathers_the_wrong_shape_is_named() -> None:
    class Wrong(Forward):
        def gather_logprobs(self, ids: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(3), torch.zeros(3)

    with pytest.raises(ValueError, match="gather_logprobs returned"):
        score(Wrong(), [1], [[1]])


def test_ids_beyond_a_known_vocabulary_are_named_before_anything_runs() -> None:
    class Sized(Forward):
        vocab_size = VOCABULARY

    forward = Sized()
    with pytest.raises(ValueError, match="row 0, its context holds the id 9 at position 1"):
        score(forward, [1, 9], [[1]])
    assert forward.rows == 0


def test_choices_that_are_all_impossible_are_an_error() -> None:
    with pytest.raises(ValueError, match="every choice has probability 0"):
        multiple_choice(lambda ids: torch.tensor([0.0, -math.inf]).expand(*ids.shape, 2), [0], [[1]])


def test_pmi_is_minus_infinity_for_what_cannot_follow_and_refused_where_the_baseline_excludes_it() -> None:
    after = torch.tensor([[0.0, -math.inf, 1.0, 0.0], [0.0, 0.0, 0.0, -math.inf], [0.0] * 4, [0.0] * 4])
    forward = lambda ids: after[ids]  # noqa: E731
    scores = score(forward, [1], [[1], [2], [3]], baseline=[0])
    assert scores[1].pmi == pytest.approx(scores[1].sum - float(after[0].log_softmax(-1)[2]))
    assert scores[2].pmi == -math.inf
    assert Score((-math.inf,), False, baseline=-math.inf).pmi == -math.inf
    with pytest.raises(ValueError, match="pmi is not defined: .* probability 0 after the baseline; take another"):
        _ = scores[0].pmi
    answer = multiple_choice(forward, [1], [[2], [3]], by="pmi", baseline=[0])
    assert (answer.index, answer.probabilities) == (0, (1.0, 0.0))
    with pytest.raises(ValueError, match="question 1: choices: row 2: pmi is not defined"):
        multiple_choice(forward, [[2], [1]], [[[2]], [[2], [3], [1]]], by="pmi", baseline=[0])


def test_what_a_forward_raises_while_it_scores_comes_through_with_a_note_of_what_was_scored() -> None:
    class Gathers:
        def __call__(self, ids: Tensor) -> Tensor:
            raise AssertionError("gather_logprobs is there to be used")

        def gather_logprobs(self, ids: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            raise IndexError("no such row") if int(ids.max()) > 6 else OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as raised:
        score(Gathers(), [1], [[2], [3]])
    assert vars(raised.value)["__notes__"] == [
        "raised by forward_func.gather_logprobs in continuations: row 0 and 1 more"
    ]
    with pytest.raises(IndexError, match="gather_logprobs raised IndexError: no such row. The largest id .* is 7"):
        score(Gathers(), [7], [[2], [3]])


@pytest.mark.parametrize(
    ("context", "continuations", "message"),
    [
        (5, [[1]], "context has to be token ids or text, or a sequence of these; it is 5"),
        (None, [[1]], "context has to be .* it is None"),
        ([0], None, "continuations has to be .* it is None"),
        ([[0], [1]], [[[1]], 3], "question 1: continuations has to be .* it is 3"),
    ],
)
def test_what_is_no_sequence_is_named(context, continuations, message):
    with pytest.raises(TypeError, match=message):
        score(Forward(), context, continuations)


def test_ids_may_come_as_anything_that_gives_them_one_by_one():
    expected = score(Forward(), [0, 3], [[1, 2], [4]])
    assert score(Forward(), {0: "a", 3: "b"}.keys(), iter([[1, 2], [4]])) == expected
