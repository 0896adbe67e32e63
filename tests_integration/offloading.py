"""Models of transformers as tiny checkpoints, offloaded and not: what the tests of `offload` begin with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoConfig, AutoModelForCausalLM

import llm_partial_run
import llm_sepweight

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()


VOCAB: dict[str, Any] = dict(vocab_size=96)


SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, **VOCAB)


LLAMA: dict[str, Any] = dict(intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64, **SIZES)


GPT: dict[str, Any] = dict(n_embd=32, n_layer=4, n_head=4, n_positions=64, **VOCAB)


MOE: dict[str, Any] = dict(num_experts_per_tok=2, experts_implementation="eager", **LLAMA)


WINDOWS: dict[str, Any] = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"] * 2)


TWO_WIDTHS: dict[str, Any] = dict(  # of heads: in layers with a window, and in the others
    head_dim=8, global_head_dim=16, vocab_size_per_layer_input=96, hidden_size_per_layer_input=0
)  # fmt: skip


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)


LATENT: dict[str, Any] = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16)


ROUTED: dict[str, Any] = LLAMA | dict(
    num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, first_k_dense_replace=1,
    n_group=2, topk_group=1, n_shared_experts=1, experts_implementation="eager",
)  # fmt: skip


CONFIGS = {
    "llama": hf.LlamaConfig(**LLAMA),
    "llama tied": hf.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama yarn": hf.LlamaConfig(**LLAMA, rope_parameters=YARN),
    "mistral": hf.MistralConfig(**LLAMA, sliding_window=5),
    "gpt2": hf.GPT2Config(**GPT),
    "gptj": hf.GPTJConfig(**GPT, rotary_dim=4),
    "bloom": hf.BloomConfig(hidden_size=32, n_layer=4, n_head=4, **VOCAB),
    "gpt neox": hf.GPTNeoXConfig(**SIZES, intermediate_size=48, max_position_embeddings=64),
    "opt": hf.OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    "opt projected": hf.OPTConfig(
        **SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "phi": hf.PhiConfig(**SIZES, intermediate_size=48, max_position_embeddings=64),
    "phi3": hf.Phi3Config(**LLAMA, pad_token_id=0),
    "gemma": hf.GemmaConfig(**LLAMA, head_dim=8),
    "gemma2": hf.Gemma2Config(**LLAMA, head_dim=8, **WINDOWS),
    "gemma3": hf.Gemma3TextConfig(**LLAMA, head_dim=8, **WINDOWS),
    "gemma4": hf.Gemma4TextConfig(**LLAMA | WINDOWS | TWO_WIDTHS),
    "stablelm": hf.StableLmConfig(**LLAMA),
    "stablelm parallel": hf.StableLmConfig(**LLAMA, use_parallel_residual=True, qk_layernorm=True),
    "mpt": hf.MptConfig(d_model=32, n_heads=4, n_layers=4, max_seq_len=64, expansion_ratio=2, use_cache=True, **VOCAB),
    "falcon 7b": hf.FalconConfig(**SIZES),
    "falcon 40b": hf.FalconConfig(**SIZES, num_kv_heads=2, new_decoder_architecture=True),
    "falcon rw": hf.FalconConfig(**SIZES, alibi=True, bias=True, multi_query=False, parallel_attn=False),
    "qwen2": hf.Qwen2Config(**LLAMA),
    "qwen3": hf.Qwen3Config(**LLAMA, head_dim=16),
    "mixtral": hf.MixtralConfig(**MOE, num_local_experts=4),
    "deepseek v2": hf.DeepseekV2Config(**ROUTED | LATENT),
    "minicpm3": hf.MiniCPM3Config(**LLAMA | LATENT | dict[str, Any](num_key_value_heads=4)),
    "qwen3 moe": hf.Qwen3MoeConfig(**MOE | dict[str, Any](num_experts=4, moe_intermediate_size=24, head_dim=8)),
}


T5: dict[str, Any] = dict(d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, decoder_start_token_id=0, **VOCAB)


BUDGET: dict[str, Any] = dict(rows=2, context=40, runtime=0)


PROMPTS = torch.tensor([[0, 0, 6, 5, 3], [3, 1, 4, 1, 5]])  # the first padded on the left


MASK = (torch.arange(5) >= torch.tensor([[2], [0]])).long()


GENERATE: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def save(config, path, dtype=torch.float32, kind: Any = AutoModelForCausalLM):
    torch.manual_seed(0)
    model: Any = kind.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return path


def on_meta(path, kind: Any = AutoModelForCausalLM) -> Any:
    with torch.device("meta"):
        return kind.from_config(AutoConfig.from_pretrained(path)).eval()


def resident(path, kind: Any = AutoModelForCausalLM) -> Any:
    return kind.from_pretrained(path).eval()


def offloaded(path, model, memory: Any = "1GiB", **changes):
    weights = llm_sepweight.open(path, layout=llm_partial_run.layout_from_module(model))
    return llm_partial_run.offload(model, weights, memory=memory, **(BUDGET | changes))


def smallest(path, model, **changes):
    with pytest.raises(llm_partial_run.BudgetError) as refused:
        offloaded(path, model, memory=1, **changes)
    return refused.value.smallest


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits
