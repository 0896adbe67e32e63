"""Every variant of every family against transformers: checkpoints written by save_pretrained, read where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

import llm_sepweight
from families import VARIANTS, Ours, assert_near, family_of, save, theirs

TIED = list({config().model_type: name for name, config in VARIANTS.items() if config().tie_word_embeddings}.values())


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(VARIANTS[request.param](), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 96, (3, 48), generator=torch.Generator().manual_seed(1))


def test_fp32_logits_are_those_of_transformers(checkpoint: Path, ids: Tensor) -> None:
    expected = theirs(checkpoint, ids)
    assert expected.abs().max() > 1, "the logits are too small to tell anything"
    assert_near(Ours(checkpoint)(ids), expected)


def test_bf16_error_is_not_above_that_of_transformers(checkpoint: Path, ids: Tensor) -> None:
    exact, rounded = theirs(checkpoint, ids), theirs(checkpoint, ids, torch.bfloat16)
    ours = Ours(checkpoint, dtype=torch.bfloat16)
    allowed = (rounded - exact).abs().mean()
    assert (ours(ids) - rounded).abs().mean() <= allowed
    ours.new_caches(3, 48)
    steps = [ours(ids[:, :40], torch.arange(40).expand(3, -1), kv_len=40)]
    steps += [ours(ids[:, i : i + 1], torch.full((3, 1), i), kv_len=i + 1) for i in range(40, 48)]
    assert (torch.cat(steps, dim=1) - rounded).abs().mean() <= allowed


@pytest.mark.parametrize("sizes", [[1] * 17, [3] * 5 + [2]], ids=["token by token", "by three"])
def test_prefill_and_cached_steps_equal_transformers_full_forward(
    checkpoint: Path, ids: Tensor, sizes: list[int]
) -> None:
    ours, start = Ours(checkpoint), 48 - sum(sizes)
    ours.new_caches(3, 48)
    steps = [ours(ids[:, :start], torch.arange(start).expand(3, -1), kv_len=start)]
    for size in sizes:
        stop = start + size
        steps.append(ours(ids[:, start:stop], torch.arange(start, stop).expand(3, -1), kv_len=stop))
        start = stop
    assert_near(torch.cat(steps, dim=1), theirs(checkpoint, ids))


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("variant", TIED)
def test_a_head_that_is_stored_though_the_config_ties_it_is_the_head(
    tmp_path: Path, ids: Tensor, variant: str, equal: bool
) -> None:
    path = save(VARIANTS[variant](), tmp_path / "checkpoint")
    file, tied = path / "model.safetensors", theirs(path, ids)
    weights = load_file(file)
    embedding = next(tensor for key, tensor in weights.items() if "embed" in key)
    assert "lm_head.weight" not in weights
    save_file(weights | {"lm_head.weight": embedding.clone() if equal else embedding.flip(0)}, file, {"format": "pt"})
    expected = theirs(path, ids)
    assert torch.equal(expected, tied) == equal
    assert_near(Ours(path)(ids), expected)
    split = tmp_path / "split"
    llm_sepweight.split(path, split, layout=family_of(path).layout)
    assert torch.equal(Ours(split)(ids), Ours(path)(ids))


@pytest.mark.parametrize("variant", TIED)
def test_a_tied_matrix_that_is_stored_as_the_head_alone_is_the_embedding_too(
    tmp_path: Path, ids: Tensor, variant: str
) -> None:
    path, split = save(VARIANTS[variant](), tmp_path / "checkpoint"), tmp_path / "split"
    expected, file = theirs(path, ids), path / "model.safetensors"
    weights = load_file(file)
    embedding = next(key for key in weights if "embed" in key and "layernorm" not in key)
    save_file({"lm_head.weight" if key == embedding else key: t for key, t in weights.items()}, file, {"format": "pt"})
    assert_near(Ours(path)(ids), expected)
    llm_sepweight.split(path, split, layout=family_of(path).layout)
    assert torch.equal(Ours(split)(ids), Ours(path)(ids))


def test_a_missing_eos_token_id_means_what_it_means_to_transformers(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("eos_token_id", None)
    meant = AutoConfig.for_model(**config).eos_token_id
    assert family_of(checkpoint).Config.from_hf(config).eos_ids == (() if meant is None else (meant,))


def test_parts_from_ranges_compose_to_the_whole(checkpoint: Path, ids: Tensor) -> None:
    assert torch.equal(Ours(checkpoint, "b 0:1", "1:2 e")(ids), Ours(checkpoint)(ids))


def test_rows_of_different_length_in_one_batch_equal_transformers_on_each_row_alone(
    checkpoint: Path, ids: Tensor
) -> None:
    ours, lengths, spare = Ours(checkpoint), torch.tensor([[3], [20], [11]]), 48
    ours.new_caches(3, spare + 1)
    at = torch.arange(20).expand(3, -1)
    prompt = ours(ids[:, :20], at, slots=torch.where(at < lengths, at, spare), kv_len=20)
    steps = [ours(ids.gather(1, lengths + i), lengths + i, kv_len=21 + i) for i in range(4)]
    for row, length in enumerate(lengths[:, 0].tolist()):
        alone = theirs(checkpoint, ids[row : row + 1, : length + 4])[0]
        together = torch.cat([prompt[row, :length], *(step[row] for step in steps)])
        assert_near(together, alone)


def test_a_rolled_back_cache_equals_a_fresh_one(checkpoint: Path, ids: Tensor) -> None:
    ours = Ours(checkpoint)
    ours.new_caches(1, 48)
    ours(ids[:1], torch.arange(48)[None], kv_len=48)
    changed = torch.cat((ids[:1, :9], ids[1:2, 9:30]), dim=1)
    got = ours(changed[:, 9:], torch.arange(9, 30)[None], kv_len=30)
    assert_near(got, theirs(checkpoint, changed)[:, 9:])
