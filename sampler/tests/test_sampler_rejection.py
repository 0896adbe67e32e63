"""Speculation by rejection: other tokens than without drafts, from the very same distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampler import Draft, DraftModel, DraftTree, generate, sample


def chi_square_p(counts: list[int], probabilities: list[float]) -> float:
    """The probability of a deviation at least this large if `probabilities` are true."""
    total = sum(counts)
    statistic = sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, probabilities, strict=True))
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


class Chain:
    """A model of four tokens, each followed by its own distribution; a form of it with all methods."""

    def __init__(self, table: list[list[float]]) -> None:
        self.probabilities = torch.tensor(table, dtype=torch.float64)
        self.logits = self.probabilities.log().float()

    def __call__(self, ids: Tensor) -> Tensor:
        return self.logits[ids]

    def tree_logits(self, ids: Tensor, parents: Tensor) -> Tensor:
        places = parents[:, :1] + 1 + torch.arange(parents.shape[1])
        return self.logits[ids.gather(-1, places)]


P = Chain([[0.4, 0.3, 0.3, 0.0], [0.25, 0.25, 0.25, 0.25], [0.1, 0.0, 0.2, 0.7], [0.5, 0.2, 0.2, 0.1]])
Q = Chain([[0.2, 0.3, 0.0, 0.5], [0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.0, 0.6, 0.2, 0.2]])
ROWS = 10_000


def drawn_from_q(
    ids: list[list[int]], limits: list[int], *, said: Callable[[Tensor], Tensor] = lambda q: q
) -> list[Draft]:
    """Two siblings from Q, and one token after the first; `said` is what is claimed of where they are from."""
    first = Q.probabilities[[row[-1] for row in ids]]
    siblings = first.multinomial(2, replacement=True, generator=GENERATOR)
    second = Q.probabilities[siblings[:, 0]]
    after = second.multinomial(1, generator=GENERATOR)
    return [
        Draft([a, b, c], [-1, -1, 0], [said(q), said(q), said(r)])
        for (a, b), (c,), q, r in zip(siblings.tolist(), after.tolist(), first, second, strict=True)
    ]


GENERATOR = torch.Generator()


def deviation(drafter: Any, speculation: str = "rejection", temperature: float = 1.0) -> float:
    """How likely a fair deviation of the joint counts of three tokens is at least as large as what comes of `drafter`."""
    GENERATOR.manual_seed(0)
    power = P.probabilities ** (1 / temperature)
    exact = power / power.sum(-1, keepdim=True)
    joint = {
        abc: float(exact[0, abc[0]] * exact[abc[0], abc[1]] * exact[abc[1], abc[2]])
        for abc in itertools.product(range(4), repeat=3)
    }
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": temperature, "seed": 11, "speculation": speculation}
    seen = Counter(row.tokens[:3] for row in generate(P, [[0]] * ROWS, drafter=drafter, **options))
    possible = [abc for abc, p in joint.items() if p > 0]
    if not set(seen) <= set(possible):
        return 0.0
    return chi_square_p([seen[abc] for abc in possible], [joint[abc] for abc in possible])


@pytest.mark.parametrize(
    ("drafter", "temperature"),
    [
        (DraftModel(Q, tokens=3), 1.0),
        (DraftModel(Q, tokens=2), 1.6),
        (DraftTree(Q, widths=(3, 2)), 1.0),
        (drawn_from_q, 1.0),
        (lambda ids, limits: [[0, 3, 1]] * len(ids), 1.0),
        (lambda ids, limits: [Draft([2, 0, 3, 1], [-1, -1, 0, 1])] * len(ids), 1.0),
    ],
    ids=["model", "warm model", "tree", "custom", "certain chain", "certain tree"],
)
def test_sequences_by_rejection_have_their_exact_joint_probability(drafter: Any, temperature: float) -> None:
    """P and Q differ in what they exclude; three tokens span two forwards, some drafted and some not."""
    assert deviation(drafter, temperature=temperature) > 1e-3 / 6


def test_the_chi_square_test_notices_drafts_that_are_said_to_be_from_elsewhere() -> None:
    """2 % of the mass moved in what is claimed: the test above can fail."""

    def moved(q: Tensor) -> Tensor:
        q = q.clone()
        q[1] += 0.05
        return q / q.sum()

    assert deviation(lambda ids, limits: drawn_from_q(ids, limits, said=moved)) < 1e-3


def test_a_draft_model_is_accepted_as_often_as_the_distributions_overlap() -> None:
    """sum of min(p, q), the rate of Leviathan et al.: any loss of acceptance would pass all other tests."""
    steps = sample(P, [[0]] * ROWS, max_new_tokens=3, seed=3, drafter=DraftModel(Q, tokens=1), speculation="rejection")
    list(steps)
    overlap = torch.minimum(P.probabilities, Q.probabilities).sum(-1)
    expected = float(P.probabilities[0] @ overlap)
    rate = steps.stats.accepted / steps.stats.drafted
    assert rate == pytest.approx(expected, abs=4 * math.sqrt(0.25 / steps.stats.drafted))


def test_by_rejection_the_processed_logprobs_are_those_of_the_model_after_its_stages() -> None:
    rows = generate(
        P,
        [[0]] * 200,
        max_new_tokens=3,
        seed=1,
        temperature=1.5,
        drafter=DraftTree(Q, (2, 1)),
        speculation="rejection",
        logprobs=True,
    )
    warm = (P.logits / 1.5).log_softmax(-1)
    for row in rows:
        path = list(itertools.pairwise((0, *row.tokens)))
        assert row.processed_logprobs == pytest.approx([float(warm[a, b]) for a, b in path], abs=1e-5)
        assert row.logprobs == pytest.approx([float(P.logits[a, b]) for a, b in path], abs=1e-5)
