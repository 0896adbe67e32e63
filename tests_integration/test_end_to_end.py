"""The packages together, on checkpoints as transformers saves them: same numbers, same text, clear errors."""

from __future__ import annotations

import json
import shutil
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, LlamaConfig, Qwen2Config

import llm_partial_run
import llm_sampler
import llm_sepweight
from families import EAGER_ONLY, FALCON_40B, FALCON_RW, B, but, family_of

SIZES: dict[str, Any] = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biased window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "falcon 40b": FalconConfig(**but(FALCON_40B, num_hidden_layers=6)),
    "falcon rw": FalconConfig(**but(FALCON_RW, num_hidden_layers=6)),
    "bloom": BloomConfig(**but(B, n_layer=6)),
}
BUDGET: dict[str, Any] = dict(rows=3, context=40, tokens=48, runtime=0)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]


@pytest.fixture(params=CONFIGS)
def checkpoint(request, tmp_path):
    """A tiny random checkpoint in shards, and transformers' model of it."""
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    attention = "eager" if config.model_type in EAGER_ONLY else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    return tmp_path, model


def opened(path, memory, **changes):
    family = family_of(path)
    weights = llm_sepweight.open(path, layout=family.layout)
    parts = family.parts(family.Config.from_hf(weights.config))
    return weights, llm_partial_run.PartialRun(parts, weights, memory=memory, **(BUDGET | changes))


def smallest(path, **changes):
    with pytest.raises(llm_partial_run.BudgetError) as refused:
        opened(path, 1, **changes)
    return refused.value.smallest


def padded(prompts):
    width = max(map(len, prompts))
    return torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts]), torch.tensor(
        list(map(len, prompts))
    )


def test_streamed_logits_are_transformers_and_the_same_bits_at_every_budget(checkpoint):
    path, model = checkpoint
    least = smallest(path)
    results, streamed = [], set()
    for memory in [*range(least, least + 200_000, 20_000), "1GiB"]:
        weights, run = opened(path, memory)
        with weights, run:
            results.append(run.forward.last_logits(*padded(PROMPTS), 1))
            streamed.add(run.plan.streamed)
    assert len(streamed) > 2
    assert min(streamed) == 0
    for result in results:
        assert torch.equal(result, results[0])
    for prompt, logits in zip(PROMPTS, results[0], strict=True):
        expected = model(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits[0], expected, atol=2e-5, rtol=0)


def test_greedy_text_equals_transformers_generate(checkpoint):
    path, model = checkpoint
    weights, run = opened(path, smallest(path))
    with weights, run:
        ours = llm_sampler.generate(run.forward, PROMPTS, max_new_tokens=12, temperature=0)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert list(completion.tokens) == theirs[0, len(prompt) :].tolist()


def test_a_split_checkpoint_gives_the_same_logits(checkpoint, tmp_path_factory):
    path, _ = checkpoint
    split = tmp_path_factory.mktemp("split") / "model"
    llm_sepweight.split(path, split, layout=family_of(path).layout)
    results = []
    for place in (path, split):
        weights, run = opened(place, smallest(place))
        with weights, run:
            results.append(run.forward.last_logits(*padded(PROMPTS), 1))
    torch.testing.assert_close(results[0], results[1], atol=2e-5, rtol=0)


def test_rows_that_grow_shrink_and_fan_out_equal_transformers_on_each(checkpoint):
    path, model = checkpoint
    weights, run = opened(path, smallest(path))
    prompt = PROMPTS[2]
    with weights, run:
        for rows in (
            [prompt],
            [[*prompt, 1], [*prompt, 2], [*prompt, 3]],
            [[*prompt, 2, 7], prompt[:4]],
            PROMPTS[::-1],
        ):
            for row, logits in zip(rows, run.forward.last_logits(*padded(rows), 1), strict=True):
                torch.testing.assert_close(logits[0], model(torch.tensor([row])).logits[0, -1], atol=2e-5, rtol=0)


# What can be wrong with a checkpoint


@pytest.fixture
def sharded(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    return tmp_path, shards


def test_a_missing_shard_is_named(sharded):
    path, shards = sharded
    shards[1].unlink()
    with pytest.raises(llm_sepweight.WeightError, match=shards[1].name):
        opened(path, "1GiB")


def test_a_truncated_shard_is_named_before_anything_runs(sharded):
    path, shards = sharded
    with open(shards[1], "r+b") as file:
        file.truncate(shards[1].stat().st_size - 100)
    with pytest.raises(llm_sepweight.WeightError, match=shards[1].name):
        opened(path, "1GiB")


def test_an_index_that_points_outside_of_the_directory_is_refused(sharded):
    path, shards = sharded
    shutil.copy(shards[1], path.parent / "outside.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: "../outside.safetensors" for key in index["weight_map"]}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(llm_sepweight.WeightError, match=r"\.\./outside"):
        opened(path, "1GiB")


@pytest.mark.parametrize("wrong", [torch.zeros(5, 32), torch.zeros(32, 32, dtype=torch.int8)])
def test_a_tensor_of_the_wrong_shape_or_dtype_is_named(sharded, wrong):
    path, shards = sharded
    key = "model.layers.2.self_attn.o_proj.weight"
    shard = next(s for s in shards if key in load_file(s))
    save_file(load_file(shard) | {key: wrong}, shard)
    with pytest.raises(ValueError, match=r"mid.00002: self_attn.o_proj.weight"):
        opened(path, "1GiB")


def test_a_file_that_shrinks_during_a_run_is_an_error_in_the_pass_and_no_hang(sharded):
    path, shards = sharded
    threads = threading.active_count()
    weights, run = opened(path, smallest(path))
    with weights, run:
        run.forward.last_logits(*padded(PROMPTS), 1)
        with open(shards[2], "r+b") as file:
            file.truncate(4096)
        with pytest.raises(llm_sepweight.WeightError, match=shards[2].name):
            run.forward.last_logits(*padded([[1, 2]]), 1)
    assert threading.active_count() == threads
