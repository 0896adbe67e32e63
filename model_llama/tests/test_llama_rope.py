from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_llama_model._rope import Rope, inverse_frequencies, rotate

CPU = torch.device("cpu")
DEFAULT = 1e4 ** -(torch.arange(0, 64, 2) / 64)


def read(**parameters: Any) -> Rope:
    return Rope.from_hf({"rope_parameters": parameters}, max_position_embeddings=4096)


def frequencies(**parameters: Any) -> Tensor:
    return inverse_frequencies(read(**parameters), 64, CPU)


def test_default_and_linear_frequencies():
    torch.testing.assert_close(frequencies(), DEFAULT)
    torch.testing.assert_close(frequencies(rope_type="linear", factor=4.0), DEFAULT / 4)


def test_llama3_keeps_the_fast_slows_the_slow_and_lies_between_elsewhere():
    got = frequencies(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    turns = 4096 * DEFAULT / (2 * math.pi)
    torch.testing.assert_close(got[turns > 4], DEFAULT[turns > 4])
    torch.testing.assert_close(got[turns < 1], DEFAULT[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((got < DEFAULT) & (got > DEFAULT / 8))[between].all()


def test_yarn_keeps_the_fast_slows_the_slow_and_is_linear_over_the_dimensions_between():
    got = frequencies(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024, beta_fast=16, beta_slow=2)
    kept = (got / DEFAULT - 1 / 4) / (1 - 1 / 4)
    torch.testing.assert_close(kept[:8], torch.ones(8))  # 64 ln(1024 / 16 / 2 pi) / (2 ln 10000) = 8.06 -> 8
    torch.testing.assert_close(kept[16:], torch.zeros(16))  # 64 ln(1024 / 2 / 2 pi) / (2 ln 10000) = 15.3 -> 16
    torch.testing.assert_close(kept[8:17], torch.linspace(1, 0, 9))


@pytest.mark.parametrize(
    ("parameters", "factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.3}, 1.3),
        ({"mscale": 0.5, "mscale_all_dim": 1.0}, (0.05 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({"factor": None, "original_max_position_embeddings": 256}, 0.1 * math.log(16) + 1),
    ],
)
def test_yarn_scales_cosine_and_sine(parameters, factor):
    rope = read(**{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024} | parameters)
    assert rope.attention_factor == pytest.approx(factor)
    cos, sin = rope.cos_sin(torch.tensor([[0, 7]]), 64, dtype=torch.float32)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full((1, 2, 1, 64), factor))


def test_the_original_length_beside_the_mapping_wins_over_the_one_inside():
    inside = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    config = {"rope_scaling": inside, "original_max_position_embeddings": 512}
    assert Rope.from_hf(config, max_position_embeddings=4096).original_length == 512


def test_rotated_products_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0)).double()

    def product(i: int, j: int) -> Tensor:
        at = read().cos_sin(torch.tensor([[i, j]]), 64, dtype=torch.float64)
        (cos_q, cos_k), (sin_q, sin_k) = (t.split(1, dim=1) for t in at)
        return (rotate(q, cos_q, sin_q) * rotate(k, cos_k, sin_k)).sum()

    torch.testing.assert_close(product(9, 4), product(25, 20), atol=1e-4, rtol=0)
    assert (product(9, 4) - product(4, 9)).abs() > 0.1


def test_the_first_half_of_a_head_turns_towards_the_second():
    x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    turned = rotate(x, *read().cos_sin(torch.tensor([[1]]), 2, dtype=torch.float32))
    torch.testing.assert_close(turned.flatten(), torch.tensor([math.cos(1), math.sin(1)]))


def test_cosines_are_computed_in_fp32_and_cast_once():
    exact = read().cos_sin(torch.tensor([[4001]]), 64, dtype=torch.float32)
    rounded = read().cos_sin(torch.tensor([[4001]]), 64, dtype=torch.bfloat16)
    assert all(torch.equal(e.bfloat16(), r) for e, r in zip(exact, rounded, strict=True))
