"""From a checkpoint of transformers to a file per part and back: the same tensors, the same logits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

import llm_llama_model as llama
import llm_partial_run
import llm_sepweight
from llm_sepweight import cli

SIZES: dict[str, Any] = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
FORMS = {
    "dense": (LlamaConfig(**SIZES), {}),
    "tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), {}),
    "biased": (Qwen2Config(**SIZES), {}),
    "shards": (LlamaConfig(**SIZES), {"max_shard_size": "20KB"}),
    "bin": (LlamaConfig(**SIZES), {"bin": 1}),
    "bin shards": (LlamaConfig(**SIZES), {"bin": 3}),
    "tied bin": (LlamaConfig(**SIZES, tie_word_embeddings=True), {"bin": 1}),
}


def save(model: PreTrainedModel, path: Path, **how: Any) -> None:
    shards = how.pop("bin", 0)
    if not shards:
        return model.save_pretrained(path, **how)
    path.mkdir()
    model.config.save_pretrained(path)
    state = model.state_dict()
    if shards == 1:
        return torch.save(state, path / "pytorch_model.bin")
    weight_map = {key: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, key in enumerate(state)}
    for name in set(weight_map.values()):
        torch.save({key: tensor for key, tensor in state.items() if weight_map[key] == name}, path / name)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    for file in path.glob("*.bin"):
        found |= torch.load(file, weights_only=True)
    return found


def loaded(path: Path) -> PreTrainedModel:
    """The model, of which the checkpoint lacks nothing and has nothing too much."""
    either: Any = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", output_loading_info=True)
    model, said = either
    assert not any(said.values()), said
    return model.eval()


def logits_of(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return loaded(path)(IDS).logits


def assert_same_tensors(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


@pytest.fixture(params=FORMS)
def checkpoint(request, tmp_path) -> Path:
    torch.manual_seed(0)
    config, how = FORMS[request.param]
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save(model, tmp_path / "checkpoint", **dict(how))
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("in_place", [False, True])
def test_there_and_back_the_tensors_and_the_logits_are_the_same(checkpoint, tmp_path, in_place):
    logits, whole = logits_of(checkpoint), loaded(checkpoint).state_dict()
    config = json.loads((checkpoint / "config.json").read_text())
    kept = {key: tensor for key, tensor in tensors_of(checkpoint).items() if llama.layout(key, config)}
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=llama.layout, in_place=in_place)
    llm_sepweight.export(tmp_path / "split", tmp_path / "back", max_shard_nbytes=30_000)
    assert_same_tensors(tensors_of(tmp_path / "back"), kept)  # a tied head, too, if it was stored
    assert_same_tensors(loaded(tmp_path / "back").state_dict(), whole)
    assert torch.equal(logits_of(tmp_path / "back"), logits)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config


def test_a_model_dumped_from_memory_is_the_one_that_transformers_saves(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    llm_sepweight.dump(model.state_dict(), tmp_path / "dumped", config=config, layout=llama.layout)
    assert llm_sepweight.diff(tmp_path / "dumped", checkpoint, layout=llama.layout) == []
    llm_sepweight.export(tmp_path / "dumped", tmp_path / "back")
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(checkpoint))


def test_a_run_from_a_store_that_checks_itself_is_the_same_and_refuses_damage(checkpoint, tmp_path):
    split = tmp_path / "split"
    llm_sepweight.split(checkpoint, split, layout=llama.layout)
    results = []
    for verify in (None, "lazy"):
        with llm_sepweight.open(split, verify=verify) as weights:
            config = llama.Config.from_hf(weights.config)
            with llm_partial_run.PartialRun(
                llama.parts(config), weights, memory="1GiB", runtime=0, rows=1, context=16
            ) as run:
                results.append(run.forward(IDS))
    assert torch.equal(*results)
    file = split / "mid.00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    with llm_sepweight.open(split, verify="lazy") as weights:
        parts = llama.parts(llama.Config.from_hf(weights.config))
        with pytest.raises(llm_sepweight.WeightError, match=r"damaged.*mid.00002.safetensors, part mid.00002"):
            llm_partial_run.PartialRun(parts, weights, memory="1GiB", runtime=0, rows=1, context=16)


def test_the_command_finds_the_layout_by_the_models_package(checkpoint, tmp_path, capsys):
    split, back = str(tmp_path / "split"), str(tmp_path / "back")
    assert cli.main(["split", str(checkpoint), split]) == 0
    assert cli.main(["verify", split, "--source", str(checkpoint)]) == 0
    assert cli.main(["diff", split, str(checkpoint)]) == 0
    assert cli.main(["export", split, back]) == 0
    capsys.readouterr()
    assert cli.main(["info", split, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["parts"]) == 6
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(checkpoint))
