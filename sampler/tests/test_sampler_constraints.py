"""Constraints: what they allow, that rows do not share them, and what ends a row."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import choices, generate, regex, sample

VOCABULARY = 6
TABLE = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2))
words = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6, unique=True)


def table(ids: Tensor) -> Tensor:
    return TABLE[ids]


@settings(max_examples=60, deadline=None)
@given(words, st.integers(0, 5))
def test_every_row_is_one_of_the_choices(options: list[tuple[int, ...]], seed: int) -> None:
    rows = generate(table, [[0]] * 6, max_new_tokens=5, seed=seed, processors=choices(options, end_id=5), stop_ids=5)
    for row in rows:
        assert row.finished == "stop"
        assert row.content in options


def test_choices_are_drawn_with_the_models_own_probabilities_among_what_is_allowed() -> None:
    options = [(1, 2), (1, 3), (4,)]
    rows = generate(table, [[0]] * 4000, max_new_tokens=5, seed=0, processors=choices(options))
    assert {row.finished for row in rows} == {"complete"}
    first = TABLE[0, [1, 4]].softmax(0)
    second = TABLE[1, [2, 3]].softmax(0)
    expected = dict(zip(options, [*(first[0] * second).tolist(), float(first[1])], strict=True))
    seen = Counter(row.tokens for row in rows)
    assert set(seen) == set(options)
    for option, p in expected.items():
        assert seen[option] / 4000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000))
    for row in rows[:20]:
        assert math.exp(sum(row.processed_logprobs)) == pytest.approx(expected[row.tokens], rel=1e-5)


def test_rows_may_have_constraints_of_their_own_or_none() -> None:
    factories = [choices([[1, 1, 1]]), None, choices([[2, 2]])]
    rows = generate(
        table, [[0], [0], [0]], max_new_tokens=4, seed=0, processors=lambda row: factories[row] and factories[row](row)
    )
    assert [row.tokens for row in rows[::2]] == [(1, 1, 1), (2, 2)]
    assert [row.finished for row in rows] == ["complete", "length", "complete"]


def test_a_choice_that_is_complete_ends_its_row_before_min_new_tokens() -> None:
    [row] = generate(table, [[0]], max_new_tokens=9, min_new_tokens=5, seed=0, processors=choices([[1, 2]]))
    assert (row.tokens, row.finished) == ((1, 2), "complete")


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "choices holds none"),
        ([[1], []], r"1 is \(\)"),
        ([[1], [-2]], r"1 is \(-2,\)"),
        ([["a"]], r"0 is \('a',\)"),
        ([1, 2], "0 is 1; a choice is one or more ids"),
        (5, "choices: 5 is given; sequences of ids are needed"),
        ([[1, 2], [3], [1, 2]], "2 is the same as 0"),
        ([[1, 2], [1]], r"starts with \(1,\); give end_id"),
    ],
)
def test_choices_that_cannot_be_are_refused(sequences: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choices(sequences)


def test_a_choice_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="the id 9 is not in the vocabulary, which has 6"):
        generate(table, [[0]], max_new_tokens=3, processors=choices([[1], [9]]))


class Counting:
    """A processor with state, as the well-known ones have: one call for each token, in order."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        assert ids.shape[0] == scores.shape[0] == 1
        self.calls.append(ids[0].tolist())
        return scores


def test_each_row_has_its_own_processor_which_sees_its_own_unpadded_ids_and_never_after_the_end() -> None:
    made: dict[int, Counting] = {}

    def factory(row: int) -> Counting:
        made[row] = Counting()
        return made[row]

    prompts = [[1, 2, 3], [4], [5, 5]]
    rows = generate(table, prompts, max_new_tokens=[2, 5, 3], seed=0, processors=factory)
    for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        assert made[index].calls == [prompt + list(row.tokens[:n]) for n in range(len(row.tokens))]


def test_several_processors_work_one_after_the_other() -> None:
    def only_even(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(VOCABULARY) % 2 == 1, -torch.inf)

    def only_large(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(VOCABULARY) < 3, -torch.inf)

    [row] = generate(table, [[0]], max_new_tokens=3, seed=0, processors=lambda row: [only_even, only_large])
    assert row.tokens == (4, 4, 4)


def test_processors_see_the_whole_head_with_what_lies_beyond_vocab_size_masked() -> None:
    seen = []

    def processor(ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.isfinite().tolist())
        return scores

    logits = torch.randn(1, 1, VOCABULARY)
    before = logits.clone()
    generate(lambda ids: logits, [[0]], max_new_tokens=1, seed=0, vocab_size=4, processors=lambda row: processor)
    assert seen == [[[True] * 4 + [False] * 2]]
    assert torch.equal(logits, before), "the forward's own logits are left alone"


@pytest.mark.parametrize(
    ("processors", "message"),
    [
        (Counting(), "must be a function of the row's index"),
        (3, "must be a function of the row's index"),
        (lambda row: 7, "gave row 0 7, which cannot be called"),
        (lambda row, one=Counting(): one, "gave rows 0 and 1 the same Counting"),  # noqa: B008
    ],
)
def test_a_factory_that_makes_no_processors_of_their_own_is_refused(processors: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        sample(table, [[0], [0]], max_new_tokens=1, processors=processors)


@pytest.mark.parametrize("returned", [None, torch.zeros(VOCABULARY), torch.zeros(1, VOCABULARY + 1)])
def test_a_processor_that_returns_something_else_is_named_with_row_and_step(returned: Any) -> None:
    class Wrong:
        def __call__(self, ids: Tensor, scores: Tensor) -> Any:
            return returned if ids.shape[1] == 3 else scores

    steps = sample(table, [[0], [0, 0]], max_new_tokens=3, seed=0, processors=lambda row: Wrong())
    with pytest.raises(ValueError, match=r"row 1, step 1: Wrong returned .* scores \[1, 6\] are needed"):
        for _ in itertools.islice(steps, 2):
            pass


def test_a_constraint_that_leaves_nothing_is_named_with_row_and_step() -> None:
    factory = lambda row: lambda ids, scores: scores.fill_(-torch.inf) if ids.shape[1] == 2 else scores  # noqa: E731
    with pytest.raises(ValueError, match="row 0, step 1: no token is left"):
        list(sample(table, [[0]], max_new_tokens=3, seed=0, processors=factory))


@pytest.mark.skipif(any(map(find_spec, ("llguidance", "xgrammar", "outlines_core"))), reason="one is installed")
def test_regex_without_a_library_says_what_to_install() -> None:
    with pytest.raises(ImportError, match="pip install"):
        regex("a+", None, end_id=0)


@pytest.mark.parametrize("library", ["xgrammar", "outlines_core"])
def test_regex_that_needs_transformers_for_a_tokenizer_says_so_where_it_is_missing(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = MagicMock()
    installed.__spec__ = ModuleSpec(library, None)
    monkeypatch.setitem(sys.modules, library, installed)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers.*pip install transformers, .*library='llguidance'"):
        regex("a+", object(), end_id=0, library=library)
