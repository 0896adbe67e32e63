"""Modules that know nothing of parts: found, bound, streamed in whatever order they compute, and given back."""

from __future__ import annotations

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_partial_run import BudgetError, _block_weights, _kinds, _units, layout_from_module, offload
from llm_partial_run._whole import Whole

VOCAB, HIDDEN, LAYERS = 96, 32, 12


class Block(nn.Module):
    """Registers its matrices in another order than it calls them in, and has one that is no Linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.experts = nn.Parameter(torch.empty(3, HIDDEN, HIDDEN))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return x + torch.einsum("btd,eod->bto", x, self.experts) / 8


class Scaled(nn.Embedding):
    """An embedding with a forward, and a buffer, of its own."""

    def __init__(self) -> None:
        super().__init__(VOCAB, HIDDEN)
        self.scale = nn.Buffer(torch.empty(()), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "scale"):
            self.scale.fill_(HIDDEN**0.5)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Model(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = Scaled()
        self.after = nn.Linear(HIDDEN, HIDDEN, bias=False)  # registered before the blocks, called after them
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.after(x))


def on_meta(kind: Any = Model) -> Any:
    with torch.device("meta"):
        return kind().eval()


def weights_of(model: nn.Module, *, without: tuple[str, ...] = ("head.weight",)) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint of the model holds, by part: each tensor once, where it is tied."""
    layout = layout_from_module(model)
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in model.state_dict().items():
        for part, name in layout(key, {}) if key not in without else ():
            weights.setdefault(part, {})[name] = tensor
    return weights


class Case:
    def __init__(self, path, store_of, kind: Any = Model) -> None:
        torch.manual_seed(0)
        self.path, self.store_of = path.parent, store_of
        self.kind, self.resident = kind, kind().eval().requires_grad_(False)
        for parameter in self.resident.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.weights = weights_of(self.resident)
        self.store = store_of(path, self.weights)

    def offload(self, memory: Any = "1GiB", module=None, **changes):
        budget: dict[str, Any] = dict(rows=2, context=8, runtime=0) | changes
        return offload(on_meta(self.kind) if module is None else module, self.store, memory=memory, **budget)

    def smallest(self, **changes) -> int:
        with pytest.raises(BudgetError) as refused:
            self.offload(1, **changes)
        return refused.value.smallest


@pytest.fixture
def case(tmp_path, file_store, monkeypatch):
    monkeypatch.setattr(_units, "SLICE", 2048)  # several slices a matrix
    monkeypatch.setattr(_kinds, "SMALL", 0)
    monkeypatch.setattr(_kinds, "TABLE", 0)
    found = Case(tmp_path / "weights", file_store)
    yield found
    found.store.close()


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_every_budget_gives_the_numbers_of_the_resident_module_and_the_same_bits(case):
    least, outputs, streamed = case.smallest(), [], set()
    for memory in (*range(least, least + 500_000, 60_000), 10**9):
        with case.offload(memory) as run:
            assert run.plan.used <= memory
            streamed.add(run.plan.streamed)
            outputs += [run.module(IDS), run.module(IDS), run.module(IDS[:, :1])]
    assert len(streamed) > 5
    assert 0 in streamed
    torch.testing.assert_close(outputs[0], case.resident(IDS), atol=2e-5, rtol=0)
    for output in outputs[3:]:
        assert any(torch.equal(output, first) for first in outputs[:3])


def test_the_order_of_the_first_pass_is_read_ahead_in_the_next(case, recwarn):
    with case.offload(case.smallest()) as run:
        read = []
        for _ in range(3):
            before = run.stats.bytes_read
            run.module(IDS)
            read.append(run.stats.bytes_read - before)
        looked_up = read[1] - run.plan.streamed
        assert 0 < looked_up <= IDS.unique().numel() * HIDDEN * 4
        assert read[0] > read[1] == read[2]
    assert not recwarn.list


