"""What only the Falcon family has, against transformers: the spelling of the first uploads, a stored tied head, real sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconConfig

import llm_falcon_model as falcon
from families import FALCON, Ours, assert_near, edit_config, save, theirs
from llm_falcon_model._presets import PRESETS

NEW_NAMES = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_kv_heads",
    "new_decoder_architecture",
    "num_ln_in_parallel_attn",
)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 96, (3, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("variant", "model_type", "names"),
    [
        ("falcon 7b", "RefinedWebModel", {"n_layer": 2, "n_head": 4}),
        ("falcon rw", "RefinedWebModel", {"n_layer": 2, "n_head": 4}),
        ("falcon 40b", "RefinedWeb", {"n_layer": 2, "n_head": 4, "n_head_kv": 2}),
    ],
)
def test_the_first_uploads_are_read_under_their_own_names(
    tmp_path: Path, ids: Tensor, variant: str, model_type: str, names: dict[str, Any]
) -> None:
    path = save(FALCON[variant](), tmp_path)
    expected = Ours(path)(ids)
    assert_near(expected, theirs(path, ids))
    edit_config(path, drop=NEW_NAMES, model_type=model_type, **names)
    assert torch.equal(Ours(path)(ids), expected)


@pytest.mark.parametrize("variant", ["falcon 7b", "falcon 40b"])
def test_frequencies_that_are_stored_change_nothing(tmp_path: Path, ids: Tensor, variant: str) -> None:
    path = save(FALCON[variant](), tmp_path)
    expected, file = theirs(path, ids), path / "model.safetensors"
    frequencies = {f"transformer.h.{i}.self_attention.maybe_rotary.inv_freq": torch.ones(4) for i in range(2)}
    save_file(load_file(file) | frequencies, file)
    assert_near(Ours(path)(ids), expected)


def test_shared_keys_and_values_are_cached_once_for_all_heads(tmp_path: Path) -> None:
    ours = Ours(save(FALCON["falcon 7b"](), tmp_path))
    ours.new_caches(3, 48)
    assert [tuple(t.shape) for t in ours.caches["mid.00000"]] == [(3, 48, 1, 8)] * 2


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_transformers_gives_the_same_config(name: str) -> None:
    written = json.loads(FalconConfig(**PRESETS[name]).to_json_string(use_diff=False))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FalconConfig(**PRESETS[name]))
    modules = falcon.parts(falcon.Config.preset(name))
    ours = {(part, key): p.shape for part, module in modules.items() for key, p in module.state_dict().items()}
    assert ours == {place: p.shape for key, p in model.state_dict().items() for place in falcon.layout(key, written)}
    assert {place[0] for key in model.state_dict() for place in falcon.layout(key, PRESETS[name])} == set(modules)
