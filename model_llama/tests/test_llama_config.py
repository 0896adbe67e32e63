from __future__ import annotations

import pytest

from llm_llama_model import Config

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def read(**changes: object) -> Config:
    return Config.from_hf(TINY | changes)


def test_a_minimal_llama_config_gets_the_defaults_of_its_class():
    config = read()
    assert (config.head_dim, config.num_key_value_heads, config.rms_norm_eps) == (8, 4, 1e-6)
    assert config.rope.rope_type == "default"
    assert config.rope.theta == 10000.0
    assert config.windows == (None,) * 4
    assert [config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.tie_word_embeddings] == [False] * 5
    assert config.dtype is None


@pytest.mark.parametrize(("value", "ids"), [(2, (2,)), ([2, 7], (2, 7)), (None, ()), ([], ())])
def test_eos_ids_are_a_tuple_whatever_config_json_holds(value, ids):
    assert read(eos_token_id=value).eos_ids == ids


@pytest.mark.parametrize(
    ("model_type", "ids"),
    [
        ("llama", (2,)),
        ("Yi", (2,)),
        ("mistral", (2,)),
        ("mixtral", (2,)),
        ("qwen2", ()),
        ("qwen3", ()),
        ("qwen3_moe", ()),
    ],
)
def test_a_missing_eos_token_id_means_what_the_class_says_and_null_means_none(model_type, ids):
    model = {"model_type": model_type, "num_key_value_heads": 2}
    assert read(**model).eos_ids == ids
    assert read(**model, eos_token_id=None).eos_ids == ()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_spellings_of_the_dtype_are_read(key):
    assert read(**{key: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("model", "qkv", "o", "mlp", "qk_norm"),
    [
        ({"attention_bias": True}, True, True, False, False),
        ({"mlp_bias": True}, False, False, True, False),
        ({"model_type": "Yi", "attention_bias": True}, True, True, False, False),
        ({"model_type": "mistral", "num_key_value_heads": 2}, False, False, False, False),
        ({"model_type": "qwen2", "num_key_value_heads": 2}, True, False, False, False),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "attention_bias": True}, True, False, False, False),
        ({"model_type": "qwen3", "num_key_value_heads": 2}, False, False, False, True),
        ({"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True}, True, True, False, True),
    ],
)
def test_biases_and_norms_follow_the_model_type(model, qkv, o, mlp, qk_norm):
    config = read(**model)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (qkv, o, mlp, qk_norm)


def test_head_dim_of_openllama_is_100_and_that_of_qwen3_is_128_unless_said_otherwise():
    assert read(hidden_size=3200, num_attention_heads=32).head_dim == 100
    assert read(model_type="qwen3", num_key_value_heads=2).head_dim == 128
    assert read(head_dim=16).head_dim == 16


@pytest.mark.parametrize(
    "layers",
    [
        {"num_hidden_layers": 137, "hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8},
        {"num_hidden_layers": 30, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 102400},
    ],
    ids=["goliath", "deepseek-llm"],
)
def test_goliath_and_deepseek_llm_need_no_switch(layers):
    config = read(**layers)
    assert config.head_dim == 128
    assert len(config.windows) == layers["num_hidden_layers"]


@pytest.mark.parametrize(
    ("model", "windows"),
    [
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "mistral", "sliding_window": 5, "layer_types": ["sliding_attention"] * 4}, (5,) * 4),
        ({"model_type": "qwen2", "sliding_window": 5}, (None,) * 4),
        ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True}, (None,) * 4),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 4096)),
        (
            {"model_type": "qwen3", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
            (None, 5, 5, 5),
        ),
        (
            {"model_type": "qwen3_moe", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
            (5,) * 4,
        ),
        ({"model_type": "qwen3_moe", "sliding_window": 5}, (None,) * 4),
        ({"model_type": "mixtral", "sliding_window": 5}, (5,) * 4),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (5, None, 5, None),
        ),
    ],
)
def test_windows_follow_the_model_type(model, windows):
    assert read(num_key_value_heads=2, **model).windows == windows


def test_old_and_new_spelling_of_rope_mean_the_same():
    llama3 = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    new = read(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3})
    assert new.rope == read(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3}).rope
    assert new.rope == read(rope_theta=5e5, rope_scaling={"type": "llama3", **llama3}).rope
    assert new.rope.theta == 5e5
    assert read(rope_theta=5e6, rope_scaling=None).rope.theta == 5e6


