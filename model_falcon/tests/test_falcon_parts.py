from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llm_falcon_model
from llm_falcon_model import Config, layout, parts

TINY = {
    "model_type": "falcon",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
NEW = TINY | {"new_decoder_architecture": True, "num_kv_heads": 2}
MODELS = {
    "7b": TINY,
    "biased": TINY | {"bias": True},
    "40b": NEW,
    "11b": NEW | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "rw": TINY | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
}
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
SOURCE = str(Path(str(llm_falcon_model.__file__)).parent.parent)
MIDS = [f"mid.{i:05d}" for i in range(4)]


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("f", ["begin", *MIDS, "end"]),
        ("b 0:2", ["begin", *MIDS[:2]]),
        ("2:4 e", [*MIDS[2:], "end"]),
        ("3:4 0:1", [MIDS[0], MIDS[3]]),
        ("e b", ["begin", "end"]),
        (" 0-2 \t b ", ["begin", *MIDS[:2]]),
    ],
)
def test_a_spec_names_parts_in_running_order_with_the_models_own_layer_numbers(spec, names):
    assert list(parts(Config.from_hf(TINY), spec)) == names


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("b 0:2x", "'x' at character 6"),
        ("q", "'q' at character 1"),
        ("b,e", "'b' at character 1"),
        ("0:2,e", "',' at character 4"),
        ("-1:2", "'-' at character 1"),
        ("0:1:2", "':' at character 4"),
        ("b 2:", "the end of '2:'"),
        ("2", "the end of '2'"),
        ("\u0661:2", "'\u0661' at character 1"),
        ("0:5", "beyond the 4 layers"),
        ("2:2", "2:2 holds no layer"),
        ("3:1", "3:1 holds no layer"),
        ("0:3 2:4", "2:4 names mid.00002 a second time"),
        ("f e", "e names end a second time"),
        ("", "names nothing"),
        ("  ", "names nothing"),
    ],
)
def test_a_bad_spec_is_rejected_by_naming_what_is_wrong(spec, named):
    with pytest.raises(ValueError, match=named):
        parts(Config.from_hf(TINY), spec)


@pytest.mark.parametrize("model", MODELS)
def test_constructors_allocate_nothing_and_leave_the_defaults_alone(model):
    before = torch.get_default_dtype(), torch.get_default_device()
    modules = parts(Config.from_hf(MODELS[model]))
    assert before == (torch.get_default_dtype(), torch.get_default_device())
    for module in modules.values():
        assert all(p.is_meta for p in module.parameters())
        assert not list(module.buffers())


def test_building_parts_imports_none_of_the_heavy_modules_that_torch_loads_when_asked():
    program = f"""
import sys
from llm_falcon_model import Config, parts
parts(Config.from_hf({TINY}))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": SOURCE}).returncode == 0


@pytest.mark.parametrize("model", MODELS)
def test_layout_reaches_every_parameter_of_every_part_once(model):
    config = MODELS[model]
    modules = parts(Config.from_hf(config))
    expected = sorted((part, name) for part, module in modules.items() for name in module.state_dict())
    ends = ("word_embeddings.weight", "ln_f.weight", "ln_f.bias")
    keys = [
        *(f"transformer.{name}" for name in ends),
        *["lm_head.weight"] * (not Config.from_hf(config).tie_word_embeddings),
    ]
    for i, part in enumerate(MIDS):
        stored = [name.replace("_bias", ".bias") for name in modules[part].state_dict()]
        keys += [f"transformer.h.{i}.{name}" for name in stored]
    assert sorted(place for key in keys for place in layout(key, config)) == expected


def test_layout_sends_a_tied_embedding_to_both_ends_and_a_stored_head_the_other_way_round():
    places = [("begin", "word_embeddings.weight"), ("end", "lm_head.weight")]
    assert layout("transformer.word_embeddings.weight", TINY) == places
    assert layout("lm_head.weight", TINY) == places[::-1]
    assert layout("lm_head.weight", MODELS["11b"]) == places[1:]


@pytest.mark.parametrize("name", LINEARS)
def test_layout_keeps_the_bias_of_a_linear_beside_it(name):
    owner = "mlp" if "4h" in name else "self_attention"
    key = f"transformer.h.1.{owner}.{name}.bias"
    assert layout(key, MODELS["rw"]) == [(MIDS[1], f"{owner}.{name}_bias")]
    with pytest.raises(ValueError, match=name):
        layout(key, TINY)


@pytest.mark.parametrize("rotary", ["rotary", "rotary_emb", "maybe_rotary"])
def test_layout_drops_stored_frequencies_by_their_whole_name_only(rotary):
    assert layout(f"transformer.h.2.self_attention.{rotary}.inv_freq", TINY) == []
    with pytest.raises(ValueError, match="inv_freq2"):
        layout(f"transformer.h.2.self_attention.{rotary}.inv_freq2", TINY)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("model.embed_tokens.weight", "'model.embed_tokens.weight'"),
        ("transformer.h.4.input_layernorm.weight", "has 4 layers, none numbered 4"),
        ("transformer.h.1.ln_attn.weight", "ln_attn.weight"),
        ("transformer.h.1.post_attention_layernorm.weight", "post_attention_layernorm.weight"),
        ("transformer.h.1x.mlp.dense_4h_to_h.weight", "1x"),
        ("transformer.h.1.mlp.dense_4h_to_h.weight_scale", "weight_scale"),
        ("transformer.ln_f.scale", "ln_f.scale"),
    ],
)
def test_layout_raises_naming_a_key_it_has_no_place_for(key, named):
    with pytest.raises(ValueError, match=named):
        layout(key, TINY)