class Outer(nn.Module):
    """The blocks are called by a module within, and a head by the one around it, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Model()
        self.last = nn.Linear(VOCAB, HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.body(ids))


@pytest.mark.parametrize("left", ["by an error", "with the inner module"])
def test_a_first_pass_that_ends_early_does_not_settle_the_order(case, recwarn, left):
    outer = Case(case.path / "outer", case.store_of, Outer)
    with outer.offload(outer.smallest()) as run:
        if left == "by an error":
            handle = run.module.body.after.register_forward_hook(fail)
            with pytest.raises(OSError, match="after the blocks"):
                run.module(IDS)
            handle.remove()
        else:
            run.module.body(IDS)
        run.module(IDS)  # finds the order
        before = run.stats.bytes_read
        torch.testing.assert_close(run.module(IDS), outer.resident(IDS), atol=2e-5, rtol=0)
        assert run.stats.bytes_read - before <= run.plan.streamed + IDS.unique().numel() * HIDDEN * 4
    assert not recwarn.list
    outer.store.close()


def fail(*_: object) -> None:
    raise OSError("after the blocks")


def test_rows_of_an_embedding_are_looked_up_and_its_tied_head_computes_with_all(case):
    with case.offload(case.smallest()) as run:
        assert ("end", "head.weight") in {(unit.part, unit.name) for unit in run._weights._model.units}
        assert torch.equal(run.module.embed(IDS), case.resident.embed(IDS))
        with pytest.raises(RuntimeError, match=r"embed.weight is offloaded, and T needs it"):
            torch.ones(1, HIDDEN) @ run.module.embed.weight.T


def test_a_small_embedding_is_there_as_a_whole_beside_its_tied_head(case, monkeypatch):
    monkeypatch.setattr(_kinds, "TABLE", VOCAB * HIDDEN * 4)
    with case.offload(case.smallest()) as run:
        assert torch.equal(run.module.embed.weight, case.resident.embed.weight)
        torch.testing.assert_close(run.module(IDS), case.resident(IDS), atol=2e-5, rtol=0)


def test_a_matrix_looks_like_itself_while_it_is_away(case):
    with case.offload(case.smallest(), dtype=torch.bfloat16) as run:
        for name, parameter in run.module.named_parameters():
            assert (parameter.device.type, parameter.dtype) == ("cpu", torch.bfloat16), name
            assert parameter.shape == case.resident.get_parameter(name).shape
        assert run.module(IDS).dtype == torch.bfloat16


def test_whole_blocks_serve_blocks_that_compute_in_ways_of_their_own(tmp_path, file_store):
    class Strange(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.linear(torch.relu(F.linear(self.norm(x), self.up.weight)), self.down.weight * 2)

    class StrangeModel(Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Strange() for _ in range(LAYERS))

    case = Case(tmp_path / "weights", file_store, StrangeModel)
    with (
        case.offload() as run,
        pytest.raises(RuntimeError, match=r"up.weight is offloaded, and linear needs it.*Give whole_b"),
    ):
        run.module(IDS)
    for memory in (case.smallest(whole_blocks=True), "1GiB"):
        with case.offload(memory, whole_blocks=True) as run:
            torch.testing.assert_close(run.module(IDS), case.resident(IDS), atol=2e-5, rtol=0)
    case.store.close()


@pytest.mark.parametrize("whole_blocks", [False, True])
def test_a_module_that_computes_with_matrices_outside_their_block_is_told_that_it_cannot_be_offloaded(
    case, whole_blocks
):
    with case.offload(case.smallest(whole_blocks=whole_blocks), whole_blocks=whole_blocks) as run:
        named = dict(run.module.named_parameters())
        for name in ("blocks.3.up.weight", "blocks.3.experts", "embed.weight"):
            with pytest.raises(
                RuntimeError, match=rf"{name.removeprefix('blocks.3.')} is offloaded, and mul.*so cannot be offloaded"
            ):
                named[name] * 2


@pytest.mark.parametrize("work", [nn.Module.state_dict, copy.deepcopy, nn.Module.half], ids=["save", "copy", "convert"])
def test_what_takes_all_weights_of_an_offloaded_module_is_told_to_close_it_first(case, work):
    module = on_meta()
    with (
        case.offload(case.smallest(), module),
        pytest.raises(RuntimeError, match=r"is offloaded, and .* close the offload first"),
    ):
        work(module)
    work(module)


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_closing_gives_the_module_its_own_state_back_and_leaves_no_thread_or_file(case, error):
    module = on_meta()
    own = module.head.forward = module.head.forward  # as others do who wrap a module
    before = {name: id(p) for name, p in module.state_dict(keep_vars=True).items()}
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))

    def work():
        with case.offload(case.smallest(), module) as run:
            module(IDS)
            assert threading.active_count() > threads
            assert module.embed.scale.item() == pytest.approx(HIDDEN**0.5)
            if error is not None:
                handle = module.blocks[5].norm.register_forward_hook(fail)
                try:
                    module(IDS)
                finally:
                    handle.remove()
            run.close()

    def fail(*_):
        raise error("in the middle of a pass")

    if error is None:
        work()
    else:
        with pytest.raises(error, match="in the middle"):
            work()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    assert {name: id(p) for name, p in module.state_dict(keep_vars=True).items()} == before
    assert module.embed.scale.is_meta
    assert vars(module.head).pop("forward") is own
    for child in module.modules():
        assert "forward" not in vars(child)
        assert not child._forward_hooks
        assert not child._forward_pre_hooks
    with case.offload(module=module):  # and it serves again
        torch.testing.assert_close(module(IDS), case.resident(IDS), atol=2e-5, rtol=0)


def test_a_second_thread_is_refused_at_once_while_a_pass_runs(case):
    inside, told = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert told.wait(20)

    with case.offload(case.smallest()) as run, ThreadPoolExecutor() as pool:
        expected = run.module(IDS)
        handle = run.module.blocks[5].norm.register_forward_hook(wait)
        first = pool.submit(run.module, IDS)
        assert inside.wait(20)
        for module, x in ((run.module, IDS), (run.module.blocks[0], expected)):
            with pytest.raises(RuntimeError, match=r"a pass of this Model is running in thread 'ThreadPool.*one call"):
                module(x)
        told.set()
        assert torch.equal(first.result(20), expected)
        handle.remove()
        assert torch.equal(run.module(IDS), expected)
        assert torch.equal(pool.submit(run.module, IDS).result(20), expected)
        assert run.stats.passes == 4


@pytest.mark.filterwarnings("ignore:.*not its turn")
def test_what_lies_beside_the_blocks_serves_other_threads_too(case):
    x = torch.randn(1, 3, HIDDEN)
    with case.offload(case.smallest()) as run, ThreadPoolExecutor(8) as pool:
        expected, after = run.module(IDS), run.module.after(x)
        passes = pool.submit(lambda: [run.module(IDS) for _ in range(30)])
        results = list(pool.map(run.module.after, [x] * 300))
        assert all(torch.equal(result, after) for result in results)
        assert all(torch.equal(result, expected) for result in passes.result(20))


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
        expected, others = run.module(IDS), [run.module.after, run.module.blocks[7].up]
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


@pytest.mark.parametrize("memory", ["smallest", "1GiB"])
def test_closing_waits_for_a_pass_in_another_thread_which_ends_with_an_error(case, memory):
    inside, told = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert told.wait(20)

    run = case.offload(case.smallest() if memory == "smallest" else memory)
    with ThreadPoolExecutor() as pool:
        handle = run.module.blocks[5].norm.register_forward_hook(wait)
        first = pool.submit(run.module, IDS)
        assert inside.wait(20)
        closing = pool.submit(run.close)
        with pytest.raises(FutureTimeoutError):
            closing.result(0.2)
        told.set()
        with pytest.raises(
            RuntimeError, match=r"this Model is offloaded no more: it was closed|the run was closed while"
        ):
            first.result(20)
        closing.result(20)
        handle.remove()
    assert all(type(parameter) is nn.Parameter for parameter in run.module.parameters())
    run.close()


def test_closing_within_a_pass_is_refused_and_harms_nothing(case):
    run = case.offload(case.smallest())
    expected = run.module(IDS)
    handle = run.module.blocks[5].norm.register_forward_hook(lambda *_: run.close())
    with pytest.raises(
        RuntimeError, match="a pass of this Model is running in this very thread: close it after the pass"
    ):
        run.module(IDS)
    handle.remove()
    assert torch.equal(run.module(IDS), expected)
    run.close()
    assert all(type(parameter) is nn.Parameter for parameter in run.module.parameters())


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_interrupted_pass_hinders_no_other_thread(case, by_hand):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with case.offload(case.smallest()) as run, ThreadPoolExecutor() as pool:
        expected = run.module(IDS)
        handle = run.module.blocks[0].up.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.module.blocks[0](torch.ones(1, 2, HIDDEN)) if by_hand else run.module(IDS)
        handle.remove()
        assert torch.equal(pool.submit(run.module, IDS).result(20), expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pass_that_a_thread_has_died_in_hinders_no_other(case):
    with case.offload(case.smallest()) as run:
        expected = run.module(IDS)
        handle = run.module.blocks[5].norm.register_forward_hook(leave)
        thread = threading.Thread(target=run.module, args=(IDS,))
        thread.start()
        thread.join(20)
        handle.remove()
        assert torch.equal(run.module(IDS), expected)


def leave(*_: object) -> None:
    raise SystemExit


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_pass_left_in_the_middle_is_started_over(case, error):
    with case.offload(case.smallest()) as run:
        expected = run.module(IDS)

        def fail(*_):
            raise error

        handle = run.module.blocks[7].up.register_forward_pre_hook(fail)
        with pytest.raises(error):
            run.module(IDS)
        handle.remove()
        assert torch.equal(run.module(IDS), expected)
        assert run.stats.passes == 2


def test_errors_in_the_last_slice_of_a_pass_take_no_slot_from_the_ring(case, monkeypatch):
    product, weights = _block_weights.product, []
    monkeypatch.setattr(
        _block_weights, "product", lambda x, weight, bias: weights.append(weight) or product(x, weight, bias)
    )

    def fail_at_the_end(x, weight, bias):
        weights.append(weight)
        if len(weights) == count:
            raise OSError("the last one")
        return product(x, weight, bias)

    with case.offload(case.smallest()) as run:
        expected = run.module(IDS)
        count = len(weights)
        monkeypatch.setattr(_block_weights, "product", fail_at_the_end)
        for _ in range(run.plan.slots + 1):
            weights.clear()
            with pytest.raises(OSError, match="the last one"):
                run.module(IDS)
            assert run._weights._stream._released >= run._weights._stream._taken - 1
        monkeypatch.setattr(_block_weights, "product", product)
        assert torch.equal(run.module(IDS), expected)


def test_a_read_error_surfaces_as_itself_and_the_next_pass_is_right(case):
    with case.offload(case.smallest()) as run:
        expected = run.module(IDS)
        case.store.fail_after = case.store.reads + 4
        with pytest.raises(OSError, match="the disk is gone"):
            run.module(IDS)
        case.store.fail_after = None
        assert torch.equal(run.module(IDS), expected)


def test_a_read_error_while_loading_leaves_the_module_as_it_was(case):
    module, threads = on_meta(), threading.active_count()
    case.store.fail_after = 40
    with pytest.raises(OSError, match="the disk is gone"):
        case.offload(module=module)
    assert all(type(parameter) is nn.Parameter and parameter.is_meta for parameter in module.parameters())
    assert threading.active_count() == threads


def test_the_inner_module_and_fewer_blocks_may_be_called_alone(case):
    with case.offload(case.smallest()) as run:
        expected = run.module(IDS)
        every, run.module.blocks = run.module.blocks, nn.ModuleList(list(run.module.blocks)[:5]).eval()
        with pytest.warns(UserWarning, match=r"after.weight\[0:16\] was asked for when it was not its turn"):
            early = run.module(IDS)  # as an early exit does
        assert run.stats.passes == 1
        run.module.blocks = every
        assert not torch.equal(early, expected)
        assert torch.equal(run.module(IDS), expected)


class Twice(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(block(x))
        return x


class Backwards(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in reversed(self.blocks):
            x = block(x)
        return x


@pytest.mark.parametrize("memory", ["smallest", "1GiB"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Twice, r"blocks.0 was called a second time in one pass"),
        (Backwards, r"blocks.11 was called where blocks.0 is next.*Give blocks="),
    ],
)
def test_blocks_called_twice_or_out_of_order_are_refused(case, kind, message, memory):
    case.kind = kind
    with case.offload(case.smallest() if memory == "smallest" else memory) as run:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                run.module(IDS)


def test_an_order_that_is_given_is_followed_with_the_weights_as_any_layout_numbers_them(case):
    case.kind = case.resident.__class__ = Backwards
    module = on_meta(Backwards)
    given = list(reversed(module.blocks))
    for layout in (layout_from_module(module), layout_from_module(module, blocks=given)):
        assert layout("blocks.11.up.weight", {}) == [("mid.00011", "up.weight")]
    for memory in (case.smallest(module=module, blocks=given), "1GiB"):
        with case.offload(memory, module, blocks=given) as run:
            assert run.blocks[0] == "blocks.11"
            torch.testing.assert_close(module(IDS), case.resident(IDS), atol=2e-5, rtol=0)


def test_an_order_that_is_given_is_read_ahead_from_the_first_pass_on(tmp_path, file_store):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(128, 128) for _ in range(LAYERS))

        def forward(self, x: Tensor) -> Tensor:
            for block in reversed(self.blocks):
                x = x + torch.tanh(block(x))
            return x

    case, module = Case(tmp_path / "weights", file_store, Plain), on_meta(Plain)
    given, x = list(reversed(module.blocks)), torch.randn(1, 3, 128)
    with case.offload(case.smallest(module=module, blocks=given), module, blocks=given) as run:
        torch.testing.assert_close(module(x), case.resident(x), atol=2e-5, rtol=0)
        assert run.stats.bytes_read == run.plan.streamed > 0
    case.store.close()


def test_training_and_gradients_are_refused(case):
    module = on_meta()
    with pytest.raises(ValueError, match=r"training mode.*call its eval\(\)"):
        case.offload(module=module.train())
    with case.offload(module=module.eval()):
        module.train()
        with pytest.raises(ValueError, match="training mode"):
            module(IDS)
        module.eval()
        x = torch.zeros(1, 2, HIDDEN, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"requires gradients.*torch.no_grad"):
            module.blocks[0](x)
        with torch.no_grad():
            module.blocks[0](x)
        assert not module(IDS).requires_grad


def test_training_mode_of_an_inner_module_is_refused(case):
    module = on_meta()
    module.blocks[3].norm.train()
    with pytest.raises(ValueError, match=r"LayerNorm is in training mode"):
        case.offload(module=module)


@pytest.mark.parametrize("memory", ["smallest", "1GiB"])
@pytest.mark.parametrize("whole_blocks", [False, True])
@pytest.mark.parametrize("inside", ["embed", "after", "blocks.11.norm", "blocks.11.down"])
def test_gradients_that_begin_inside_are_refused(case, inside, whole_blocks, memory):
    budget = case.smallest(whole_blocks=whole_blocks) if memory == "smallest" else memory
    with case.offload(budget, whole_blocks=whole_blocks) as run:
        expected = run.module(IDS)
        shift = torch.zeros(HIDDEN, requires_grad=True)
        run.module.get_submodule(inside).register_forward_hook(
            lambda module, args, output: output + shift[: output.shape[-1]]
        )
        with pytest.raises(RuntimeError, match=r"is offloaded, and .* requires gradients.*torch.no_grad"):
            run.module(IDS)
        with torch.no_grad():
            assert torch.equal(run.module(IDS), expected)


@pytest.mark.parametrize("memory", ["smallest", "1GiB"])
def test_gradients_that_begin_before_a_tensor_in_one_piece_are_refused(case, memory):
    """Its memory is another block's when a backward pass would come."""
    with case.offload(case.smallest() if memory == "smallest" else memory) as run:
        shift = torch.zeros(HIDDEN, requires_grad=True)
        run.module.blocks[0].down.register_forward_hook(lambda module, args, output: output + shift)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"blocks.0 is offloaded, and its output requires gradients"):
                run.module.blocks[0](torch.ones(1, 2, HIDDEN))
        with torch.no_grad():
            run.module.blocks[0](torch.ones(1, 2, HIDDEN))


