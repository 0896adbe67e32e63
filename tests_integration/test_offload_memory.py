"""Models of transformers under a memory budget: what the plan counts, and what a process takes."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from llm_partial_run import _kinds, _units
from offloading import CONFIGS, LATENT, LLAMA, ROUTED, T5, offloaded, on_meta, resident, save, smallest

pytestmark = pytest.mark.usefixtures("small_slices")


def test_the_plan_counts_the_keys_and_values_that_the_model_keeps(checkpoint):
    theirs = resident(checkpoint)
    with torch.no_grad():
        kept = theirs(torch.ones(2, 40, dtype=torch.long), use_cache=True).past_key_values
    nbytes = sum(tensor.nbytes for layer in kept.layers for tensor in (layer.keys, layer.values))
    counted = _kinds.cache_nbytes(on_meta(checkpoint), 2, 40, torch.float32)
    windowed = bool(getattr(theirs.config, "sliding_window", None))
    assert nbytes <= counted if windowed else nbytes == counted


def test_the_plan_counts_what_a_decoder_keeps_of_its_encoder():
    config = hf.T5Config(**T5 | dict[str, Any](num_layers=2, num_decoder_layers=4))
    model, ids = hf.AutoModelForSeq2SeqLM.from_config(config).eval(), torch.ones(2, 40, dtype=torch.long)
    with torch.no_grad():
        kept: Any = model(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    layers = [*kept.self_attention_cache.layers, *kept.cross_attention_cache.layers]
    nbytes = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    assert _kinds.cache_nbytes(model, 2, 40, torch.float32) == nbytes


def test_a_short_convolution_keeps_no_more_than_is_counted_for_its_layer():
    config = hf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"] * 2)
    assert 0 < kept_nbytes(config) <= counted_nbytes(config)


@pytest.mark.parametrize("kind", [hf.DeepseekV32Config, hf.GlmMoeDsaConfig])
def test_the_plan_counts_the_keys_of_an_indexer(kind):
    config = kind(**ROUTED | LATENT | dict[str, Any](index_head_dim=12, index_n_heads=4, index_topk=8))
    assert kept_nbytes(config) == counted_nbytes(config)


def kept_nbytes(config) -> int:
    """Of all tensors in the cache, after two rows of 40 tokens."""
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        kept = model(torch.ones(2, 40, dtype=torch.long), use_cache=True).past_key_values
    return sum(map(nbytes_in, map(vars, kept.layers)))


def nbytes_in(held: Any) -> int:
    if isinstance(held, dict):
        return sum(map(nbytes_in, held.values()))
    return held.nbytes if isinstance(held, torch.Tensor) else 0


def counted_nbytes(config) -> int:
    with torch.device("meta"):
        return _kinds.cache_nbytes(AutoModelForCausalLM.from_config(config), 2, 40, torch.float32)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (hf.Qwen3NextConfig(**LLAMA, num_experts=4), "Qwen3NextForCausalLM has layers of type linear_attention"),
        (hf.Mamba2Config(num_hidden_layers=2), "Mamba2ForCausalLM has layers of type linear_attention"),
        (hf.MiniMaxConfig(**LLAMA), "MiniMaxForCausalLM has layers of type linear_attention"),
        (hf.RwkvConfig(num_hidden_layers=2), "RwkvForCausalLM has recurrent layers"),
    ],
    ids=["qwen3 next", "mamba2", "minimax", "rwkv"],
)
def test_recurrent_layers_are_refused_where_nobody_counts_their_states(config, named):
    with pytest.raises(ValueError, match=rf"{named}, which keep something else.*not counted. Give cache="):
        counted_nbytes(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_counts_what_is_allocated_when_a_long_prompt_comes_in_chunks(name, padded, dtype, tmp_path):
    config = copy.deepcopy(CONFIGS[name])
    config.max_position_embeddings = config.n_positions = config.max_seq_len = 256  # whatever the model calls it
    path = save(config, tmp_path, dtype)
    model = on_meta(path)
    prompts = torch.ones(2, 256, dtype=torch.long)
    mask = prompts.clone()
    mask[0, : 100 * padded] = 0
    with offloaded(path, model, context=256, tokens=64) as run:
        allocated = peak_of_allocations(lambda: chunk_by_chunk(model, prompts, mask))
    assert allocated <= run.plan.caches + run.plan.activations


WINDOW = hf.Phi3Config(**LLAMA | dict[str, Any](num_key_value_heads=4, sliding_window=255, pad_token_id=0))


@pytest.mark.parametrize("name", [*CONFIGS, "window"])
def test_the_plan_counts_what_is_allocated_for_one_more_token_of_many_long_rows(name, tmp_path):
    config = copy.deepcopy(CONFIGS.get(name, WINDOW))
    config.max_position_embeddings = config.n_positions = config.max_seq_len = 256
    path = save(config, tmp_path, torch.bfloat16)
    model, prompts = on_meta(path), torch.ones(16, 256, dtype=torch.long)
    with torch.no_grad():
        kept: Any = resident(path)(prompts[:, 1:], use_cache=True).past_key_values
    step = dict(attention_mask=prompts, use_cache=True)
    with offloaded(path, model, rows=16, context=256, tokens=16) as run, torch.no_grad():
        allocated = peak_of_allocations(lambda: model(prompts[:, :1], past_key_values=copy.deepcopy(kept), **step))
    assert allocated <= run.plan.caches + run.plan.activations


def test_the_plan_counts_what_many_heads_expand_of_a_long_context(tmp_path):
    many = dict[str, Any](
        num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=2, max_position_embeddings=256
    )
    path = save(hf.MiniCPM3Config(**LLAMA | LATENT | many), tmp_path, torch.bfloat16)
    model, prompts = on_meta(path), torch.ones(2, 256, dtype=torch.long)
    with offloaded(path, model, context=256, tokens=8) as run:
        allocated = peak_of_allocations(lambda: chunk_by_chunk(model, prompts, torch.ones_like(prompts), step=4))
    assert allocated <= run.plan.caches + run.plan.activations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [dict(do_sample=False), dict(do_sample=True, top_p=0.9)], ids=["greedy", "top_p"])
def test_the_plan_counts_what_generate_holds_of_a_large_vocabulary(how, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(_units, "SLICE", 4 << 20)
    path = save(hf.LlamaConfig(**LLAMA | dict[str, Any](vocab_size=8192)), tmp_path, dtype)
    model, prompts = on_meta(path), torch.ones(32, 4, dtype=torch.long)
    how = dict(max_new_tokens=3, eos_token_id=None, pad_token_id=0, prefill_chunk_size=2) | how
    with offloaded(path, model, rows=32, context=8, tokens=64) as run:
        allocated = peak_of_allocations(lambda: model.generate(prompts, **how))
    assert allocated <= run.plan.used - run.plan.kept - run.plan.resident


def test_a_loss_of_more_logits_than_there_is_memory_for_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(_units, "SLICE", 4 << 20)
    path = save(hf.LlamaConfig(**LLAMA | dict[str, Any](vocab_size=8192)), tmp_path, torch.bfloat16)
    theirs, model, ids = resident(path), on_meta(path), torch.ones(2, 64, dtype=torch.long)
    with offloaded(path, model, smallest(path, model, context=64), context=64) as run, torch.no_grad():
        with pytest.raises(
            ValueError, match=r"labels= of 128 tokens.*more than.*give fewer tokens in a call, or offload"
        ):
            model(ids, labels=ids)
        assert run.stats.bytes_read == 0
        few = ids[:, :24]
        allocated = peak_of_allocations(lambda: model(few, labels=few))
        torch.testing.assert_close(model(few, labels=few).loss, theirs(few, labels=few).loss)
    assert allocated <= run.plan.caches + run.plan.activations
    with offloaded(path, model, "1GiB", context=64) as run, torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, theirs(ids, labels=ids).loss)


def test_a_loss_in_fp32_takes_no_more_than_the_plan_counts_for_any_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(_units, "SLICE", 4 << 20)
    path = save(hf.LlamaConfig(**LLAMA | dict[str, Any](vocab_size=8192)), tmp_path, torch.float32)
    theirs, model, ids = resident(path), on_meta(path), torch.ones(2, 64, dtype=torch.long)
    with offloaded(path, model, smallest(path, model, context=64), context=64) as run, torch.no_grad():
        allocated = peak_of_allocations(lambda: model(ids, labels=ids))
        torch.testing.assert_close(model(ids, labels=ids).loss, theirs(ids, labels=ids).loss)
    assert allocated <= run.plan.caches + run.plan.activations


def chunk_by_chunk(model, prompts, mask, step=32):
    kept: Any = hf.DynamicCache(config=model.config)
    with torch.no_grad():
        for end in range(step, prompts.shape[1] + 1, step):
            model(prompts[:, end - step : end], attention_mask=mask[:, :end], past_key_values=kept, use_cache=True)


def peak_of_allocations(work) -> int:
    """Bytes of tensors, and of what torch's kernels allocate beside them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events: Any = profiled.profiler
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    ordered = sorted(changes, key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in ordered))


