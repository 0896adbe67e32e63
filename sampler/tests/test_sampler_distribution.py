"""What is drawn follows the distribution that the settings describe."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from llm_sampler import generate
from llm_sampler._draw import draw, row_key, uniform
from llm_sampler._scores import Scores

DRAWS = 100_000
PROBABILITIES = [0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01]


def chi_square_p(counts: list[int], probabilities: list[float]) -> float:
    """The probability of a deviation at least this large if `probabilities` are true."""
    total = sum(counts)
    statistic = sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, probabilities, strict=True))
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def counts_of(probabilities: list[float], seed: int) -> list[int]:
    logits = torch.tensor(probabilities).log().expand(DRAWS, -1)
    key = row_key(seed, 0)
    tokens, _ = draw(Scores(logits, None, len(probabilities)), [uniform(key, i) for i in range(DRAWS)])
    return torch.bincount(tokens.flatten(), minlength=len(probabilities)).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_draws_follow_the_distribution(seed: int) -> None:
    assert chi_square_p(counts_of(PROBABILITIES, seed), PROBABILITIES) > 1e-3 / 3


@pytest.mark.parametrize(
    "biased",
    [
        [0.38, 0.27, *PROBABILITIES[2:]],  # 2 % of the mass at the wrong token
        [p ** (1 / 1.02) for p in PROBABILITIES],  # a temperature that is off by 2 %
        [0.4, 0.25, 0.15, 0.1, 0.06, 0.04, 0.0],  # a tail token that is never reached
    ],
)
def test_the_chi_square_test_notices_a_small_bias(biased: list[float]) -> None:
    assert chi_square_p(counts_of([p / sum(biased) for p in biased], 0), PROBABILITIES) < 1e-3


def test_uniforms_are_even_and_uncorrelated_over_positions_rows_and_seeds() -> None:
    for stream in (
        [uniform(row_key(7, 0), position) for position in range(DRAWS)],
        [uniform(row_key(7, row), 3) for row in range(DRAWS)],
        [uniform(row_key(seed, 0), 3) for seed in range(DRAWS)],
    ):
        x = torch.tensor(stream, dtype=torch.float64)
        bins = torch.bincount((x * 64).long(), minlength=64).tolist()
        assert chi_square_p(bins, [1 / 64] * 64) > 1e-4
        assert abs(float(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1])) < 4 / math.sqrt(DRAWS)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.8}, [0, 1, 2]),
        ({"min_p": 0.5}, [0, 1]),
        ({"temperature": 2.0}, [0, 1, 2, 3]),
    ],
)
def test_sequences_of_three_have_their_exact_joint_probability(settings: dict[str, float], kept: list[int]) -> None:
    """A table model whose rows are permutations of one distribution; every sequence of length 3 is enumerated."""
    base = torch.tensor([0.45, 0.27, 0.18, 0.10], dtype=torch.float64)
    table = torch.stack([base.roll(shift) for shift in range(4)])
    power = table ** (1 / settings.get("temperature", 1.0))
    mask = torch.stack([torch.tensor([i in kept for i in range(4)]).roll(shift) for shift in range(4)])
    power = power * mask
    exact = power / power.sum(-1, keepdim=True)
    joint = {
        abc: float(exact[0, abc[0]] * exact[abc[0], abc[1]] * exact[abc[1], abc[2]])
        for abc in itertools.product(range(4), repeat=3)
    }
    logits = table.log().float()
    rows = 20_000
    drawn = generate(lambda ids: logits[ids], [[0]] * rows, max_new_tokens=3, seed=11, **settings)
    seen = Counter(row.tokens for row in drawn)
    possible = [abc for abc, p in joint.items() if p > 0]
    assert set(seen) <= set(possible)
    assert chi_square_p([seen[abc] for abc in possible], [joint[abc] for abc in possible]) > 1e-3 / 5
    for row in drawn[:50]:
        assert math.exp(sum(row.processed_logprobs)) == pytest.approx(joint[row.tokens], rel=1e-5)


def test_whether_xtc_happens_is_independent_of_what_is_drawn() -> None:
    """Joint probabilities of two tokens, each from a mixture: with 0.4 the two likeliest lose the first of them."""
    base = torch.tensor([0.45, 0.35, 0.20], dtype=torch.float64)
    mixed = 0.6 * base + 0.4 * torch.tensor([0, 0.35 / 0.55, 0.20 / 0.55], dtype=torch.float64)
    rows = 20_000
    options = {"xtc_probability": 0.4, "xtc_threshold": 0.3, "max_new_tokens": 2, "seed": 5}
    logits = base.log().float()
    seen = Counter(row.tokens for row in generate(lambda ids: logits.expand(*ids.shape, 3), [[0]] * rows, **options))
    joint = {ab: float(mixed[ab[0]] * mixed[ab[1]]) for ab in itertools.product(range(3), repeat=2)}
    assert chi_square_p([seen[ab] for ab in joint], list(joint.values())) > 1e-3


def test_mirostat_meets_the_surprise_that_was_asked_for() -> None:
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 2
    for tau in (2.0, 4.0):
        rows = generate(
            lambda ids: logits.expand(*ids.shape, 2000), [[0]] * 40, max_new_tokens=200, mirostat_tau=tau, seed=1
        )
        bits = [-p / math.log(2) for row in rows for p in row.processed_logprobs[50:]]
        assert sum(bits) / len(bits) == pytest.approx(tau, abs=0.1)


def test_the_largest_uniform_takes_the_last_token_with_mass_never_a_masked_one() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0, -200.0, -math.inf]])
    for u, token in ((0.0, 0), (1 - 2**-53, 2), (1.0, 2)):
        assert draw(Scores(logits, None, 5), [u])[0].tolist() == [[token]]


def test_a_uniform_on_a_boundary_takes_the_next_token() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0]])
    for u, token in ((0.0, 1), (0.5, 3)):
        assert draw(Scores(logits, None, 4), [u])[0].tolist() == [[token]]


def test_tail_tokens_of_a_large_vocabulary_are_reached_in_proportion() -> None:
    """A head of one half and 100,000 equal tails: float32 sums would lose part of them."""
    tails = 100_000
    logits = torch.full((1, tails + 1), math.log(0.5 / tails))
    logits[0, 0] = math.log(0.5)
    for u in (0.5 + 1e-9, 0.75, 1 - 1e-9):
        token = int(draw(Scores(logits, None, tails + 1), [u])[0])
        assert token == pytest.approx((u - 0.5) * 2 * tails, abs=1.5)
