"""Models of transformers under a memory budget: what checkpoints call their tensors, and store them as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import llm_partial_run
import llm_sepweight
from llm_partial_run import _buffers
from offloading import (
    CONFIGS,
    GENERATE,
    LATENT,
    LLAMA,
    MASK,
    PROMPTS,
    ROUTED,
    T5,
    logits,
    offloaded,
    on_meta,
    resident,
    save,
    smallest,
)

pytestmark = pytest.mark.usefixtures("small_slices")


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "llama", "gpt neox"])
def test_keys_with_and_without_the_prefix_of_the_base_model_are_the_same(name, tmp_path):
    path = save(CONFIGS[name], tmp_path)
    model = on_meta(path)
    expected = logits(resident(path), input_ids=PROMPTS)
    prefix = model.base_model_prefix + "."
    keys = load_file(path / "model.safetensors")
    assert any(key.startswith(prefix) for key in keys)
    save_file({key.removeprefix(prefix): t for key, t in keys.items()}, path / "model.safetensors")
    with offloaded(path, model):
        torch.testing.assert_close(logits(model, input_ids=PROMPTS), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon 7b"])
def test_a_base_model_reads_the_checkpoint_of_the_whole_one(name, tmp_path):
    path = save(CONFIGS[name], tmp_path)
    model = on_meta(path, AutoModel)
    with torch.no_grad():
        expected = resident(path, AutoModel)(PROMPTS).last_hidden_state
        with offloaded(path, model, smallest(path, model)):
            torch.testing.assert_close(model(PROMPTS).last_hidden_state, expected, atol=2e-5, rtol=0)


def test_a_tied_head_that_is_stored_all_the_same_and_old_buffers_are_dropped(tmp_path):
    path = save(CONFIGS["gpt2"], tmp_path)
    model = on_meta(path)
    expected = logits(resident(path), input_ids=PROMPTS)
    keys = load_file(path / "model.safetensors")
    extra = {
        "lm_head.weight": keys["transformer.wte.weight"].clone(),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
    }
    save_file(keys | extra, path / "model.safetensors")
    with offloaded(path, model):
        torch.testing.assert_close(logits(model, input_ids=PROMPTS), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("llama tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("bloom", "transformer.word_embeddings.weight", "lm_head.weight"),
        ("falcon 7b", "transformer.word_embeddings.weight", "lm_head.weight"),
        ("opt projected", "model.decoder.embed_tokens.weight", "lm_head.weight"),
    ],
)
def test_a_tied_head_may_be_stored_under_either_name(name, first, second, tmp_path):
    path = save(CONFIGS[name], tmp_path)
    keys = load_file(path / "model.safetensors")
    save_file({second if key == first else key: t for key, t in keys.items()}, path / "model.safetensors")
    theirs, model = resident(path), on_meta(path)
    expected = theirs.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, **GENERATE)
    with offloaded(path, model, smallest(path, model)):
        assert torch.equal(model.generate(PROMPTS, attention_mask=MASK, max_new_tokens=8, **GENERATE), expected)


KEPT_IN_FP32: dict[str, Any] = {
    "deepseek v3": hf.DeepseekV3Config(**ROUTED | LATENT),
    "glm4 moe": hf.Glm4MoeConfig(**ROUTED | dict[str, Any](head_dim=8)),
    "t5": hf.T5Config(**T5),
}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*KEPT_IN_FP32, "llama", "gpt2", "mixtral"])
def test_what_transformers_keeps_in_fp32_stays_so(name, dtype, stored, tmp_path):
    kind = hf.AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    path = save((KEPT_IN_FP32 | CONFIGS)[name], tmp_path, stored, kind)
    theirs, model = kind.from_pretrained(path, dtype=dtype).eval(), on_meta(path, kind)
    inputs = dict(input_ids=PROMPTS) | (dict(decoder_input_ids=PROMPTS) if name == "t5" else {})
    expected = logits(theirs, **inputs)
    for memory in (smallest(path, model, dtype=dtype), "1GiB"):
        with offloaded(path, model, memory, dtype=dtype):
            assert {n: p.dtype for n, p in model.state_dict(keep_vars=True).items()} == {
                n: p.dtype for n, p in theirs.state_dict().items()
            }
            assert (logits(model, **inputs) - expected).abs().mean() <= 1e-3 * expected.abs().mean()


def test_every_key_that_is_saved_has_a_place_and_every_tensor_a_key(checkpoint):
    model = on_meta(checkpoint)
    weights = llm_sepweight.open(checkpoint, layout=llm_partial_run.layout_from_module(model))
    with weights:
        found = {(part, name) for part in weights.parts for name in weights.tensors(part)}
        layout = llm_partial_run.layout_from_module(model)
        assert all(layout(key, {}) for key in load_file(checkpoint / "model.safetensors"))
    needed = {place for key in model.state_dict() for place in [_place(model, key)]}
    assert found == needed


def _place(model, key):
    from llm_partial_run._blocks import find_blocks, places

    return places(model, find_blocks(model))[key]


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (dict(attention_bias=False), r"model.layers.\d.self_attn.._proj.bias"),
        (dict(num_hidden_layers=3), "model.layers.3.*"),
    ],
)
def test_a_key_that_the_module_lacks_is_named(tmp_path, changes, key, kind):
    path = save(hf.LlamaConfig(**LLAMA, attention_bias=True), tmp_path)
    hf.LlamaConfig(**LLAMA | dict(attention_bias=True) | changes).save_pretrained(path)
    with pytest.raises(ValueError, match=f"checkpoint key '{key}' has no place in this Llama"):
        offloaded(path, on_meta(path, kind))
    layout = llm_partial_run.layout_from_module(on_meta(path))
    assert layout("model.layers.0.self_attn.rotary_emb.inv_freq", {}) == []


@pytest.mark.parametrize("wrong", [torch.zeros(5, 32), torch.zeros(32, 32, dtype=torch.int8)])
def test_a_tensor_of_the_wrong_shape_or_dtype_is_named(tmp_path, wrong):
    path = save(CONFIGS["llama"], tmp_path)
    keys = load_file(path / "model.safetensors")
    save_file(keys | {"model.layers.2.self_attn.o_proj.weight": wrong}, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"mid.00002: self_attn.o_proj.weight"):
        offloaded(path, on_meta(path))


def test_buffers_of_a_model_within_another_are_computed_as_that_one_does_it():
    config = hf.Gemma3nTextConfig(
        **LLAMA | dict[str, Any](num_hidden_layers=10, intermediate_size=48, head_dim=8, laurel_rank=4),
        vocab_size_per_layer_input=96, hidden_size_per_layer_input=8,
    )  # fmt: skip
    own = dict(AutoModelForCausalLM.from_config(config).named_buffers())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    computed = _buffers.computed_buffers(model)
    assert len(computed) > 3
    for name, tensor in computed.items():
        torch.testing.assert_close(tensor, own[name])


def test_a_missing_expert_is_named(tmp_path):
    path = save(CONFIGS["mixtral"], tmp_path)
    keys = load_file(path / "model.safetensors")
    del keys["model.layers.2.block_sparse_moe.experts.1.w2.weight"]
    save_file(keys, path / "model.safetensors")
    with pytest.raises(ValueError, match=r"slices are missing.*mid.00002.*mlp.experts.down_proj"):
        offloaded(path, on_meta(path))