PROGRAM = r"""
import re, sys, torch, llm_partial_run, llm_sepweight
from transformers import AutoConfig, AutoModelForCausalLM
path, attention, more, rows, context, chunk, new, beams, lengths = *sys.argv[1:3], *map(int, sys.argv[3:])
with torch.device("meta"):
    config = AutoConfig.from_pretrained(path, attn_implementation=attention or None)
    model = AutoModelForCausalLM.from_config(config).eval()
weights = llm_sepweight.open(path, layout=llm_partial_run.layout_from_module(model))
budget = dict(rows=rows, context=context, tokens=rows * (chunk or context))
try:
    llm_partial_run.offload(model, weights, memory=1, **budget)
except llm_partial_run.BudgetError as error:
    memory = error.smallest + more
with llm_partial_run.offload(model, weights, memory=memory, **budget) as run:
    prompts = torch.randint(0, 4096, (rows // beams, context - new))
    how = dict(max_new_tokens=new, num_beams=beams, do_sample=False, eos_token_id=None, pad_token_id=0)
    if not chunk:
        model(prompts)
    for shorter in range(lengths):
        model.generate(prompts[:, shorter:], **how, **(dict(prefill_chunk_size=chunk) if chunk else {}))
peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]  # not that of whoever started it
print(memory, int(peak) * 1024, run.plan.streamed, run.plan.resident)
"""


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (hf.LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=8,
                        num_key_value_heads=8, vocab_size=4096), 64 << 20),
        (hf.GPT2Config(n_embd=1024, n_layer=6, n_head=8, vocab_size=4096), 0),
        (
            hf.MixtralConfig(
                hidden_size=512,
                intermediate_size=1024,
                num_hidden_layers=6,
                num_attention_heads=8,
                num_key_value_heads=8,
                num_local_experts=8,
                vocab_size=4096,
            ),
            40 << 20,
        ),
        (hf.FalconConfig(hidden_size=1024, num_hidden_layers=6, num_attention_heads=1024, vocab_size=4096, alibi=True,
                         bias=True, multi_query=False, parallel_attn=False), 32 << 20),
    ],
    ids=["llama", "gpt2", "mixtral", "falcon rw"],
)  # fmt: skip
def test_the_process_stays_within_its_memory(config, more, tmp_path):
    assert_stays_within_memory(config, tmp_path, more, 192, 0)


