from __future__ import annotations

import pytest

from llm_falcon_model import Config, parts

TINY = {
    "model_type": "falcon",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def read(**changes: object) -> Config:
    return Config.from_hf(TINY | changes)


def test_a_minimal_falcon_config_gets_the_defaults_of_its_class():
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.ffn_hidden_size) == (1, 8, 128)
    assert (config.layer_norm_epsilon, config.rope_theta, config.rope_factor) == (1e-5, 10000.0, 1.0)
    assert [config.alibi, config.bias, config.separate_layernorms] == [False] * 3
    assert [config.parallel_attn, config.tie_word_embeddings] == [True] * 2
    assert config.eos_ids == (11,)
    assert config.dtype is None


@pytest.mark.parametrize(
    ("model", "num_kv_heads", "parallel_attn", "separate_layernorms"),
    [
        ({"num_kv_heads": 4}, 1, True, False),  # as transformers writes it for 7b: the number does not count
        ({"multi_query": False}, 4, True, False),
        ({"new_decoder_architecture": True}, 4, True, True),
        ({"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False}, 2, True, True),
        ({"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, 2, True, False),
        ({"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}, 4, False, False),
    ],
)
def test_the_switches_say_which_heads_and_norms_there_are(model, num_kv_heads, parallel_attn, separate_layernorms):
    config = read(**model)
    assert config.num_kv_heads == num_kv_heads
    assert (config.parallel_attn, config.separate_layernorms) == (parallel_attn, separate_layernorms)


OLD = {"vocab_size": 96, "hidden_size": 32, "n_layer": 4, "n_head": 4}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"model_type": "RefinedWebModel", "multi_query": True, "parallel_attn": True}, {}),
        ({"model_type": "RefinedWeb", "n_head_kv": 2}, {"new_decoder_architecture": True, "num_kv_heads": 2}),
        (
            {"model_type": "RefinedWebModel", "alibi": True, "bias": True},
            {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
        ),
        ({"model_type": "falcon", "multi_query": True}, {}),
    ],
    ids=["7b", "40b", "rw", "new type, old names"],
)
def test_the_first_uploads_mean_what_the_new_spelling_says(old, new):
    theirs, ours = Config.from_hf(OLD | old | {"eos_token_id": 11}), read(**new)
    assert vars(theirs) | {"model_type": "falcon"} == vars(ours)


def test_rope_is_read_in_both_spellings():
    assert read(rope_theta=5e5).rope_theta == 5e5
    assert read(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope_theta == 5e5
    new = read(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    assert new == read(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert (new.rope_theta, new.rope_factor) == (5e5, 2.0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("falcon-7b", 6_921_720_704),
        ("falcon-40b", 41_303_293_952),
        ("falcon-180B", 178_557_088_768),
        ("falcon-11B", 11_102_822_400),
        ("falcon-rw-1b", 1_311_625_216),
        ("falcon-rw-7b", 7_516_020_736),
    ],
)
def test_presets_have_the_parameters_of_the_published_models(name, parameters):
    config = Config.preset(name)
    built = sum(p.numel() for part in parts(config).values() for p in part.parameters())
    tied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
    assert built - tied == parameters


def test_an_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="'falcon-3b', there are falcon-7b, falcon-40b"):
        Config.preset("falcon-3b")


def test_keys_that_change_nothing_at_inference_are_ignored():
    harmless = {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "use_cache": False,
        "architectures": ["RWForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_RW.RWConfig"},
        "ff_factor": 4,
        "activation": "gelu",
        "apply_residual_connection_post_layernorm": False,
    }
    assert read(**harmless) == read()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bloom"}, "bloom"),
        ({"model_type": None}, "model_type None"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size .*None"),
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"hidden_size": 20}, "head_dim 5"),
        ({"vocab_size": "96"}, "vocab_size .*'96'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .*0"),
        ({"n_layer": 3}, "n_layer 3 and num_hidden_layers 4 disagree"),
        ({"n_head_kv": 2, "num_kv_heads": 4}, "n_head_kv 2 and num_kv_heads 4 disagree"),
        ({"new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads 3"),
        ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn false"),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn 3"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2 .* new_decoder_architecture false"),
        ({"alibi": "yes"}, "alibi .*'yes'"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon .*0"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"eos_token_id": "</s>"}, "eos_token_id .*'</s>'"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a mapping, got 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor .*None"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor' means nothing",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_parameters and rope_scaling disagree",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}},
            "'default' and type 'linear' disagree",
        ),
        (
            {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
            "rope_scaling: 'factor' means nothing to rope_type 'default'",
        ),
        ({"rope_theta": "1e4"}, "rope_theta .*'1e4'"),
    ],
)
def test_a_value_that_would_change_the_numbers_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        read(**changes)
