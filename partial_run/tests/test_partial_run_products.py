"""One row times a weight: the kernel differs, the numbers and the process's settings do not."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from llm_partial_run._products import SHAPE, kernels_nbytes, onednn, product, without_onednn


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 96), (96,), (1, 3, 96), (2, 150, 96)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_is_as_exact_as_torchs(dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(200, 96, dtype=dtype)
    bias = torch.randn(200, dtype=dtype) if with_bias else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())

    ours, theirs = product(x, weight, bias), F.linear(x, weight, bias)

    assert ours.shape == theirs.shape
    assert ours.dtype == dtype
    assert (ours - exact).abs().mean() <= 1.01 * (theirs - exact).abs().mean()


def test_one_row_in_bf16_does_not_go_to_onednn(monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: seen.append(bool(torch.backends.mkldnn.enabled)) or real(*args))
    weight = torch.ones(4, 8, dtype=torch.bfloat16)

    product(torch.ones(1, 8, dtype=torch.bfloat16), weight, None)
    product(torch.ones(2, 8, dtype=torch.bfloat16), weight, None)
    product(torch.ones(1, 8), weight.float(), None)

    assert seen == [False, True, True]


def test_several_rows_in_bf16_come_in_few_numbers(monkeypatch: pytest.MonkeyPatch):
    seen: set[int] = set()
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *others: seen.add(x.numel() // x.shape[-1]) or real(x, *others))
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    for rows in range(1, 1200):
        assert product(torch.ones(rows, 8, dtype=torch.bfloat16), weight, None).shape == (rows, 4)
        assert min(rows, 256) <= max(seen) <= min(max(2 * rows, rows + 64), 256)
    assert seen == {1, 2, 4, 8, 16, 32, 64, 128, 192, 256}
    assert kernels_nbytes(3, 1200, torch.bfloat16) == 3 * 9 * SHAPE  # all but the one row, which goes without oneDNN
    assert kernels_nbytes(3, 20, torch.bfloat16) == 3 * 5 * SHAPE
    assert kernels_nbytes(3, 20, torch.float32) == 0


def test_several_rows_go_to_onednn_where_the_code_around_them_does_not(monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: seen.append(bool(torch.backends.mkldnn.enabled)) or real(*args))
    weight = torch.ones(4, 8, dtype=torch.bfloat16)

    with without_onednn():
        product(torch.ones(2, 8, dtype=torch.bfloat16), weight, None)
        product(torch.ones(1, 8, dtype=torch.bfloat16), weight, None)
        assert not torch.backends.mkldnn.enabled

    assert seen == [True, False]
    assert torch.backends.mkldnn.enabled


def test_onednn_is_off_until_the_outer_of_two_is_left():
    with without_onednn():
        with without_onednn(), onednn(True):
            assert torch.backends.mkldnn.enabled
        with onednn(True):
            assert torch.backends.mkldnn.enabled
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled


def test_onednn_stays_off_where_the_program_has_it_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with without_onednn(), without_onednn(), onednn(True):
        assert not torch.backends.mkldnn.enabled
    with onednn(True):
        assert not torch.backends.mkldnn.enabled
    assert not torch.backends.mkldnn.enabled


def test_onednn_is_on_again_after_an_error():
    with pytest.raises(RuntimeError, match="shape"):
        product(torch.ones(1, 7, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16), None)
    assert torch.backends.mkldnn.enabled


def test_onednn_is_on_again_when_many_threads_have_multiplied():
    weight, x = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(1, 64, dtype=torch.bfloat16)

    def multiply(rows: int) -> None:
        for _ in range(100):
            product(x, weight, None)
            with without_onednn():
                product(x.expand(rows, -1), weight, None)

    threads = [threading.Thread(target=multiply, args=(1 + i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.mkldnn.enabled
