"""Parallel samples: n rows for each prompt, which goes through the forward once; and the best of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampler import best_of, generate, sample

TABLE = torch.sin(torch.arange(100, dtype=torch.float64) ** 2 * 0.37).view(10, 10).float() * 2


def table(ids: Tensor) -> Tensor:
    return TABLE[ids]


PROMPTS = [[1, 2, 3], [4], [5, 6]]


def test_samples_are_the_rows_of_their_prompt_repeated() -> None:
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    assert generate(table, PROMPTS, n=3, max_new_tokens=6, seed=7) == generate(table, prompts, max_new_tokens=6, seed=7)


def test_settings_are_given_per_prompt() -> None:
    each: dict[str, Any] = {"temperature": [0.5, 2.0, 1.0], "stop_ids": [[1], [2], [3]], "max_new_tokens": [3, 6, 9]}
    each |= {"top_logprobs": [0, 1, 2], "logit_bias": [{4: 1.0}, None, {5: -1.0}]}
    repeated = {name: [value for value in values for _ in range(2)] for name, values in each.items()}
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    assert generate(table, PROMPTS, n=2, seed=0, **each) == generate(table, prompts, seed=0, **repeated)


def test_with_a_seed_per_prompt_more_samples_do_not_change_the_first_ones() -> None:
    few = generate(table, PROMPTS, n=2, max_new_tokens=6, seed=[7, 8, 9])
    many = generate(table, PROMPTS[1], n=5, max_new_tokens=6, seed=[8])
    assert many[:2] == few[2:4]
    assert len({row.tokens for row in many}) == 5


def test_each_sample_has_a_processor_of_its_own() -> None:
    made: list[int] = []

    def factory(row: int) -> None:
        made.append(row)

    generate(table, PROMPTS, n=2, max_new_tokens=1, processors=factory)
    assert made == [0, 1, 2, 3, 4, 5]


def test_a_prompt_goes_through_the_forward_once_before_it_fans_out() -> None:
    seen = []

    def forward(ids: Tensor) -> Tensor:
        seen.append(ids.tolist())
        return TABLE[ids]

    steps = sample(forward, [[1, 2], [3, 4], [1, 2]], n=4, max_new_tokens=2, seed=0)
    assert next(steps).rows == tuple(range(12))
    assert seen == [[[1, 2], [3, 4]]]
    next(steps)
    assert [len(ids) for ids in seen] == [2, 12]


@pytest.mark.parametrize("n", [0, -1, 1.5, True, None, [1, 2]])
def test_n_is_a_whole_number(n: Any) -> None:
    with pytest.raises(ValueError, match=r"n is .*; it must be an integer >= 1"):
        sample(table, PROMPTS, n=n, max_new_tokens=1)


@pytest.mark.parametrize("by", ["mean", "sum"])
def test_the_best_come_first_and_none_is_lost(by: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "stop_ids": [[0, 1], [2], []], "seed": 3}
    plain = generate(table, PROMPTS, n=6, **options)
    for row, ranked in enumerate(best_of(table, PROMPTS, n=6, by=by, **options)):
        assert sorted(c.tokens for c in ranked) == sorted(c.tokens for c in plain[6 * row : 6 * row + 6])
        logprobs = [c.logprobs or () for c in ranked]
        values = [sum(own) / (len(own) if by == "mean" else 1) for own in logprobs]
        assert values == sorted(values, reverse=True)


def test_the_measures_differ_where_lengths_do() -> None:
    """0 stops with 0.4; each of the others has 0.3: going on is worth more per token than its sum says."""
    logits = torch.tensor([0.3, 0.35, 0.35]).log()

    def of(by: Any) -> tuple[int, ...]:
        [samples] = best_of(
            lambda ids: logits.expand(*ids.shape, 3), [[1]], n=30, by=by, max_new_tokens=4, stop_ids=0, seed=1
        )
        return samples[0].tokens

    assert of("sum") == (0,)
    assert len(of("mean")) == 4


def test_a_function_ranks_and_the_earlier_sample_goes_first_on_ties() -> None:
    plain = generate(table, [[1]], n=6, max_new_tokens=4, seed=0, logprobs=True)
    [longest] = best_of(table, [[1]], n=6, by=lambda completion: completion.tokens.count(9), max_new_tokens=4, seed=0)
    assert longest == sorted(plain, key=lambda completion: -completion.tokens.count(9))


def test_a_reward_may_be_a_tensor_of_one_number() -> None:
    options: dict[str, Any] = dict(n=6, max_new_tokens=4, seed=0)
    assert best_of(table, [[1]], by=lambda c: torch.tensor(float(sum(c.tokens))), **options) == best_of(  # type: ignore[arg-type]
        table, [[1]], by=lambda c: sum(c.tokens), **options
    )


def test_what_cannot_be_ranked_by_is_named() -> None:
    with pytest.raises(ValueError, match="by is 'median'"):
        best_of(table, [[1]], n=2, by="median", max_new_tokens=1)  # type: ignore[arg-type]
    for no in (False, None):
        with pytest.raises(ValueError, match=f"by is 'mean', and logprobs={no}"):
            best_of(table, [[1]], n=2, max_new_tokens=1, logprobs=no)
    with pytest.raises(ValueError, match="by gave nan for sample 0 of row 1"):
        best_of(
            table, [[1], [2]], n=2, by=lambda c: math.nan if c.tokens[-1] == 8 else 0, max_new_tokens=1, temperature=0
        )
