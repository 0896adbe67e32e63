"""What only the BLOOM family has, against transformers: keys without their prefix, names of the first uploads, real sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig

import llm_bloom_model as bloom
from families import BLOOM, Ours, assert_near, edit_config, save, theirs
from llm_bloom_model._presets import PRESETS


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 96, (3, 48), generator=torch.Generator().manual_seed(1))


def test_keys_are_read_with_and_without_their_prefix(tmp_path: Path, ids: Tensor) -> None:
    path = save(BLOOM["bloom"](), tmp_path)
    expected, file = theirs(path, ids), path / "model.safetensors"
    weights = load_file(file)
    assert all(key.startswith("transformer.") for key in weights)
    assert_near(Ours(path)(ids), expected)
    save_file({key.removeprefix("transformer."): tensor for key, tensor in weights.items()}, file)
    assert_near(Ours(path)(ids), expected)


def test_the_first_uploads_are_read_under_their_own_names(tmp_path: Path, ids: Tensor) -> None:
    path = save(BLOOM["bloom"](), tmp_path)
    expected = Ours(path)(ids)
    edit_config(path, drop=("hidden_size", "n_head"), n_embed=32, num_attention_heads=4)
    assert torch.equal(Ours(path)(ids), expected)
    assert_near(expected, theirs(path, ids))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_transformers_gives_the_same_config(name: str) -> None:
    config = BloomConfig(**PRESETS[name])
    written = json.loads(config.to_json_string(use_diff=False))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = bloom.parts(bloom.Config.preset(name))
    ours = {(part, key): p.shape for part, module in modules.items() for key, p in module.state_dict().items()}
    assert ours == {place: p.shape for key, p in model.state_dict().items() for place in bloom.layout(key, written)}
