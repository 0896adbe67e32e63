"""Perplexity through windows: every token once, with as much in front of it as the windows give."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import perplexity

TABLE = torch.randn(29, 7, generator=torch.Generator().manual_seed(3)) * 2


def forward(ids: Tensor) -> Tensor:
    return TABLE[((ids + 1) * torch.arange(1, ids.shape[1] + 1)).cumsum(-1) % 29]


def naive(ids: list[int], max_length: int, stride: int) -> list[float]:
    """Each token after the last window that reaches it first."""
    logprobs = []
    scored = 0
    for begin in range(0, len(ids), stride):
        window = ids[begin : begin + max_length]
        table = forward(torch.tensor([window]))[0].log_softmax(-1)
        logprobs += [float(table[p - 1, t]) for p, t in enumerate(window) if p >= 1 and begin + p >= scored]
        scored = begin + len(window)
        if scored >= len(ids):
            return logprobs
    raise AssertionError


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(2, 12), st.data())
def test_windows_equal_naive_windows(ids: list[int], max_length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, max_length))
    result = perplexity(forward, ids, max_length=max_length, stride=stride, batch_size=data.draw(st.integers(1, 4)))
    want = naive(ids, max_length, stride)
    assert result.logprobs == pytest.approx(want, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(-sum(want) / len(want)), rel=1e-5)
    if stride < max_length:
        assert len(result.logprobs) == len(ids) - 1


def test_a_text_within_one_window_is_one_forward() -> None:
    calls = []

    def counted(ids: Tensor) -> Tensor:
        calls.append(ids.shape)
        return forward(ids)

    perplexity(counted, list(range(7)), max_length=100)
    assert calls == [(1, 6)]


def test_long_windows_are_not_asked_for_more_positions_at_once_than_one_of_them_or_4096() -> None:
    text = torch.randint(2, (20_000,), generator=torch.Generator().manual_seed(0))
    for max_length, most in ((1500, 2), (5000, 1)):
        asked: list[tuple[int, int]] = []

        def counted(ids: Tensor, asked: list[tuple[int, int]] = asked) -> Tensor:
            asked.append(tuple(ids.shape))  # type: ignore[arg-type]
            return torch.zeros(*ids.shape, 2)

        result = perplexity(counted, text, max_length=max_length, stride=max_length, batch_size=8)
        assert max(rows for rows, _ in asked) == most
        assert len(result.logprobs) == 20_000 - math.ceil(20_000 / max_length)


def test_bits_per_byte_count_the_texts_bytes() -> None:
    result = perplexity(lambda ids: torch.zeros(*ids.shape, 4), [0, 1, 2], max_length=4, text="né")
    assert result.bits_per_byte == pytest.approx(2 * 2 / 3)
    with pytest.raises(ValueError, match="give text="):
        _ = perplexity(forward, [0, 1], max_length=4).bits_per_byte


def test_an_impossible_token_is_infinitely_surprising() -> None:
    never = torch.tensor([0.0, -math.inf])
    assert perplexity(lambda ids: never.expand(*ids.shape, 2), [0, 1], max_length=4).perplexity == math.inf


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([0, 1, 2], {"max_length": 1}, "max_length is 1"),
        ([0, 1, 2], {"max_length": 4.0}, "max_length is 4.0"),
        ([0, 1, 2], {"max_length": 4, "stride": 5}, "stride is 5.*1 to max_length=4"),
        ([0, 1, 2], {"max_length": 4, "stride": 0}, "stride is 0"),
        ([0], {"max_length": 4}, "begin-of-text"),
        ([[0, 1], [2, 3]], {"max_length": 4}, "2 rows"),
        ([], {"max_length": 4}, "no row"),
        ([0, 1, 2, 3, 9], {"max_length": 3}, "window 1, tokens 1 to 3|window 2.*holds the id 9"),
    ],
)
def test_bad_arguments_are_named(ids: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(forward, ids, **options)


def test_logits_that_are_not_finite_name_the_window() -> None:
    def broken(ids: Tensor) -> Tensor:
        return forward(ids).masked_fill((ids == 6).unsqueeze(-1), math.nan)

    with pytest.raises(ValueError, match="window 1, tokens 2 to 5 met logits that are NaN"):
        perplexity(broken, [0, 1, 2, 3, 6, 1], max_length=4, stride=2)
