from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_falcon_model import Config, _model, parts
from llm_falcon_model._model import visible
from llm_falcon_model._positions import alibi, slopes

TINY = {
    "model_type": "falcon",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
NEW = TINY | {"new_decoder_architecture": True, "num_kv_heads": 2}
RW = TINY | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
MODELS = {
    "7b": TINY,
    "40b": NEW,
    "11b": NEW | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "rw": RW,
    "rw, seven heads": RW | {"hidden_size": 56, "num_attention_heads": 7},
    "alibi, shared heads": NEW | {"alibi": True},
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
            parameters[leaf] = (tensor + ("norm" in name or "ln_" in name)).to(dtype)
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


def test_a_query_sees_the_slots_up_to_its_position_and_any_query_sees_something():
    positions = torch.tensor([[-1, 0, 2, 4, 5, 99]])
    seen = [row.nonzero().flatten().tolist() for row in visible(positions, 5)[0]]
    assert seen == [list(range(i + 1)) for i in (0, 0, 2, 4, 4, 4)]


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


def test_a_mask_replaces_the_rule_so_that_two_drafts_share_a_prefix(config, ids):
    model = Model(config)
    model.cached(ids[:1, :4], positions_of(0, 4), kv_len=4)
    drafts, positions = torch.stack((ids[0, 4], ids[1, 4]))[None], torch.tensor([[4, 4]])
    mask = torch.ones(1, 2, 6, dtype=torch.bool)
    mask[0, 0, 5] = mask[0, 1, 4] = False
    got = model.cached(drafts, positions, slots=torch.tensor([[4, 5]]), kv_len=6, mask=mask)
    for i in range(2):
        alone = model.full(torch.cat((ids[:1, :4], drafts[:, i : i + 1]), dim=1))
        torch.testing.assert_close(got[0, i], alone[0, 4], atol=2e-5, rtol=0)


def test_rows_with_a_mask_each_may_have_their_drafts_at_different_positions(config, ids):
    model, starts = Model(config, rows=2), torch.tensor([[4], [2]])
    model.cached(ids[:, :4], positions_of(0, 4, 2), kv_len=4)
    drafts, slots = ids[:, 6:8], starts + torch.arange(2)
    mask = torch.arange(6) < starts[..., None] + torch.zeros(2, 2, 1)
    mask.scatter_(2, slots[..., None], True)
    got = model.cached(drafts, starts.expand(2, 2), slots=slots, kv_len=6, mask=mask)
    for row, start in enumerate(starts[:, 0].tolist()):
        for i in range(2):
            alone = model.full(torch.cat((ids[row : row + 1, :start], drafts[row : row + 1, i : i + 1]), dim=1))
            torch.testing.assert_close(got[row, i], alone[0, start], atol=2e-5, rtol=0)


def test_a_mask_without_a_cache_makes_a_tree_of_one_pass(config, ids):
    model, positions = Model(config), torch.tensor([[0, 1, 2, 3, 4, 4]])  # two drafts for the place after four tokens
    mask = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    mask[0, 5, 4] = False
    x = model.modules["begin"](ids[:1, :6], positions)
    for layer in model.layers:
        x = layer(x, positions, mask=mask)
    got = model.modules["end"](x)
    for i in (4, 5):
        alone = model.full(torch.cat((ids[:1, :4], ids[:1, i : i + 1]), dim=1))
        torch.testing.assert_close(got[0, i], alone[0, 4], atol=2e-5, rtol=0)


@pytest.mark.parametrize("alibi", [False, True])
def test_a_forward_pass_heeds_no_default_device_or_dtype_and_its_tables_survive_inference_mode(alibi):
    sizes = {
        "hidden_size": 40,
        "num_attention_heads": 5,
        "rope_theta": 12345.0,
    }  # of this test alone: tables are made here
    layer = fill(parts(Config.from_hf(TINY | {"alibi": alibi} | sizes), "0:1"))["mid.00000"]
    x, positions = torch.ones(1, 3, 40, requires_grad=True), positions_of(0, 3)
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
    layer: Any = parts(Config.from_hf(NEW), "0:1")["mid.00000"]
    assert [tuple(t.shape) for t in layer.new_cache(3, 7, dtype=torch.float32, device="cpu")] == [(3, 7, 2, 8)] * 2
    assert layer.rewind == "any"


def test_begin_looks_up_whatever_rows_it_is_given(ids):
    begin = fill(parts(Config.from_hf(TINY), "b"))["begin"]
    assert begin.gathered == {"word_embeddings.weight": "input_ids"}
    whole = begin(ids, positions_of(0, T, 2))
    needed, remapped = ids.unique(return_inverse=True)
    begin.word_embeddings._parameters["weight"] = begin.word_embeddings.weight[needed]
    assert torch.equal(begin(remapped, positions_of(0, T, 2)), whole)


def test_linears_are_called_once_each_in_the_order_of_their_registration(config, ids):
    model = Model(config)
    called = []
    for part, module in model.modules.items():
        for name, linear in module.named_modules():
            if isinstance(linear, nn.Linear):
                linear.register_forward_hook(lambda *_, key=(part, name): called.append(key))
    model.full(ids)
    expected = [(p, n) for p, m in model.modules.items() for n, c in m.named_modules() if type(c) is nn.Linear]
    assert called == expected
    assert len(called) == 3 * 4 + 1


def test_heads_attended_to_some_at_a_time_give_the_same(config, ids, monkeypatch):
    model = Model(config)
    whole = model.full(ids)
    monkeypatch.setattr(_model, "MASK_ELEMENTS", 1)
    assert torch.equal(model.full(ids), whole)


@pytest.mark.parametrize("num_heads", [1, 4, 7, 12, 71])
def test_slopes_fall_from_head_to_head_as_in_the_paper(num_heads):
    got = slopes(num_heads, torch.device("cpu"))
    n = 2 ** (num_heads.bit_length() - 1)
    first = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    more = [2.0 ** (-8 * i / (2 * n)) for i in range(1, 2 * n + 1, 2)][: num_heads - n]
    torch.testing.assert_close(got, torch.tensor(first + more))


def test_alibi_is_rounded_to_bf16_and_scaled_as_the_scores_are():
    got = alibi(torch.tensor([[0, 1, 300]]), 2, 16, dtype=torch.float32)
    assert got.shape == (1, 2, 1, 3)
    torch.testing.assert_close(got[0, :, 0] * 4, torch.tensor([[0.0, 1 / 16, 18.75], [0.0, 1 / 256, 300 / 256]]))
    odd = alibi(torch.tensor([[301]]), 1, 16, dtype=torch.float32)
    assert odd.item() * 4 == torch.tensor(300 / 256).bfloat16().item()  # 301 has one bit more than bf16