@pytest.mark.parametrize("name", ["blocks.4.up", "after"])
@pytest.mark.parametrize("whole_blocks", [False, True])
def test_a_forward_of_the_instance_is_called_and_kept(case, name, whole_blocks):
    module = on_meta()
    for changed in (module, case.resident):
        linear = changed.get_submodule(name)
        linear.forward = lambda x, linear=linear: 2 * F.linear(x, linear.weight)
    own = module.get_submodule(name).forward
    with case.offload(module=module, whole_blocks=whole_blocks):
        torch.testing.assert_close(module(IDS), case.resident(IDS), atol=2e-5, rtol=0)
    assert vars(module.get_submodule(name))["forward"] is own


def test_a_key_that_the_module_has_no_place_for_is_named():
    layout = layout_from_module(on_meta())
    with pytest.raises(ValueError, match=r"checkpoint key 'blocks.12.up.weight' has no place in this Model"):
        layout("blocks.12.up.weight", {})
    assert layout("embed.weight", {}) == [("begin", "embed.weight"), ("end", "head.weight")]
    assert layout("head.weight", {}) == [("begin", "tied.head.weight")]  # read where there is no embed.weight
    assert layout("embed.scale", {}) == []  # computed


def test_a_tied_tensor_is_read_from_whichever_name_it_is_stored_under(case):
    case.weights = weights_of(case.resident, without=("embed.weight",))
    assert "end" not in case.weights
    stored = sum(p.nbytes for p in case.resident.parameters())
    case.store = case.store_of(case.path / "the head alone", case.weights)
    for memory in (case.smallest(), "1GiB"):
        with case.offload(memory) as run:
            assert run.plan.stored == stored
            torch.testing.assert_close(run.module(IDS), case.resident(IDS), atol=2e-5, rtol=0)