@pytest.mark.parametrize(
    "config",
    [
        hf.LlamaConfig(hidden_size=512, intermediate_size=8192, num_hidden_layers=3, num_attention_heads=32,
                       num_key_value_heads=2, head_dim=128, vocab_size=4096),
        hf.FalconConfig(hidden_size=1024, num_hidden_layers=4, num_attention_heads=16, vocab_size=4096),
    ],
    ids=["llama", "falcon 7b"],
)  # fmt: skip
def test_the_process_stays_within_its_memory_when_a_long_prompt_comes_in_chunks(config, tmp_path):
    assert_stays_within_memory(config, tmp_path, 32 << 20, 3072, 512)


def test_the_process_stays_within_its_memory_when_keys_and_values_follow_their_beams(tmp_path):
    config = hf.LlamaConfig(hidden_size=1024, intermediate_size=256, num_hidden_layers=10, num_attention_heads=8,
                            vocab_size=4096)  # fmt: skip
    assert_stays_within_memory(config, tmp_path, 0, 256, 64, rows=16, new=5, beams=4)


def test_the_process_stays_within_its_memory_when_many_layers_keep_little_each(tmp_path):
    config = hf.LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=80, num_attention_heads=8,
                            vocab_size=4096)  # fmt: skip
    assert_stays_within_memory(config, tmp_path, 0, 512, 64, rows=4, new=5, beams=4)


@pytest.mark.parametrize(
    "config",
    [
        hf.BloomConfig(hidden_size=512, n_layer=6, n_head=8, vocab_size=4096),
        hf.GPT2Config(n_embd=1024, n_layer=2, n_head=8, vocab_size=4096),
    ],
    ids=["bloom", "gpt2"],
)
def test_the_process_stays_within_its_memory_when_attention_has_a_new_shape_with_each_of_many_tokens(config, tmp_path):
    assert_stays_within_memory(config, tmp_path, 0, 176, 16, rows=4, new=160, attention="eager")


@pytest.mark.parametrize(
    "config",
    [
        hf.GPT2Config(n_embd=1024, n_layer=2, n_head=8, vocab_size=4096),
        hf.FalconConfig(hidden_size=1024, num_hidden_layers=3, num_attention_heads=16, vocab_size=4096),
    ],
    ids=["gpt2", "falcon 7b"],
)
def test_the_process_stays_within_its_memory_when_many_prompts_each_have_another_length(config, tmp_path):
    assert_stays_within_memory(config, tmp_path, 0, 128, 0, rows=1, new=2, lengths=40)


def test_the_process_stays_within_its_memory_when_each_expert_gets_another_number_of_tokens(tmp_path):
    config = hf.Qwen3MoeConfig(
        hidden_size=384, moe_intermediate_size=256, num_experts=32, num_experts_per_tok=4, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, vocab_size=4096,
    )  # fmt: skip
    assert_stays_within_memory(config, tmp_path, 0, 1538, 512, rows=1, new=2)


def assert_stays_within_memory(config, path, more, context, chunk, rows=2, new=12, beams=1, lengths=1, attention=""):
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path, attention, *map(str, (more, rows, context, chunk, new, beams, lengths))],
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    memory, peak, streamed, resident_bytes = map(int, done.stdout.split())
    print(f"{memory - peak} bytes below the {memory} allowed")
    assert streamed > resident_bytes
    assert resident_bytes or not more  # the smallest budget may all go to slots
    assert peak <= memory, f"{peak - memory} bytes over"
