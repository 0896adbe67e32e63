from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_llama_model import Config, parts
from llm_llama_model._model import visible

TINY = {
    "model_type": "mistral",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": None,
}
MODELS = {
    "full": TINY,
    "window": TINY | {"sliding_window": 3},
    "heads alone": TINY | {"num_key_value_heads": 4},
    "one kv head": TINY | {"num_key_value_heads": 1},
    "qwen3": TINY | {"model_type": "qwen3", "head_dim": 10},
    "qwen2 mixed": TINY
    | {"model_type": "qwen2", "sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
    "mixtral": TINY | {"model_type": "mixtral", "num_local_experts": 5},
    "qwen3_moe": TINY
    | {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
}
T = 11


def fill(modules: dict[str, nn.Module], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Binds plain tensors in place of the meta parameters, as a runner does."""
    generator = torch.Generator().manual_seed(0)
    for module in modules.values():
        for name in list(module.state_dict()):
            owner, _, leaf = name.rpartition(".")
            parameters: dict[str, Any] = module.get_submodule(owner)._parameters
            tensor = torch.randn(parameters[leaf].shape, generator=generator) * 0.3
            parameters[leaf] = (tensor + ("norm" in name)).to(dtype)
    return modules


def positions_of(start: int, stop: int, rows: int = 1) -> Tensor:
    return torch.arange(start, stop).expand(rows, -1)


class Model:
    def __init__(self, config: dict, rows: int = 1, slots: int = T + 1) -> None:
        self.modules = fill(parts(Config.from_hf(config)))
        self.layers = [module for name, module in self.modules.items() if name.startswith("mid")]
        self.caches = [layer.new_cache(rows, slots) for layer in self.layers]

    def full(self, ids: Tensor) -> Tensor:
        x = self.modules["begin"](ids, positions := positions_of(0, ids.shape[1], len(ids)))
        for layer in self.layers:
            x = layer(x, positions)
        return self.modules["end"](x)

    def cached(self, ids: Tensor, positions: Tensor, **how: object) -> Tensor:
        x = self.modules["begin"](ids, positions)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x = layer(x, positions, cache, **how)
        return self.modules["end"](x)


@pytest.fixture(params=MODELS)
def config(request) -> dict:
    return MODELS[request.param]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 96, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sizes", [(11,), (4, 1, 1, 1, 1, 1, 1, 1), (3, 3, 3, 2), (1, 10)])
def test_prefill_then_chunks_or_tokens_equal_one_full_forward(config, ids, sizes):
    model = Model(config, rows=2)
    got, at = [], 0
    with torch.inference_mode():
        for size in sizes:
            chunk, positions = ids[:, at : at + size], positions_of(at, at + size, 2)
            got.append(model.cached(chunk, positions, kv_len=at + size))
            at += size
        torch.testing.assert_close(torch.cat(got, dim=1), model.full(ids), atol=2e-5, rtol=0)


def test_kv_len_may_be_left_out_or_too_large(config, ids):
    for how in ({}, {"kv_len": T}):
        model = Model(config, rows=2)
        model.cached(ids[:, :4], positions_of(0, 4, 2), **how)
        got = model.cached(ids[:, 4:6], positions_of(4, 6, 2), **how)
        torch.testing.assert_close(got, model.full(ids[:, :6])[:, 4:], atol=2e-5, rtol=0)


def test_a_window_hides_what_lies_further_back(ids):
    model = Model(MODELS["window"] | {"num_hidden_layers": 1})
    changed = ids[:1].clone()
    changed[0, 0] = (changed[0, 0] + 1) % 96
    difference = (model.full(ids[:1]) - model.full(changed)).abs().amax(-1)[0]
    assert (difference[:3] > 1e-3).all()
    assert (difference[3:] == 0).all()


def test_rows_of_different_length_equal_the_rows_alone_when_padding_writes_a_spare_slot(config, ids):
    lengths, spare = torch.tensor([4, 9]), T
    model = Model(config, rows=2)
    at = positions_of(0, 9, 2)
    slots = torch.where(at < lengths[:, None], at, spare)
    first = model.cached(ids[:, :9], at, slots=slots, kv_len=9)
    step = ids.gather(1, lengths[:, None])
    second = model.cached(step, lengths[:, None], kv_len=10)
    third = model.cached(ids[:, 5:7], torch.tensor([[5, 6], [9, 9]]), slots=torch.tensor([[5, 6], [spare] * 2]))
    for row, length in enumerate(lengths.tolist()):
        alone = model.full(ids[row : row + 1, : length + 1])[0]
        torch.testing.assert_close(first[row, :length], alone[:length], atol=2e-5, rtol=0)
        torch.testing.assert_close(second[row, 0], alone[length], atol=2e-5, rtol=0)
    torch.testing.assert_close(third[0], model.full(ids[:1, :7])[0, 5:], atol=2e-5, rtol=0)


def test_a_row_that_goes_on_beside_one_that_starts_keeps_its_past_though_kv_len_is_the_length(config, ids):
    model, spare = Model(config, rows=2), T
    model.cached(ids[:1].expand(2, -1)[:, :2], positions_of(0, 2, 2), kv_len=2)
    both = torch.stack((torch.cat((ids[0, 2:3], ids[0, :2])), ids[1, :3]))  # one token and padding; a new row
    positions = torch.tensor([[2, 0, 0], [0, 1, 2]])
    got = model.cached(both, positions, slots=torch.tensor([[2, spare, spare], [0, 1, 2]]), kv_len=3)
    torch.testing.assert_close(got[0, 0], model.full(ids[:1, :3])[0, 2], atol=2e-5, rtol=0)
    torch.testing.assert_close(got[1], model.full(ids[1:, :3])[0], atol=2e-5, rtol=0)


def test_no_position_of_a_padding_query_gives_nan(config, ids):
    model = Model(config, rows=2)
    for padding in (-1, 0, T, 1000):
        for chunk in (1, 2):
            positions = torch.full((2, chunk), padding)
            got = model.cached(ids[:, :chunk], positions, slots=torch.full((2, chunk), T), kv_len=5)
            assert got.isfinite().all()


@pytest.mark.parametrize("window", [None, 1, 3])
def test_a_query_sees_the_slots_up_to_its_position_and_any_query_sees_something(window):
    positions = torch.tensor([[-1, 0, 2, 4, 5, 99]])
    seen = [row.nonzero().flatten().tolist() for row in visible(positions, 5, window)[0]]
    last = [0, 0, 2, 4, 4, 4]
    assert seen == [list(range(0 if window is None else max(0, i - window + 1), i + 1)) for i in last]


def test_right_padding_without_a_cache_changes_nothing_before_it(config, ids):
    model = Model(config)
    torch.testing.assert_close(model.full(ids)[:, :6], model.full(ids[:, :6]), atol=2e-5, rtol=0)


def test_a_cache_rolls_back_by_overwriting(config, ids):
    model = Model(config)
    model.cached(ids[:1], positions_of(0, T), kv_len=T)
    other = torch.cat((ids[:1, :5], ids[1:, 5:8]), dim=1)
    got = model.cached(other[:, 5:], positions_of(5, 8), kv_len=8)
    torch.testing.assert_close(got, model.full(other)[:, 5:], atol=2e-5, rtol=0)


def test_caches_may_be_views_of_some_rows_of_larger_ones(config, ids):
    model = Model(config, rows=5)
    whole, model.caches = model.caches, [tuple(t[2:4] for t in cache) for cache in model.caches]
    model.cached(ids[:, :6], positions_of(0, 6, 2), kv_len=6)
    got = model.cached(ids[:, 6:], positions_of(6, T, 2), kv_len=T)
    torch.testing.assert_close(got, model.full(ids)[:, 6:], atol=2e-5, rtol=0)
    assert all((t[:2] == 0).all() and (t[4:] == 0).all() for cache in whole for t in cache)


def test_a_mask_replaces_the_rule_so_that_two_drafts_share_a_prefix(ids):
    model = Model(TINY)
    model.cached(ids[:1, :4], positions_of(0, 4), kv_len=4)
    drafts, positions = torch.stack((ids[0, 4], ids[1, 4]))[None], torch.tensor([[4, 4]])
    mask = torch.ones(1, 2, 6, dtype=torch.bool)
    mask[0, 0, 5] = mask[0, 1, 4] = False
    got = model.cached(drafts, positions, slots=torch.tensor([[4, 5]]), kv_len=6, mask=mask)
    for i in range(2):
        alone = model.full(torch.cat((ids[:1, :4], drafts[:, i : i + 1]), dim=1))
        torch.testing.assert_close(got[0, i], alone[0, 4], atol=2e-5, rtol=0)


def test_dynamic_rope_refuses_a_position_beyond_its_original_length(ids):
    rope = {"rope_type": "dynamic", "factor": 2.0}
    model = Model(TINY | {"max_position_embeddings": 8, "rope_parameters": rope})
    torch.testing.assert_close(model.full(ids[:, :8]), Model(TINY).full(ids[:, :8]), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"position 8: rope_type 'dynamic' .* original length 8"):
        model.full(ids[:, :9])


def test_a_mask_without_a_cache_makes_a_tree_of_one_pass(ids):
    model, positions = Model(TINY), torch.tensor([[0, 1, 2, 3, 4, 4]])  # two drafts for the place after four tokens
    mask = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    mask[0, 5, 4] = False
    x = model.modules["begin"](ids[:1, :6], positions)
    for layer in model.layers:
        x = layer(x, positions, mask=mask)
    got = model.modules["end"](x)
    for i in (4, 5):
        alone = model.full(torch.cat((ids[:1, :4], ids[:1, i : i + 1]), dim=1))
        torch.testing.assert_close(got[0, i], alone[0, 4], atol=2e-5, rtol=0)


def test_a_forward_pass_heeds_no_default_device_or_dtype_and_its_tables_survive_inference_mode():
    theta = {"rope_type": "default", "rope_theta": 12345.0}  # of this test alone, so that the tables are made here
    layer = fill(parts(Config.from_hf(TINY | {"rope_parameters": theta}), "0:1"))["mid.00000"]
    x, positions = torch.ones(1, 3, 32, requires_grad=True), positions_of(0, 3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            first = layer(x, positions)
    finally:
        torch.set_default_dtype(torch.float32)
    second = layer(x, positions)
    second.sum().backward()
    assert x.grad is not None
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def test_a_layer_in_bf16_stays_in_bf16_and_its_decode_near_its_prefill(ids):
    layer = fill(parts(Config.from_hf(TINY), "0:1"), torch.bfloat16)["mid.00000"]
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    cache = layer.new_cache(1, 8, dtype=torch.bfloat16, device="cpu")
    whole = layer(x, positions_of(0, 6))
    layer(x[:, :5], positions_of(0, 5), cache, kv_len=5)
    last = layer(x[:, 5:], positions_of(5, 6), cache, kv_len=6)
    assert whole.dtype == last.dtype == torch.bfloat16
    torch.testing.assert_close(last[:, 0], whole[:, 5], atol=0.1, rtol=0.05)


def test_caches_have_row_and_slot_first_and_only_the_key_value_heads():
    layer: Any = parts(Config.from_hf(TINY), "0:1")["mid.00000"]
    assert [tuple(t.shape) for t in layer.new_cache(3, 7, dtype=torch.float32, device="cpu")] == [(3, 7, 2, 8)] * 2
    assert layer.rewind == "any"


def test_begin_looks_up_whatever_rows_it_is_given(ids):
    begin = fill(parts(Config.from_hf(TINY), "b"))["begin"]
    assert begin.gathered == {"embed_tokens.weight": "input_ids"}
    whole = begin(ids, positions_of(0, T, 2))
    needed, remapped = ids.unique(return_inverse=True)
    begin.embed_tokens._parameters["weight"] = begin.embed_tokens.weight[needed]
    assert torch.equal(begin(remapped, positions_of(0, T, 2)), whole)


def test_linears_are_called_as_modules_so_that_a_runner_may_replace_their_forward(ids):
    model = Model(MODELS["qwen2 mixed"])
    called = set()
    for part, module in model.modules.items():
        for name, linear in module.named_modules():
            if isinstance(linear, nn.Linear):
                linear.register_forward_hook(lambda *_, key=(part, name): called.add(key))
    model.full(ids)
    assert len(called) == 3 * 7 + 1


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_only_the_experts_that_are_announced_are_called_once_each_in_order(model, ids):
    layer: Any = fill(parts(Config.from_hf(MODELS[model]), "0:1"))["mid.00000"]
    announced, called = [], []
    layer.experts.announce = announced.append
    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_hook(lambda *_, name=name: called.append(name))
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(2))
    layer(x, positions_of(0, 1))
    ((first, second),) = announced
    assert first < second
    around = [name for name, m in layer.named_modules() if isinstance(m, nn.Linear) and "experts" not in name]
    inside = [f"experts.{i}.{name}" for i in (first, second) for name in ("gate_proj", "up_proj", "down_proj")]
    assert called == around + inside


def test_weights_of_an_expert_to_which_no_token_goes_need_not_be_there(ids):
    layer: Any = fill(parts(Config.from_hf(MODELS["mixtral"]), "0:1"))["mid.00000"]
    x = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(2))
    expected, needed = layer(x, positions_of(0, 2)), []
    layer.experts.announce = needed.extend
    layer(x, positions_of(0, 2))
    assert 2 <= len(needed) < 5
    for number in set(range(5)) - set(needed):
        for linear in layer.experts[number].children():
            linear._parameters["weight"] = linear.weight.to("meta")
    assert torch.equal(layer(x, positions_of(0, 2)), expected)


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_padding_goes_to_no_expert(model):
    layer: Any = fill(parts(Config.from_hf(MODELS[model]), "0:1"))["mid.00000"]
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(2))
    positions = positions_of(0, 4, rows=3)
    slots = torch.tensor([[0, T, T, T], [0, 1, T, T], [T] * 4])  # the last row idles
    needed, announced = set(), []
    layer.experts.announce = needed.update
    first, second = layer(x[:1, :1], positions[:1, :1]), layer(x[1:2, :2], positions[:1, :2])
    layer.experts.announce = announced.append
    together = layer(x, positions, layer.new_cache(3, T + 1), slots=slots, kv_len=4)
    assert announced == [sorted(needed)]
    assert len(needed) < 5
    torch.testing.assert_close(together[:1, :1], first, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1:2, :2], second, atol=1e-5, rtol=0)
    alone = layer(x, positions)  # without a cache no slot means anything
    assert torch.equal(layer(x, positions, slots=positions + T), alone)


def test_experts_give_the_weighted_sum_over_those_chosen(ids):
    layer: Any = fill(parts(Config.from_hf(MODELS["mixtral"]), "0:1"))["mid.00000"]
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    probabilities = layer.mlp.gate(x).softmax(-1)
    indices, weights = layer.mlp(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))
    for token in range(7):
        best = probabilities[token].topk(2)
        assert sorted(indices[token].tolist()) == sorted(best.indices.tolist())
        share = best.values / best.values.sum()
        alone = sum(w * layer.experts[i](x[token]) for w, i in zip(share, best.indices.tolist(), strict=True))
        torch.testing.assert_close(layer.experts(x, indices, weights)[token], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model", "dtype", "accuracy"),
    [
        (MODELS["mixtral"], torch.float32, 1e-6),
        (MODELS["qwen3_moe"] | {"norm_topk_prob": True}, torch.bfloat16, 2**-8),  # one rounding
        (MODELS["qwen3_moe"], torch.bfloat16, 2**-8),
    ],
    ids=["mixtral", "qwen3_moe", "qwen3_moe, weights as they are"],
)
def test_weights_of_experts_in_bf16_are_computed_in_fp32_and_rounded_at_the_end_or_not_at_all(model, dtype, accuracy):
    config = Config.from_hf(model)
    layer: Any = fill(parts(config, "0:1"), torch.bfloat16)["mid.00000"]
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    probabilities = layer.mlp.gate(x).double().softmax(-1)
    indices, weights = layer.mlp(x)
    expected = probabilities.gather(-1, indices)
    assert torch.equal(expected, probabilities.topk(2).values)
    if config.routing is not None and config.routing.norm_topk_prob:
        expected = expected / expected.sum(-1, keepdim=True)
    assert weights.dtype == dtype
    assert ((weights.double() - expected).abs() <= accuracy * expected).all()


def test_an_experts_output_in_bf16_is_weighted_before_it_is_rounded_again():
    experts: Any = fill(parts(Config.from_hf(MODELS["mixtral"]), "0:1"), torch.bfloat16)["mid.00000"].experts
    for number in range(5):
        experts[number] = nn.Identity()
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(9, 32, generator=generator).bfloat16(), torch.rand(9, 2, generator=generator)
    first, second = ((x.float() * weights[:, i, None]).bfloat16() for i in range(2))
    assert torch.equal(experts(x, torch.tensor([[1, 3]]).expand(9, 2), weights), first + second)


def test_a_dense_layer_says_that_nothing_of_it_is_routed():
    layers: Any = parts(Config.from_hf(MODELS["qwen3_moe"]), "0:2")
    assert [layer.routed for layer in layers.values()] == ["experts", None]