def test_a_tied_tensor_that_is_stored_twice_has_to_be_the_same(case):
    weights = weights_of(case.resident, without=())
    case.store = case.store_of(case.path / "both", weights)
    with case.offload() as run:
        torch.testing.assert_close(run.module(IDS), case.resident(IDS), atol=2e-5, rtol=0)
    weights["begin"]["embed.weight"][0, 0] = torch.nan
    weights["begin"]["tied.head.weight"] = weights["begin"]["embed.weight"].clone()
    case.store = case.store_of(case.path / "with a NaN", weights)
    case.offload().close()
    weights["begin"]["tied.head.weight"][-1, -1] += 1
    case.store = case.store_of(case.path / "two", weights)
    with pytest.raises(ValueError, match=r"embed.weight and head.weight are one tensor in this Model.*tie_word_emb"):
        case.offload()


def test_what_the_module_has_in_another_dtype_than_most_of_its_tensors_keeps_it(case):
    module = on_meta()
    module.blocks[4].norm.weight = nn.Parameter(torch.empty(HIDDEN, dtype=torch.float64, device="meta"))
    for dtype in (None, torch.bfloat16):
        with case.offload(module=module, dtype=dtype):
            dtypes = {name: p.dtype for name, p in module.named_parameters()}
            assert dtypes.pop("blocks.4.norm.weight") == torch.float64
            assert set(dtypes.values()) == {dtype or torch.float32}


