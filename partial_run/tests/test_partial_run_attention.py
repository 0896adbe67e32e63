"""Products of attention that a module computes itself: in fp32, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llm_partial_run import offload
from llm_partial_run._attention import InFp32


class Products(TorchDispatchMode):
    """Notes what batched products are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batched_products_in_16_bits_are_those_of_fp32_rounded_once(dtype: torch.dtype):
    torch.manual_seed(0)
    q, k, bias = (torch.randn(shape).to(dtype) for shape in ((2, 3, 5, 16), (2, 3, 16, 7), (6, 1, 7)))
    with InFp32(), Products() as seen:
        scores = q @ k
        again = [torch.matmul(q, k), torch.bmm(q.flatten(0, 1), k.flatten(0, 1)).view_as(scores)]
        beside = bias.baddbmm(q.flatten(0, 1), k.flatten(0, 1), alpha=0.5, beta=2.0)
    assert set(seen.dtypes) == {torch.float32}
    assert scores.dtype == beside.dtype == dtype
    assert all(torch.equal(scores, other) for other in again)
    assert torch.equal(scores, (q.float() @ k.float()).to(dtype))
    torch.testing.assert_close(beside.double(), (0.5 * (q.double() @ k.double()).flatten(0, 1) + 2 * bias.double()),
                               atol=2e-2, rtol=1e-2)  # fmt: skip


def test_a_sum_that_is_written_out_is_one_too_and_an_output_that_is_given_is_written_to():
    x = torch.randn(2, 3, 16).bfloat16()
    with InFp32(), Products() as seen:
        scores = torch.einsum("btd,bsd->bts", x, x)
        out = torch.empty(2, 3, 3, dtype=torch.bfloat16)
        assert torch.bmm(x, x.mT, out=out) is out
    assert seen.dtypes[0] == torch.float32
    assert scores.dtype == torch.bfloat16
    torch.testing.assert_close(out, scores)


def test_other_products_are_left_alone():
    x = torch.randn(2, 3, 16)
    with InFp32(), pytest.raises(RuntimeError):
        torch.bmm(x.bfloat16(), x.mT.half())
    with InFp32(), Products() as seen:
        assert (x.bfloat16() @ torch.ones(16, 4, dtype=torch.bfloat16)).shape == (2, 3, 4)  # a weight's
        assert (x.double() @ x.double().mT).dtype == torch.float64
        assert (x @ x.mT).dtype == torch.float32
    assert torch.bfloat16 not in seen.dtypes
    assert seen.dtypes.count(torch.float64) == 1


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + (q @ k.mT).softmax(-1) @ v


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_block_that_attends_by_itself_has_them_for_several_tokens(dtype: torch.dtype):
    torch.manual_seed(0)
    resident = Model().eval().to(dtype)
    weights = {f"mid.{i:05d}": dict(block.state_dict()) for i, block in enumerate(resident.blocks)}
    with torch.device("meta"):
        module = Model().eval()
    x = torch.randn(2, 5, 16).to(dtype)
    with torch.no_grad(), offload(module, weights.__getitem__, memory="1GiB", rows=2, context=8, runtime=0, cache=0):
        with Products() as seen:
            output = module(x)
        assert seen.dtypes == [torch.float32] * 4
        torch.testing.assert_close(output, resident(x), atol=4e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
        with Products() as seen:
            module(x[:, :1])
        assert seen.dtypes == [dtype] * 4  # one token a row: by kernels that read bf16


class Beside(Model):
    """A smaller one attends beside the blocks, as an encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.encoder(x))


def test_what_attends_beside_the_blocks_has_them_too_also_where_it_is_called_by_itself():
    torch.manual_seed(0)
    resident = Beside().eval().bfloat16()
    weights = {f"mid.{i:05d}": dict(block.state_dict()) for i, block in enumerate(resident.blocks)}
    weights["end"] = {f"encoder.{name}": tensor for name, tensor in resident.encoder.state_dict().items()}
    with torch.device("meta"):
        module = Beside().eval()
    x = torch.randn(2, 5, 16).bfloat16()
    with torch.no_grad(), offload(module, weights.__getitem__, memory="1GiB", rows=2, context=8, runtime=0, cache=0):
        with Products() as seen:
            output, alone = module(x), module.encoder(x)
        assert seen.dtypes == [torch.float32] * 8
        torch.testing.assert_close(output, resident(x), atol=4e-2, rtol=0)
        torch.testing.assert_close(alone, resident.encoder(x), atol=4e-2, rtol=0)
        with Products() as seen:
            module(x[:, :1])
        assert seen.dtypes == [torch.float32] * 2 + [torch.bfloat16] * 4
    assert "forward" not in vars(module.encoder)
