"""Modules, weights and calls that cannot be served are refused with the name of what is wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from foreign import HIDDEN, IDS, LAYERS, Backwards, Block, Model, on_meta, weights_of
from llm_partial_run import layout_from_module, offload


class Twice(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(block(x))
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


def test_experts_of_which_a_copy_is_made_for_each_token_are_refused_before_and_between_passes(case):
    module = on_meta()
    config = module.blocks[3].config = SimpleNamespace(_experts_implementation="batched_mm")  # as transformers says it
    refusal = r"Block has experts_implementation='batched_mm'.*copies.*'grouped_mm' or 'eager'"
    with pytest.raises(ValueError, match=refusal):
        case.offload(module=module)
    config._experts_implementation = "grouped_mm"
    with case.offload(module=module):
        expected = module(IDS)
        config._experts_implementation = "batched_mm"
        with pytest.raises(ValueError, match=refusal):
            module(IDS)
        config._experts_implementation = "eager"
        assert torch.equal(module(IDS), expected)


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


def test_a_key_that_the_module_has_no_place_for_is_named():
    layout = layout_from_module(on_meta())
    with pytest.raises(ValueError, match=r"checkpoint key 'blocks.12.up.weight' has no place in this Model"):
        layout("blocks.12.up.weight", {})
    assert layout("embed.weight", {}) == [("begin", "embed.weight"), ("end", "head.weight")]
    assert layout("head.weight", {}) == [("begin", "tied.head.weight")]  # read where there is no embed.weight
    assert layout("embed.scale", {}) == []  # computed


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

    def unable(*_: object) -> None:
        raise OSError

    case.kind = Forgetful
    with pytest.raises(ValueError, match=r"buffer embed.shift is on meta.*give buffers="):
        case.offload()
    Forgetful._init_weights = unable  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"buffer embed.shift is on meta.*give buffers="):
        case.offload(buffers={"embed.scale": torch.ones(())})
    del Forgetful._init_weights  # pyright: ignore[reportAttributeAccessIssue]
    with case.offload(buffers={"embed.shift": torch.ones(2)}) as run:
        assert run.module.embed.shift.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"buffers= has 'shift', which is no buffer"):
        case.offload(buffers={"shift": torch.ones(2)})


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