def test_the_computing_dtype_is_that_of_most_bytes_where_a_tied_embedding_has_another(case):
    begin = {name: tensor.half() for name, tensor in case.weights["begin"].items()}
    with offload(on_meta(), (case.weights | {"begin": begin}).__getitem__, memory="1GiB", context=8, runtime=0) as run:
        assert run.plan.dtype == run.module(IDS[:1]).dtype == torch.float32


def test_weights_in_eight_bits_and_dtypes_that_nothing_is_computed_in_are_refused(case):
    with pytest.raises(ValueError, match="dtype=torch.int8 is none to compute in"):
        case.offload(dtype=torch.int8)
    case.weights["mid.00003"]["up.weight"] = case.weights["mid.00003"]["up.weight"].to(torch.float8_e5m2)
    with pytest.raises(ValueError, match="up.weight is stored as torch.float8_e5m2.*quantized weights cannot"):
        offload(on_meta(), case.weights.__getitem__, memory="1GiB", context=8, runtime=0)


def test_a_module_that_does_not_fit_the_weights_is_named(case):
    case.store._at["mid.00003", "up.weight"] = case.store._at["mid.00003", "down.weight"]
    with pytest.raises(
        ValueError, match=r"mid.00003: up.weight is \[32, 64\] in the weights and \[64, 32\] in the module"
    ):
        case.offload()
    del case.store._at["mid.00003", "up.weight"]
    with pytest.raises(ValueError, match=r"mid.00003: the weights have no 'up.weight'"):
        case.offload()


