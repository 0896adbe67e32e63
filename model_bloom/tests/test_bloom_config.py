from __future__ import annotations

import pytest

from llm_bloom_model import Config, parts

TINY = {"model_type": "bloom", "vocab_size": 96, "hidden_size": 32, "n_layer": 4, "n_head": 4}


def read(**changes: object) -> Config:
    return Config.from_hf(TINY | changes)


def test_a_minimal_config_gets_the_defaults_of_its_class():
    config = read()
    assert (config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (4, 4, 8)
    assert (config.layer_norm_epsilon, config.tie_word_embeddings, config.eos_ids) == (1e-5, True, (2,))
    assert config.dtype is None


@pytest.mark.parametrize(
    "names",
    [
        {"n_embed": 32, "n_layer": 4, "num_attention_heads": 4},  # as the 176b has them
        {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
        {"hidden_size": 32, "n_embed": 32, "n_layer": 4, "num_hidden_layers": 4, "n_head": 4},
    ],
)
def test_sizes_are_read_under_all_their_names(names):
    assert Config.from_hf({"model_type": "bloom", "vocab_size": 96} | names) == read()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bloom-560m", 559_214_592),
        ("bloom-1b1", 1_065_314_304),
        ("bloom-1b7", 1_722_408_960),
        ("bloom-3b", 3_002_557_440),
        ("bloom-7b1", 7_069_016_064),
        ("bloom", 176_247_271_424),
    ],
)
def test_presets_have_the_parameters_of_the_published_models(name, parameters):
    config = Config.preset(name)
    built = sum(p.numel() for part in parts(config).values() for p in part.parameters())
    assert built - config.vocab_size * config.hidden_size == parameters  # the head is the embedding


def test_an_unknown_preset_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match="'bloom-13b', there are bloom-560m, bloom-1b1"):
        Config.preset("bloom-13b")


def test_keys_that_change_nothing_at_inference_are_ignored():
    harmless = {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "attention_softmax_in_fp32": True,
        "masked_softmax_fusion": True,
        "pretraining_tp": 4,
        "slow_but_exact": False,
        "seq_length": 2048,
        "skip_bias_add_qkv": False,
    }
    assert read(**harmless) == read()
    assert read(slow_but_exact=True, pretraining_tp=1) == read()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "falcon"}, "falcon"),
        ({"model_type": None}, "model_type None"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm True"),
        ({"slow_but_exact": True, "pretraining_tp": 4}, "slow_but_exact True with pretraining_tp 4"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size .*None"),
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"n_embed": 64}, "hidden_size 32 and n_embed 64 disagree"),
        ({"num_hidden_layers": 3}, "n_layer 4 and num_hidden_layers 3 disagree"),
        ({"n_layer": 0}, "n_layer .*0"),
        ({"vocab_size": "96"}, "vocab_size .*'96'"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon .*0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings .*'no'"),
        ({"dtype": "int8"}, "int8"),
        ({"eos_token_id": "</s>"}, "eos_token_id .*'</s>'"),
    ],
)
def test_a_value_that_would_change_the_numbers_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        read(**changes)