def test_dynamic_rope_ends_where_either_of_its_lengths_ends():
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    assert read(max_position_embeddings=64, rope_scaling=dynamic).rope.original_length == 64
    shorter = dynamic | {"original_max_position_embeddings": 16}
    assert read(max_position_embeddings=64, rope_scaling=shorter).rope.original_length == 16


def test_only_dynamic_rope_limits_the_context_and_its_config_says_where():
    assert read(max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 2.0}).longest_context == 64
    assert read(max_position_embeddings=64).longest_context is None
    assert read(max_position_embeddings=64, rope_scaling=LLAMA3).longest_context is None


@pytest.mark.parametrize(
    ("model", "layers", "sizes", "flags"),
    [
        ({"model_type": "mixtral"}, (True,) * 4, (8, 2, 48), (True, True)),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "norm_topk_prob": False},
            (True,) * 4,
            (4, 2, 48),
            (True, True),
        ),
        ({"model_type": "qwen3_moe"}, (True,) * 4, (128, 8, 768), (False, False)),
        (
            {"model_type": "qwen3_moe", "num_experts": 64, "norm_topk_prob": True},
            (True,) * 4,
            (64, 8, 768),
            (True, False),
        ),
        ({"model_type": "qwen3_moe", "num_local_experts": 64}, (True,) * 4, (64, 8, 768), (False, False)),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, (False, True) * 2, (128, 8, 768), (False, False)),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0, 2], "moe_intermediate_size": 24},
            (False, True) * 2,
            (128, 8, 24),
            (False, False),
        ),
    ],
)
def test_routing_follows_the_model_type(model, layers, sizes, flags):
    routing = read(num_key_value_heads=2, **model).routing
    assert routing is not None
    assert routing.layers == layers
    assert (routing.num_experts, routing.num_experts_per_tok, routing.intermediate_size) == sizes
    assert (routing.norm_topk_prob, routing.fp32_weights) == flags


def test_a_mixture_has_the_attention_of_its_relative():
    mixtral, qwen = (read(model_type=name, num_key_value_heads=2) for name in ("mixtral", "qwen3_moe"))
    assert (mixtral.rope.theta, mixtral.rms_norm_eps, mixtral.windows) == (1e6, 1e-5, (None,) * 4)
    assert (mixtral.qk_norm, qwen.qk_norm) == (False, True)
    assert (qwen.rope.theta, qwen.windows, qwen.head_dim) == (1e4, (None,) * 4, 8)
    assert read().routing is None


def test_keys_that_change_nothing_at_inference_are_ignored():
    harmless = {
        "pretraining_tp": 2,
        "attention_dropout": 0.1,
        "initializer_range": 0.02,
        "use_cache": False,
        "architectures": ["LlamaForCausalLM"],
        "transformers_version": "4.31.0",
        "_name_or_path": "x",
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    assert read(**harmless) == read()


LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "96"}, "vocab_size .*'96'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .*0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps .*'1e-5'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"model_type": "qwen3", "num_experts": 8}, "num_experts 8"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok 9 .* 8 experts"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "num_local_experts .*0"),
        ({"model_type": "mixtral", "decoder_sparse_step": 2}, "decoder_sparse_step .* 'mixtral'"),
        (
            {"model_type": "qwen3_moe", "num_experts": 8, "num_local_experts": 16},
            "num_experts 8 and num_local_experts 16",
        ),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers .*3"),
        ({"model_type": "qwen3_moe", "shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size 64"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"eos_token_id": "</s>"}, "eos_token_id .*'</s>'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings .*'no'"),
        ({"sliding_window": 5}, "sliding_window 5 .*'llama'"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types: 'chunked_attention'"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types: 'sliding_attention' without"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"model_type": "mistral", "use_sliding_window": False}, "use_sliding_window False"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window .*0"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "layer_types: 'sliding_attention'"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling: unknown rope_type 'ntk'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: unknown rope_type 'longrope'"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "'default' and type 'mrope' disagree"),
        ({"rope_scaling": LINEAR, "rope_parameters": LLAMA3}, "rope_parameters and rope_scaling disagree"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a mapping, got 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor', got None"),
        ({"rope_scaling": LINEAR | {"factor": "2"}}, "'factor', got '2'"),
        ({"rope_scaling": LINEAR | {"beta_fast": 3}}, "'beta_fast' means nothing to rope_type 'linear'"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "'full_attention' means nothing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "'low_freq_factor', got None"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate .*'no'"),
        ({"rope_theta": "1e4"}, "'rope_theta', got '1e4'"),
    ],
)
def test_a_value_that_would_change_the_numbers_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        Config.from_hf({"num_key_value_heads": 2} | TINY | changes)