def test_a_number_without_a_dimension_is_refused_and_served_with_one():
    class Shifted(Block):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.empty(shape))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shift

    class WithShift(Model):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Shifted(*shape) for _ in range(LAYERS))

    resident = WithShift().eval()
    for parameter in resident.parameters():
        nn.init.normal_(parameter, std=0.2)
    weights = weights_of(resident)
    with pytest.raises(ValueError, match=r"mid.00000: shift is a single number.*shape \[1\].*load\(part\)"):
        offload(on_meta(WithShift), weights.__getitem__, memory="1GiB", runtime=0)

    def load(part: str) -> dict[str, Tensor]:
        return {name: tensor.reshape(tensor.shape or (1,)) for name, tensor in weights[part].items()}

    with torch.no_grad(), offload(on_meta(lambda: WithShift(1)), load, memory="1GiB", runtime=0) as run:
        torch.testing.assert_close(run.module(IDS), resident(IDS), atol=2e-5, rtol=0)


def test_a_module_without_blocks_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"Linear has no sequence of blocks.*give blocks="):
        layout_from_module(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"blocks='layers' is no list of modules in Model; there are \['blocks'\]"):
        layout_from_module(on_meta(), blocks="layers")
    with pytest.raises(ValueError, match=r"blocks= has a Linear that is no child of Model"):
        layout_from_module(on_meta(), blocks=[nn.Linear(2, 2)])
    shared = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"0 is in the sequence of blocks more than once"):
        layout_from_module(nn.Sequential(shared, shared))


