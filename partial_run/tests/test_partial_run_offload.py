"""Modules that know nothing of parts: found, bound, and streamed in whatever order they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreign import HIDDEN, IDS, LAYERS, VOCAB, Backwards, Block, Case, Model, on_meta, weights_of
from llm_partial_run import _kinds, layout_from_module, offload


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
        body: Any = run.module.body
        if left == "by an error":
            handle = body.after.register_forward_hook(fail)
            with pytest.raises(OSError, match="after the blocks"):
                run.module(IDS)
            handle.remove()
        else:
            body(IDS)
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
            _ = torch.ones(1, HIDDEN) @ run.module.embed.weight.T


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
                _ = named[name] * 2


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


def test_computing_a_buffer_leaves_weights_in_memory_alone(case):
    module = Model().eval()
    module.embed.scale = nn.Buffer(torch.empty((), device="meta"), persistent=False)
    before = {name: nn.init.normal_(p).clone() for name, p in module.named_parameters()}
    with case.offload(module=module):
        torch.testing.assert_close(module(IDS), case.resident(IDS), atol=2e-5, rtol=0)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


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
