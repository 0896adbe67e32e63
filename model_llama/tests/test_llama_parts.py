from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llm_llama_model
from llm_llama_model import Config, layout, parts

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": TINY,
    "biased": TINY | {"attention_bias": True, "mlp_bias": True},
    "tied": TINY | {"tie_word_embeddings": True},
    "mistral": TINY | {"model_type": "mistral"},
    "qwen2": TINY | {"model_type": "qwen2"},
    "qwen3": TINY | {"model_type": "qwen3"},
    "qwen3 biased": TINY | {"model_type": "qwen3", "attention_bias": True},
    "Yi": TINY | {"model_type": "Yi"},
    "mixtral": TINY | {"model_type": "mixtral", "num_local_experts": 3},
    "qwen3_moe": TINY | {"model_type": "qwen3_moe", "num_experts": 3, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
}
STORED = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # as a Mixtral checkpoint calls an expert's matrices
SOURCE = str(Path(str(llm_llama_model.__file__)).parent.parent)
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
from llm_llama_model import Config, parts
parts(Config.from_hf({TINY}))
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": SOURCE}).returncode == 0


@pytest.mark.parametrize("model", MODELS)
def test_layout_reaches_every_parameter_of_every_part_once(model):
    config = MODELS[model]
    modules = parts(Config.from_hf(config))
    expected = [place(part, name) for part, module in modules.items() for name in module.state_dict()]
    keys = [
        "model.embed_tokens.weight",
        "model.norm.weight",
        *["lm_head.weight"] * (not Config.from_hf(config).tie_word_embeddings),
    ]
    keys += [
        f"model.layers.{i}.{stored(name, model)}" for i, part in enumerate(MIDS) for name in modules[part].state_dict()
    ]
    assert sorted(place for key in keys for place in layout(key, config)) == sorted(expected)


def place(part: str, name: str) -> tuple[str, str]:
    """Where the store has a parameter: that of an expert in a part of the part."""
    if match := re.fullmatch(r"experts\.([0-9]+)\.(.+)", name):
        return f"{part}/experts.{int(match[1]):05d}", match[2]
    return part, name


def stored(name: str, model: str) -> str:
    """What the checkpoint calls a parameter of a layer."""
    name = re.sub(r"^experts\.", "mlp.experts.", name)
    if model != "mixtral":
        return name
    name = re.sub(r"\w+_proj(?=\.weight)", lambda m: STORED[m[0]], name) if "experts" in name else name
    return name.replace("mlp.", "block_sparse_moe.")


def test_layout_makes_each_expert_a_part_of_its_layers_part():
    mixtral, qwen = MODELS["mixtral"], MODELS["qwen3_moe"]
    expected = [("mid.00002/experts.00001", "up_proj.weight")]
    assert layout("model.layers.2.block_sparse_moe.experts.1.w3.weight", mixtral) == expected
    assert layout("model.layers.2.mlp.experts.1.up_proj.weight", qwen) == expected
    assert layout("model.layers.2.block_sparse_moe.gate.weight", mixtral) == [(MIDS[2], "mlp.gate.weight")]
    assert layout("model.layers.1.mlp.up_proj.weight", qwen) == [(MIDS[1], "mlp.up_proj.weight")]


@pytest.mark.parametrize(
    ("model", "key", "named"),
    [
        ("mixtral", "model.layers.2.block_sparse_moe.experts.3.w1.weight", "has 3 experts, none numbered 3"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.1.w4.weight", "no place in an expert"),
        ("mixtral", "model.layers.2.mlp.experts.gate_up_proj", "save_original_format=True"),
        ("mixtral", "model.layers.2.mlp.up_proj.weight", "no place in layer 2"),
        ("qwen3_moe", "model.layers.1.mlp.experts.1.up_proj.weight", "no place in layer 1"),
        ("qwen3_moe", "model.layers.1.mlp.gate.weight", "no place in layer 1"),
        ("llama", "model.layers.1.block_sparse_moe.gate.weight", "no place in layer 1"),
    ],
)
def test_layout_refuses_an_expert_that_the_model_does_not_have(model, key, named):
    with pytest.raises(ValueError, match=named):
        layout(key, MODELS[model])


def test_layout_reads_a_config_once_for_all_keys_and_again_once_it_has_changed(monkeypatch):
    config, read = TINY | {"num_hidden_layers": 3, "rope_parameters": {"rope_theta": 1e4}}, []
    from_hf = Config.from_hf
    monkeypatch.setattr(Config, "from_hf", lambda config: read.append(config) or from_hf(config))
    for i in range(3):
        layout(f"model.layers.{i}.mlp.up_proj.weight", config)
    assert len(read) == 1
    config["num_hidden_layers"] = 2
    with pytest.raises(ValueError, match="has 2 layers"):
        layout("model.layers.2.mlp.up_proj.weight", config)
    config["rope_parameters"]["rope_theta"] = "1e4"
    with pytest.raises(ValueError, match="'1e4'"):
        layout("model.norm.weight", config)
    with pytest.raises(ValueError, match="tie_word_embeddings must be true or false"):
        layout("model.norm.weight", TINY | {"tie_word_embeddings": 1})


def test_layout_sends_a_tied_embedding_to_both_ends_and_a_stored_head_the_other_way_round():
    tied = MODELS["tied"]
    places = [("begin", "embed_tokens.weight"), ("end", "lm_head.weight")]
    assert layout("model.embed_tokens.weight", tied) == places
    assert layout("lm_head.weight", tied) == places[::-1]


def test_layout_drops_stored_frequencies_by_their_whole_name_only():
    assert layout("model.layers.2.self_attn.rotary_emb.inv_freq", TINY) == []
    with pytest.raises(ValueError, match="inv_freq2"):
        layout("model.layers.2.self_attn.rotary_emb.inv_freq2", TINY)


def test_layout_gives_the_norms_of_the_first_yi_uploads_their_later_names():
    assert layout("model.layers.1.ln1.weight", MODELS["Yi"]) == [(MIDS[1], "input_layernorm.weight")]
    assert layout("model.layers.1.ln2.weight", MODELS["Yi"]) == [(MIDS[1], "post_attention_layernorm.weight")]
    with pytest.raises(ValueError, match="ln1"):
        layout("model.layers.1.ln1.weight", TINY)


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("transformer.wte.weight", "'transformer.wte.weight'"),
        ("model.layers.4.input_layernorm.weight", "has 4 layers, none numbered 4"),
        ("model.layers.1.self_attn.q_proj.bias", "self_attn.q_proj.bias"),
        ("model.layers.1.self_attn.q_norm.weight", "self_attn.q_norm.weight"),
        ("model.layers.1x.mlp.up_proj.weight", "1x"),
        ("model.layers.1.mlp.up_proj.weight_scale", "weight_scale"),
    ],
)
def test_layout_raises_naming_a_key_it_has_no_place_for(key, named):
    with pytest.raises(ValueError, match=named):
        layout(key, TINY)