def test_a_buffer_that_nothing_computes_is_refused_unless_it_is_given(case):
    class Forgetful(Model):
        def __init__(self) -> None:
            super().__init__()
            self.embed.shift = nn.Buffer(torch.empty(2), persistent=False)

    case.kind = Forgetful
    with pytest.raises(ValueError, match=r"buffer embed.shift is on meta.*give buffers="):
        case.offload()
    Forgetful._init_weights = fail  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"buffer embed.shift is on meta.*give buffers="):
        case.offload(buffers={"embed.scale": torch.ones(())})
    del Forgetful._init_weights  # pyright: ignore[reportAttributeAccessIssue]
    with case.offload(buffers={"embed.shift": torch.ones(2)}) as run:
        assert run.module.embed.shift.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"buffers= has 'shift', which is no buffer"):
        case.offload(buffers={"shift": torch.ones(2)})


def test_computing_a_buffer_leaves_weights_in_memory_alone(case):
    module = Model().eval()
    module.embed.scale = nn.Buffer(torch.empty((), device="meta"), persistent=False)
    before = {name: nn.init.normal_(p).clone() for name, p in module.named_parameters()}
    with case.offload(module=module):
        torch.testing.assert_close(module(IDS), case.resident(IDS), atol=2e-5, rtol=0)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


def test_more_tokens_than_planned_are_refused(case):
    with (
        case.offload(tokens=9) as run,
        pytest.raises(ValueError, match=r"10 tokens in one call are more than the 9.*tokens="),
    ):
        run.module(IDS)


def test_layers_that_keep_something_else_than_keys_and_values_need_the_bytes_of_it(case):
    class Recurrent(Model):
        _is_stateful = True  # as transformers marks them

    case.kind = Recurrent
    with pytest.raises(ValueError, match=r"Recurrent has recurrent layers.*not counted. Give cache="):
        case.offload()
    with case.offload(cache="1MiB") as run:
        assert run.plan.caches == 1 << 20
        torch.testing.assert_close(run.module(IDS), case.resident(IDS), atol=2e-5, rtol=0)


def test_a_module_is_offloaded_once_at_a_time(case):
    module = on_meta()
    with case.offload(module=module), pytest.raises(ValueError, match="offloaded already"):
        case.offload(module=module)


def test_a_plain_load_callable_is_enough(case):
    with offload(on_meta(), case.weights.__getitem__, memory="1GiB", rows=2, context=8) as run:
        torch.testing.assert_close(run.module(IDS), case.resident(IDS), atol=2e-5, rtol=0)


def test_device_memory_comes_first_and_gives_the_same_bits(case):
    with case.offload() as run:
        expected = run.module(IDS)
    with case.offload(180_000, device_memory=200_000) as run:
        assert min(run.plan.device, run.plan.host, run.plan.streamed) > 0
        for _ in range(3):
            assert torch.equal(run.module(IDS), expected)


def test_progress_is_told_while_loading_and_in_each_pass(case):
    told = []
    with case.offload(progress=lambda *report: told.append(report)) as run:
        run.module(IDS)
    assert ("loading", run.plan.resident, run.plan.resident) in told
    assert told[-1] == ("pass", LAYERS, LAYERS)


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
        Attending.noted.append(("attention", torch.backends.mkldnn.enabled))


def test_attention_for_one_token_a_row_goes_without_onednn_and_linears_of_several_rows_with_it(case, monkeypatch):
    own = Case(case.path / "of attention", case.store_of, Attending)
    real = F.linear
    note = Attending.noted.append
    monkeypatch.setattr(F, "linear", lambda *args: note(("linear", torch.backends.mkldnn.enabled)) or real(*args))
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
        monkeypatch.setattr(Attending, "attend", lambda: other.submit(run.module.beside, x).result(timeout=20))
        run.module(x)
    own.store.close()
