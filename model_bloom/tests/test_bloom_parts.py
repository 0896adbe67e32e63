from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llm_bloom_model
from llm_bloom_model import Config, layout, parts

TINY = {"model_type": "bloom", "vocab_size": 96, "hidden_size": 32, "n_layer": 4, "n_head": 4}
MODELS = {"tied": TINY, "untied": TINY | {"tie_word_embeddings": False}}
SOURCE = str(Path(str(llm_bloom_model.__file__)).parent.parent)
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
from llm_bloom_model import Config, parts
parts(Config.from_hf({TINY}))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": SOURCE}).returncode == 0


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("model", MODELS)
def test_layout_reaches_every_parameter_of_every_part_once_with_and_without_the_prefix(model, prefix):
    config = MODELS[model]
    modules = parts(Config.from_hf(config))
    expected = sorted((part, name) for part, module in modules.items() for name in module.state_dict())
    ends = [name for part in ("begin", "end") for name in modules[part].state_dict() if name != "lm_head.weight"]
    keys = [
        *(f"{prefix}{name}" for name in ends),
        *["lm_head.weight"] * (not Config.from_hf(config).tie_word_embeddings),
    ]
    keys += [f"{prefix}h.{i}.{name}" for i, part in enumerate(MIDS) for name in modules[part].state_dict()]
    assert sorted(place for key in keys for place in layout(key, config)) == expected


def test_layout_sends_a_tied_embedding_to_both_ends_and_a_stored_head_the_other_way_round():
    places = [("begin", "word_embeddings.weight"), ("end", "lm_head.weight")]
    assert layout("word_embeddings.weight", TINY) == places
    assert layout("lm_head.weight", TINY) == places[::-1]
    assert layout("lm_head.weight", MODELS["untied"]) == places[1:]


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("model.embed_tokens.weight", "'model.embed_tokens.weight'"),
        ("transformer.transformer.ln_f.weight", "transformer.transformer"),
        ("transformer.lm_head.weight", "transformer.lm_head.weight"),
        ("h.4.input_layernorm.weight", "has 4 layers, none numbered 4"),
        ("h.1.ln_attn.weight", "ln_attn.weight"),
        ("h.1x.mlp.dense_4h_to_h.weight", "1x"),
        ("h.1.mlp.dense_4h_to_h.weight_scale", "weight_scale"),
        ("ln_f.scale", "ln_f.scale"),
    ],
)
def test_layout_raises_naming_a_key_it_has_no_place_for(key, named):
    with pytest.raises(ValueError, match=named):
        layout(key, TINY)
