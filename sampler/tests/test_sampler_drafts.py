"""Drafters: what they guess, and what is said of guesses that cannot be checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampler import Draft, DraftModel, DraftTree, PromptLookup, generate, sample

VOCABULARY = 11
TABLE = torch.randn(101, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 2


def causal(ids: Tensor) -> Tensor:
    """Logits that depend on all ids up to a position, exactly (integers), and on nothing after it."""
    return TABLE[((ids + 1) * torch.arange(1, ids.shape[1] + 1)).cumsum(-1) % 101]


def similar(ids: Tensor) -> Tensor:
    """A draft model: mostly of the same opinion."""
    return causal(ids) + torch.cos(causal(ids) * 3) / 2


def test_prompt_lookup_takes_the_longest_match_the_latest_of_equals_and_goes_on_round_a_loop() -> None:
    seen: list[list[int]] = []

    def forward(ids: Tensor) -> Tensor:
        seen.extend(ids.tolist())
        return torch.eye(VOCABULARY)[ids] * 0 + torch.arange(VOCABULARY, dtype=torch.float32)

    def drafted(prompt: list[int], **options: Any) -> list[int]:
        seen.clear()
        generate(forward, [prompt], max_new_tokens=9, temperature=0, drafter=PromptLookup(4, **options))
        return seen[1][len(prompt) + 1 :]  # the forward gives 10, whatever comes before

    assert drafted([1, 10, 5, 2, 10, 6, 3, 1]) == [5, 2, 10, 6]
    assert drafted([1, 10, 5, 2, 10, 6, 3, 1], min_match=3) == []
    assert drafted([1, 10, 5, 1, 10, 6, 3, 1]) == [6, 3, 1, 10]
    assert drafted([2, 10, 5, 4, 10, 6, 3], min_match=1) == [6, 3, 10, 6]
    assert drafted([10, 10]) == [10, 10, 10, 10]


def of(draft: Any) -> Any:
    return lambda ids, limits: [draft] * len(ids)


HALF = torch.tensor([0.5, 0.5] + [0.0] * (VOCABULARY - 2))


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (of([0, 11]), "drafter: row 0, step 1: 11 is drafted, and ids are integers from 0 to 10"),
        (of([-1]), "-1 is drafted"),
        (of([1.0]), "1.0 is drafted"),
        (of(7), "7 is not a sequence of ids"),
        (of(Draft([1, 2], [-1])), r"parents \[-1\] do not name"),
        (of(Draft([1, 2], [1, -1])), r"parents \[1, -1\] do not name"),
        (lambda ids, limits: [[1]] * (len(ids) + 1), "drafter gave 3 for 2 rows"),
        (lambda ids, limits: None, "drafter gave NoneType for 2 rows"),
        (of(Draft([0, 1], None, [HALF])), "1 probabilities for 2 tokens"),
        (of(Draft([0], None, [HALF * 2])), "are not a distribution over 11 ids"),
        (of(Draft([0], None, [HALF[:3]])), r"probabilities \[3\] are not a distribution"),
        (of(Draft([4], None, [HALF])), "4 is drafted, and has no probability"),
        (of(Draft([0], None, [["a"] * VOCABULARY])), "row 0, step 1: probabilities are not a distribution for each"),  # type: ignore[list-item]
        (of(Draft([0], None, 0.5)), "row 0, step 1: probabilities are not a distribution for each token: 'float'"),  # type: ignore[arg-type]
        (of(Draft([0], None, [0.5])), r"probabilities \[\] are not a distribution over 11 ids"),  # type: ignore[list-item]
    ],
)
def test_bad_drafts_are_named(drafter: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(causal, [[1], [2]], max_new_tokens=5, drafter=drafter, speculation="rejection")


def test_probabilities_are_taken_as_lists_too() -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "seed": 0, "speculation": "rejection"}
    want = generate(causal, [[1], [2]], drafter=of(Draft([1, 0], None, [HALF, HALF])), **options)
    for given in ([HALF.tolist(), HALF], torch.stack([HALF, HALF]).double(), torch.stack([HALF, HALF]).tolist()):
        assert generate(causal, [[1], [2]], drafter=of(Draft([1, 0], None, given)), **options) == want  # type: ignore[arg-type]


def test_a_tree_needs_tree_logits_and_says_so_before_the_first_forward() -> None:
    for drafter in (DraftTree(similar, (2, 1)), PromptLookup(branches=2)):
        with pytest.raises(ValueError, match="drafter: the drafts branch, and forward_func has no tree_logits"):
            sample(causal, [[1]], max_new_tokens=5, drafter=drafter)
    with pytest.raises(ValueError, match="forward 1: the drafts branch, and forward_func has no tree_logits"):
        generate(causal, [[1]], max_new_tokens=5, drafter=lambda ids, limits: [Draft([1, 2], [-1, -1])])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"drafter": 7}, TypeError, "drafter is 7; it must be PromptLookup"),
        ({"drafter": PromptLookup(), "speculation": "lossy"}, ValueError, "speculation is 'lossy'"),
        ({"speculation": "rejection"}, ValueError, "there is no drafter"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(causal, [[1]], max_new_tokens=2, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptLookup(0), "tokens is 0"),
        (lambda: PromptLookup(min_match=0), "min_match is 0"),
        (lambda: PromptLookup(branches=1.5), "branches is 1.5"),  # type: ignore[arg-type]
        (lambda: DraftModel(similar, 0), "tokens is 0"),
        (lambda: DraftTree(similar, (2, 0)), "widths is 0"),
        (lambda: DraftTree(similar, ()), r"widths is \(\); say how many tokens follow one at each depth"),
        (lambda: DraftTree(similar, 3), "widths is 3; say how many tokens follow one at each depth"),  # type: ignore[arg-type]
    ],
)
def test_bad_drafters_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_where_the_settings_leave_nothing_of_a_draft_model_nothing_is_drafted() -> None:
    def only_zero(ids: Tensor) -> Tensor:
        return causal(ids).masked_fill(torch.arange(VOCABULARY) > 0, -math.inf)

    options: dict[str, Any] = {"max_new_tokens": 5, "seed": 0, "bad_words_ids": [[0]]}
    for speculation in ("exact", "rejection"):
        steps = sample(causal, [[1]], drafter=DraftModel(only_zero), speculation=speculation, **options)
        assert [step.tokens[0] for step in steps] == list(generate(causal, [[1]], **options)[0].tokens)
        assert steps.stats.drafted == 0


def test_what_forward_functions_return_is_checked() -> None:
    class Short:
        def __call__(self, ids: Tensor) -> Tensor:
            return causal(ids)

        def tree_logits(self, ids: Tensor, parents: Tensor) -> Tensor:
            return torch.zeros(len(ids), 1, VOCABULARY)

    with pytest.raises(ValueError, match=r"forward 1: forward_func.tree_logits returned .*\[1, 1, 11\]"):
        generate(Short(), [[1]], max_new_tokens=5, drafter=DraftTree(similar, (2,)))
    with pytest.raises(ValueError, match="drafter: row 0, step 1: the largest logit of its model is nan"):
        generate(causal, [[1]], max_new_tokens=5, drafter=DraftModel(lambda ids: causal(ids) * math.nan))
    with pytest.raises(ValueError, match="drafter: forward_func returned"):
        generate(causal, [[1]], max_new_tokens=5, drafter=DraftModel(lambda ids: ids))
