"""Tensors in one piece: products with them come in few shapes, and give the numbers that they give without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_partial_run._whole import Whole, whole

EXPERTS, INPUTS, OUTPUTS = 4, 16, 24
BOUNDS = [5, 5, 43, 44]  # where the rows of each expert end


def one_by_one(multiply: Any, x: Tensor, stack: Tensor) -> Tensor:
    starts = [0, *BOUNDS]
    return torch.cat([multiply(x[starts[i] : starts[i + 1]], stack[i]) for i in (0, 2, 3)])


def stored_the_other_way_round(stack: Tensor) -> Tensor:
    return stack.as_subclass(Tensor).mT.contiguous().as_subclass(type(stack))  # [experts, inputs, outputs]


WAYS: dict[str, Any] = {
    "linear": lambda x, stack: one_by_one(F.linear, x, stack),
    "with dimensions": lambda x, stack: one_by_one(lambda x, w: F.linear(x[None, :, None], w)[0, :, 0], x, stack),
    "matmul": lambda x, stack: one_by_one(lambda x, w: x @ w.T, x, stack),
    "mm": lambda x, stack: one_by_one(lambda x, w: torch.mm(x, w.t()), x, stack),
    "halves": lambda x, stack: one_by_one(
        lambda x, w: torch.cat([F.linear(x, half) for half in w.chunk(2)], dim=-1), x, stack
    ),
    "stored the other way round": lambda x, stack: one_by_one(torch.matmul, x, stored_the_other_way_round(stack)),
}
grouped: Any = getattr(torch, "_grouped_mm", None)
if grouped:
    ends = torch.tensor(BOUNDS, dtype=torch.int32)
    WAYS["grouped"] = lambda x, stack: grouped(x, stack.transpose(-2, -1), offs=ends)


@pytest.mark.parametrize("way", WAYS)
def test_products_come_in_few_shapes_and_give_the_same_numbers(way: str, rows_multiplied):
    torch.manual_seed(0)
    x, stack = torch.randn(44, INPUTS).bfloat16(), torch.randn(EXPERTS, OUTPUTS, INPUTS).bfloat16()
    exact, theirs = (WAYS["linear"](*both) for both in ((x.double(), stack.double()), (x, stack)))
    with rows_multiplied as rows:
        ours = WAYS[way](x, whole(stack))
    assert rows.met == {8, 64, 1}  # of 5, 38 and 1
    assert type(ours) is Tensor
    assert (ours - exact).abs().mean() <= 1.01 * (theirs - exact).abs().mean()


def test_only_what_lies_in_its_memory_is_one_as_well():
    stack = whole(torch.ones(EXPERTS, OUTPUTS, INPUTS, dtype=torch.bfloat16))
    views = [stack[1], stack[torch.tensor(1)], stack.mT, *stack.unbind(), *stack.chunk(2), stack.view(-1, INPUTS)]
    assert {type(view) for view in views} == {Whole}
    others = [stack[torch.tensor([1, 2])], stack + 1, torch.ones(INPUTS) * stack[0, 0], stack.sum(), stack.float()]
    assert {type(other) for other in others} == {Tensor}


def test_a_tensor_that_onednn_keeps_no_code_for_stays_what_it_is():
    tensor = torch.ones(EXPERTS, OUTPUTS, INPUTS)
    assert whole(tensor) is tensor


@pytest.mark.parametrize("multiply", [torch.bmm, torch.matmul, lambda x, stack: x @ stack])
def test_all_experts_at_once_come_in_few_shapes_too(multiply: Any, rows_multiplied):
    torch.manual_seed(0)
    x, stack = torch.randn(EXPERTS, 11, INPUTS).bfloat16(), torch.randn(EXPERTS, INPUTS, OUTPUTS).bfloat16()
    with rows_multiplied as seen:
        ours = multiply(x, whole(stack))
    assert seen.met == {16}
    torch.testing.assert_close(ours, torch.bmm(x, stack), atol=4e-2, rtol=1e-2)


def test_it_goes_where_any_tensor_goes():
    stack, vectors = torch.randn(EXPERTS, 4, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    assert torch.equal(torch.vmap(lambda v: whole(stack) + v)(vectors), torch.vmap(lambda v: stack + v)(vectors))
    assert torch.equal(whole(stack[0]).to_sparse().to_dense(), stack[0])
