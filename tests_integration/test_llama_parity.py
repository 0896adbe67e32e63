"""What only the Llama family has, against transformers: defaults, old names and spellings, real sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

import llm_llama_model as llama
import llm_sepweight
from families import LL, MIXTURES, VARIANTS, Ours, assert_near, but, edit_config, save, theirs


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 96, (3, 48), generator=torch.Generator().manual_seed(1))


def test_a_missing_sliding_window_means_4096_to_mistral(tmp_path: Path) -> None:
    path = save(MistralConfig(**but(LL, num_hidden_layers=1), sliding_window=None), tmp_path)
    ids = torch.randint(0, 96, (1, 4100), generator=torch.Generator().manual_seed(1))
    full = Ours(path)(ids)
    edit_config(path, drop=("sliding_window",))
    windowed = Ours(path)(ids)
    assert_near(windowed, theirs(path, ids))
    assert (windowed - full)[:, :4096].abs().max() <= 2e-5 < (windowed - full)[:, 4096:].abs().max()


def test_the_first_yi_uploads_are_read_under_their_own_names(tmp_path: Path, ids: Tensor) -> None:
    path = save(VARIANTS["yi"](), tmp_path)
    expected = theirs(path, ids)
    file, old = path / "model.safetensors", {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    weights = load_file(file)
    for name in list(weights):
        for new_norm, old_norm in old.items():
            if new_norm in name:
                weights[name.replace(new_norm, old_norm)] = weights.pop(name)
    save_file(weights, file)
    edit_config(path, model_type="Yi", drop=("rope_parameters",), rope_theta=5e6)
    assert_near(Ours(path)(ids), expected)


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize(
    "variant", ["linear rope", "dynamic rope", "llama3 rope, longer", "yarn rope", "yarn rope, mscale"]
)
def test_older_spellings_of_rope_in_config_json_mean_the_same(
    tmp_path: Path, ids: Tensor, variant: str, spelling: str
) -> None:
    path = save(VARIANTS[variant](), tmp_path)
    expected = Ours(path)(ids)
    new = json.loads((path / "config.json").read_text())["rope_parameters"]
    theta, rope_type = new.pop("rope_theta"), new.pop("rope_type")
    edit_config(path, drop=("rope_parameters",), rope_theta=theta, rope_scaling={spelling: rope_type, **new})
    assert torch.equal(Ours(path)(ids), expected)
    assert_near(theirs(path, ids), expected)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=137, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8),
        LlamaConfig(num_hidden_layers=30, vocab_size=102400, eos_token_id=100001),
        LlamaConfig(num_hidden_layers=26, hidden_size=3200, intermediate_size=8640, num_attention_heads=32),
    ],
    ids=["goliath", "deepseek-llm", "openllama-3b"],
)
def test_large_models_have_the_parameters_that_transformers_gives_them(config: LlamaConfig) -> None:
    with torch.device("meta"):
        expected = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).state_dict().items()}
    written = json.loads(config.to_json_string(use_diff=False))
    modules = llama.parts(llama.Config.from_hf(written))
    ours = {(part, name): p.shape for part, module in modules.items() for name, p in module.state_dict().items()}
    assert ours == {place: shape for key, shape in expected.items() for place in llama.layout(key, written)}


@pytest.mark.parametrize(
    "config", [MixtralConfig(), Qwen3MoeConfig(num_hidden_layers=48)], ids=["mixtral", "qwen3-30b"]
)
def test_large_mixtures_have_the_parameters_that_transformers_gives_them(config: PretrainedConfig) -> None:
    with torch.device("meta"):
        expected = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    modules = llama.parts(llama.Config.from_hf(json.loads(config.to_json_string(use_diff=False))))
    assert sum(p.numel() for module in modules.values() for p in module.parameters()) == expected


@pytest.mark.parametrize("variant", MIXTURES)
def test_a_router_in_bf16_chooses_and_weighs_as_that_of_transformers_to_the_last_bit(
    tmp_path: Path, variant: str
) -> None:
    path = save(MIXTURES[variant](), tmp_path)
    ours: Any = Ours(path, dtype=torch.bfloat16).parts["mid.00001"].mlp
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    theirs = model.model.layers[1].mlp.gate
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.inference_mode():
        _, weights, chosen = theirs(x)
        assert_close(ours(x), (chosen, weights), atol=0, rtol=0)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_experts_saved_all_in_one_tensor_are_refused_with_the_remedy(tmp_path: Path, variant: str) -> None:
    AutoModelForCausalLM.from_config(VARIANTS[variant]()).save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(llm_sepweight.WeightError, match="experts.*holds all experts of a layer.*save_original_format"):
        Ours(tmp_path)


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_each_expert_is_a_part_that_can_be_loaded_alone(tmp_path: Path, variant: str) -> None:
    with llm_sepweight.open(save(VARIANTS[variant](), tmp_path), layout=llama.layout) as store:
        inner = [part for part in store.parts if part.startswith("mid.00001/")]
        assert inner == [f"mid.00001/experts.{i:05d}" for i in range(5)]
        layer = llama.parts(llama.Config.from_hf(store.config), "1:2")["mid.00001"]
        shapes = {name: p.shape for name, p in layer.get_submodule("experts.3").state_dict().items()}
        assert {name: tensor.shape for name, tensor in store.load(inner[3]).items()} == shapes
        own = {name for name in layer.state_dict() if not name.startswith("experts.")}
        assert set(store.load("mid.00001")) == own
