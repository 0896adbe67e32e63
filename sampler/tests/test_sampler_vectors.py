"""llama.cpp's published vectors for its samplers: probabilities in, probabilities out (tests/test-sampling.cpp)."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from llm_sampler import sample
from llm_sampler._prepare import prepared
from llm_sampler._sampler import Drawn

DEFAULTS = {name: p.default for name, p in inspect.signature(sample).parameters.items()}
RISING, FALLING, EVEN = [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.2] * 5


def after(probabilities: list[float], held: list[int], **options: Any) -> list[float]:
    """What a row that has generated `held` draws from, where the model gives `probabilities`."""
    arguments = {"input_ids": [[0]], "max_new_tokens": 99, "order": "llama.cpp", "vocab_size": len(probabilities)}
    if held:  # here they count as generated: presence and frequency penalties do not look at the prompt
        arguments["input_ids"] = [held[:1]]
    rows, sampler = prepared({**DEFAULTS, **arguments, **options})
    if held:
        rows[0].prompt = 0
        for token in held[1:]:
            sampler.accept(rows, [Drawn(token, 0.0, 0.0)])
    scores = sampler.process(torch.tensor([probabilities]).log(), rows).scores
    return scores.widened().values.softmax(-1)[0].tolist()


@pytest.mark.parametrize(
    ("given", "expected", "options"),
    [
        (RISING, RISING, {"temperature": 1.0}),
        (RISING, [0, 0, 0, 1], {"temperature": 0.0}),
        (RISING, [0, 0, 0, 1], {"top_k": 1}),
        (RISING, [0, 0.22222, 0.33333, 0.44444], {"top_k": 3}),
        (RISING, RISING, {"top_k": 4}),
        (RISING, RISING, {"top_k": None}),
        (RISING, [0, 0, 0, 1], {"top_p": 1e-9}),
        (RISING, [0, 0, 0.428571, 0.571429], {"top_p": 0.7}),
        (RISING, [0, 0.22222, 0.33333, 0.44444], {"top_p": 0.8}),
        (RISING, RISING, {"top_p": 1.0}),
        (RISING, RISING, {"min_p": 0.0}),
        (RISING, RISING, {"min_p": 0.24}),
        (RISING, [0, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9], {"min_p": 0.26}),
        (RISING, [0, 0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9], {"min_p": 0.49}),
        (RISING, [0, 0, 0.3 / 0.7, 0.4 / 0.7], {"min_p": 0.51}),
        (RISING, [0, 0, 0.3 / 0.7, 0.4 / 0.7], {"min_p": 0.74}),
        (RISING, [0, 0, 0, 1], {"min_p": 0.76}),
        (RISING, [0, 0, 0, 1], {"min_p": 1.0}),
        (FALLING, [0, 0, 0, 1], {"xtc_probability": 1.0, "xtc_threshold": 0.09}),
        (FALLING, [0, 0, 0.2 / 0.3, 0.1 / 0.3], {"xtc_probability": 1.0, "xtc_threshold": 0.19}),
        (FALLING, [0, 0.3 / 0.6, 0.2 / 0.6, 0.1 / 0.6], {"xtc_probability": 1.0, "xtc_threshold": 0.29}),
        (FALLING, FALLING, {"xtc_probability": 1.0, "xtc_threshold": 0.39}),
        ([0.97, 0.01, 0.01, 0.01], [1, 0, 0, 0], {"typical_p": 0.5}),
        ([0.4, 0.2, 0.2, 0.2], [0, 1 / 3, 1 / 3, 1 / 3], {"typical_p": 0.5}),
        (RISING, [0, 0, 0.428571, 0.571429], {"top_n_sigma": 1.0}),
        (RISING, RISING, {"top_n_sigma": None}),
        (RISING, RISING, {"top_n_sigma": 3.0}),
    ],
    ids=str,
)
def test_a_stage_gives_the_published_probabilities(given: list, expected: list, options: dict[str, Any]) -> None:
    assert after(given, [], **options) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("held", "expected", "options"),
    [
        ([0], [0, 0.25, 0.25, 0.25, 0.25], {"repetition_penalty": 50.0}),
        ([0, 1, 2], [0, 0, 0, 0.5, 0.5], {"repetition_penalty": 50.0}),
        ([0, 1, 2, 0, 0], [0, 0, 0, 0.5, 0.5], {"repetition_penalty": 50.0}),
        ([0], [0.000011] + [0.249997] * 4, {"frequency_penalty": 5.0, "presence_penalty": 5.0}),
        ([0, 1, 2], [0.000023] * 3 + [0.499966] * 2, {"frequency_penalty": 5.0, "presence_penalty": 5.0}),
        (
            [0, 1, 2, 0, 0],
            [0, 0.000023, 0.000023, 0.499977, 0.499977],
            {"frequency_penalty": 5.0, "presence_penalty": 5.0},
        ),
    ],
    ids=str,
)
def test_penalties_give_the_published_probabilities(held: list, expected: list, options: dict[str, Any]) -> None:
    assert after(EVEN, held, **options) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("size", "held", "expected", "multiplier", "allowed_length", "last_n", "breakers"),
    [
        (4, [0, 1], [0.25] * 4, 1.0, 2, 4, ()),
        (4, [0, 1, 2, 0, 1], [0.296923, 0.296923, 0.109232, 0.296923], 1.0, 2, 5, ()),
        (5, [0, 1, 3, 4, 0, 1], EVEN, 1.0, 2, 6, (3,)),
        (5, [0, 1, 2, 0, 1], [0.241818, 0.241818, 0.032727, 0.241818, 0.241818], 2.0, 2, 5, ()),
        (5, [0, 1, 2, 3, 4, 0, 1], EVEN, 1.0, 4, 7, ()),
    ],
    ids=str,
)
def test_dry_gives_the_published_probabilities(
    size: int, held: list, expected: list, multiplier: float, allowed_length: int, last_n: int, breakers: tuple
) -> None:
    got = after(
        [1 / size] * size,
        held,
        dry_multiplier=multiplier,
        dry_base=1.1,
        dry_allowed_length=allowed_length,
        dry_penalty_last_n=last_n,
        dry_sequence_breakers=list(breakers),
    )
    assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("order", "top_k", "top_p", "min_p"),
    [
        (["top_k"], 10_000, None, None),
        (["top_k"], 1, None, None),
        (["top_p"], None, 1.0, None),
        (["top_p"], None, 1e-9, None),
        (["min_p"], None, None, 1.0),
        (["min_p"], None, None, 1e-12),
        (["top_k", "top_p"], 100, 0.8, None),
        (["top_p", "top_k"], 100, 0.8, None),
        (["top_k", "min_p"], 100, None, 0.8),
        (["min_p", "top_k"], 100, None, 0.8),
        (["min_p", "top_p"], None, 0.8, 0.1),
        (["top_p", "min_p"], None, 0.8, 0.1),
        (["top_k", "top_p", "min_p"], 100, 0.8, 0.1),
        (["min_p", "top_p", "top_k"], 100, 0.8, 0.1),
    ],
    ids=str,
)
def test_queues_of_stages_keep_what_their_definitions_say(
    order: list[str], top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """The model gives token i a probability proportional to i, so each stage keeps the last few tokens."""
    size = 10_000
    lowest = 0  # the smallest token that is left
    for name in order:
        if name == "top_k" and top_k is not None:
            lowest = max(lowest, size - top_k)
        elif name == "min_p" and min_p is not None:
            lowest = max(lowest, math.ceil(min_p * (size - 1) - 1e-9))
        elif top_p is not None and top_p < 1:
            needed, mass, token = top_p * sum(range(lowest, size)), 0, size
            while mass < needed:
                token -= 1
                mass += token
            lowest = token
    probabilities = [float(token) for token in range(size)]
    options = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    got = after(probabilities, [], order=order, **{name: options[name] for name in order})
    assert [token for token, p in enumerate(got) if p > 0] == list(range(max(lowest, 1), size))
