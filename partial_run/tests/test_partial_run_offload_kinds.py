"""Matrices that are bound or multiplied in other ways than a Linear's, and attention beside them: which kernels they meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreign import HIDDEN, IDS, VOCAB, Block, Case, Model
from llm_partial_run import _kinds
from llm_partial_run._whole import Whole


class Conv1D(nn.Module):
    """As GPT-2's, by whose name it is known: a slice of its matrix gives no outputs, so that it is bound as one."""

    met: ClassVar[set[tuple[int, bool]]] = set()  # numbers of rows, and whether oneDNN was on

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(HIDDEN, HIDDEN)), nn.Parameter(torch.empty(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        Conv1D.met.add((x.numel() // HIDDEN, bool(torch.backends.mkldnn.enabled)))
        return x @ self.weight + self.bias


Conv1D.__module__, _, Conv1D.__qualname__ = _kinds.CONV1D.rpartition(".")


class Convolutions(Model):
    def __init__(self) -> None:
        super().__init__()
        self.after = Conv1D()
        for block in self.blocks:
            block.up, block.down = Conv1D(), Conv1D()


@pytest.mark.filterwarnings("ignore:.*not its turn")
def test_matrices_bound_as_one_while_they_are_called_serve_other_threads_too(case):
    case = Case(case.path / "convolutions", case.store_of, Convolutions)
    x = torch.randn(1, 3, HIDDEN)
    with case.offload(case.smallest()) as run, ThreadPoolExecutor(8) as pool:
        module: Any = run.module
        expected, others = module(IDS), [module.after, module.blocks[7].up]
        beside = [module(x) for module in others]
        passes = pool.submit(lambda: [run.module(IDS) for _ in range(30)])
        results = list(pool.map(lambda module: module(x), others * 150))
        assert all(map(torch.equal, results, beside * 150))
        assert all(torch.equal(result, expected) for result in passes.result(20))
    torch.testing.assert_close(expected, case.resident(IDS), atol=2e-5, rtol=0)
    case.store.close()


@pytest.mark.parametrize("memory", ["smallest", "1GiB"])
def test_matrices_bound_as_one_while_they_are_called_meet_few_numbers_of_rows_in_16_bits(case, memory):
    case = Case(case.path / "convolutions", case.store_of, Convolutions)
    budget = dict(context=128, dtype=torch.bfloat16)
    with case.offload(case.smallest(**budget) if memory == "smallest" else memory, **budget) as run, torch.no_grad():
        Conv1D.met.clear()
        for tokens in range(65, 129):
            assert run.module(torch.ones(1, tokens, dtype=torch.long)).shape == (1, tokens, VOCAB)
    assert Conv1D.met == {(128, True)}
    case.store.close()


class Stacks(Model):
    """Its blocks note of what kind their experts are."""

    kinds: ClassVar[set[type]] = set()

    class Block(Block):
        def forward(self, x: Tensor) -> Tensor:
            Stacks.kinds.add(type(self.experts))
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Stacks.Block() for _ in self.blocks)


@pytest.mark.parametrize("memory", ["smallest", "1GiB"])
def test_a_tensor_in_one_piece_sees_to_the_number_of_rows_itself_in_16_bits(case, memory):
    case = Case(case.path / "stacks", case.store_of, Stacks)
    budget = dict(dtype=torch.bfloat16)
    with case.offload(case.smallest(**budget) if memory == "smallest" else memory, **budget) as run, torch.no_grad():
        Stacks.kinds.clear()
        run.module(IDS)
    assert Stacks.kinds == {Whole}
    case.store.close()


class Routed(Model):
    """Its blocks multiply with a small matrix, which always stays, in a way of their own."""

    class Block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Parameter(torch.empty(3, HIDDEN))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * F.linear(x, self.router).softmax(-1).amax(-1, keepdim=True)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Routed.Block() for _ in range(2))


@pytest.mark.parametrize("whole_blocks", [False, True])
@pytest.mark.parametrize("memory", ["smallest", "1GiB"])
def test_small_matrices_that_always_stay_meet_few_numbers_of_rows_in_16_bits(
    case, monkeypatch, rows_multiplied, memory, whole_blocks
):
    monkeypatch.setattr(_kinds, "SMALL", 1 << 20)
    case = Case(case.path / "routed", case.store_of, Routed)
    budget = dict(context=128, dtype=torch.bfloat16, whole_blocks=whole_blocks)
    budget["memory"] = case.smallest(**budget) if memory == "smallest" else memory
    with case.offload(**budget) as run, torch.no_grad(), rows_multiplied as seen:
        for tokens in range(65, 129, 9):
            run.module(torch.ones(1, tokens, dtype=torch.long))
    assert seen.met == {128}
    case.store.close()


class FalconLinear(nn.Linear):
    """As Falcon's, by whose name it is known: the bias is added to rounded sums."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


FalconLinear.__module__, _, FalconLinear.__qualname__ = _kinds.FALCON.rpartition(".")


class Falcons(Model):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.up, block.down = FalconLinear(HIDDEN, 2 * HIDDEN), FalconLinear(2 * HIDDEN, HIDDEN)


def test_slices_of_a_falcon_meet_few_numbers_of_rows_in_16_bits(case, monkeypatch):
    case = Case(case.path / "falcons", case.store_of, Falcons)
    met, real = set(), F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, *others: met.add((x.numel() // x.shape[-1], x.shape[-1])) or real(x, *others)
    )
    with case.offload(dtype=torch.bfloat16, context=128) as run, torch.no_grad():
        for tokens in range(65, 129):
            run.module(torch.ones(1, tokens, dtype=torch.long))
    assert met == {(128, HIDDEN), (128, 2 * HIDDEN)}
    case.store.close()


class Attending(nn.Module):
    """Its block's own code notes whether oneDNN is on."""

    noted: ClassVar[list[tuple[str, bool]]] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(HIDDEN, HIDDEN, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            Attending.attend()
            return self.up(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attending.Block() for _ in range(2))
        self.beside = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    @staticmethod
    def attend() -> None:
        Attending.noted.append(("attention", bool(torch.backends.mkldnn.enabled)))


def test_attention_for_one_token_a_row_goes_without_onednn_and_linears_of_several_rows_with_it(case, monkeypatch):
    own = Case(case.path / "of attention", case.store_of, Attending)
    real = F.linear
    note = Attending.noted.append
    monkeypatch.setattr(F, "linear", lambda *args: note(("linear", bool(torch.backends.mkldnn.enabled))) or real(*args))
    shapes = {(3, 1): False, (1, 1): False, (3, 2): True}  # rows and tokens, and whether attention has oneDNN
    with own.offload(dtype=torch.bfloat16, rows=3) as run, torch.no_grad():
        for shape, attention in shapes.items():
            Attending.noted.clear()
            run.module(torch.ones(*shape, HIDDEN, dtype=torch.bfloat16))
            assert set(Attending.noted) == {("attention", attention), ("linear", shape != (1, 1))}, shape
    assert torch.backends.mkldnn.enabled
    own.store.close()


class AttendingConvolutions(Attending):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.up = Conv1D()


@pytest.mark.parametrize("memory", ["smallest", "1GiB"])
def test_attention_goes_without_onednn_and_matrices_bound_as_one_beside_it_with_it(case, memory):
    own = Case(case.path / "of attention", case.store_of, AttendingConvolutions)
    budget = dict(rows=3, dtype=torch.bfloat16)
    with own.offload(own.smallest(**budget) if memory == "smallest" else memory, **budget) as run, torch.no_grad():
        for rows in (1, 3):
            Attending.noted.clear()
            Conv1D.met.clear()
            run.module(torch.ones(rows, 1, HIDDEN, dtype=torch.bfloat16))
            assert {*Attending.noted} == {("attention", False)}
            assert [onednn for _, onednn in Conv1D.met] == [True]
    own.store.close()


def test_a_block_that_attends_may_wait_for_a_linear_beside_it_in_another_thread(case, monkeypatch):
    own = Case(case.path / "of attention", case.store_of, Attending)
    x = torch.ones(1, 1, HIDDEN, dtype=torch.bfloat16)
    with own.offload(dtype=torch.bfloat16) as run, ThreadPoolExecutor(1) as other:
        beside: Any = run.module.beside
        monkeypatch.setattr(Attending, "attend", lambda: other.submit(beside, x).result(timeout=20))
        run.module(x)
    own.store.close()
