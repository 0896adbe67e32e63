"""What a process with a run in it takes at most, held against `memory=`: Python and torch, weights, caches, logits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, LlamaConfig, MixtralConfig

from families import save

PROGRAM = r"""
import re, sys, torch, llm_llama_model, llm_partial_run, llm_sepweight
path, more, rows, prompts, length, n = sys.argv[1], *map(int, sys.argv[2:])
weights = llm_sepweight.open(path, layout=llm_llama_model.layout)
parts = llm_llama_model.parts(llm_llama_model.Config.from_hf(weights.config))
budget = dict(rows=rows, context=length, tokens=rows * length)
try:
    llm_partial_run.plan(parts, weights, memory=1, **budget)
except llm_partial_run.BudgetError as error:
    memory = error.smallest + more
with llm_partial_run.PartialRun(parts, weights, memory=memory, **budget) as run:
    ids = torch.arange(prompts * length).view(prompts, length) % 96
    logits = run.forward.last_logits(ids, torch.full((prompts,), length), n)
peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]  # not that of whoever started it
print(memory, int(peak) * 1024, run.plan.spilled, tuple(logits.shape))
"""


@pytest.mark.parametrize(
    ("hidden_size", "vocab_size", "more", "rows", "prompts", "length", "n"),
    [
        (512, 4096, 0, 8, 8, 512, 1),  # keys and values on disk
        (64, 64_000, 380 << 20, 1, 1, 512, 512),  # the logits of all positions
        (64, 64_000, 630 << 20, 1, 2, 512, 512),  # those of more rows than go at once
    ],
    ids=["caches", "logits", "more rows"],
)
def test_the_process_stays_within_its_memory(hidden_size, vocab_size, more, rows, prompts, length, n, tmp_path):
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=192, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True)  # fmt: skip
    arguments = [str(save(config, tmp_path)), *map(str, (more, rows, prompts, length, n))]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    memory, peak, spilled, *shape = done.stdout.split(maxsplit=3)
    assert int(peak) <= int(memory), f"{(int(peak) - int(memory)) >> 20} MiB more than allowed"
    assert (int(spilled) > 0) == (more == 0)
    assert shape == [f"({prompts}, {n}, {vocab_size})\n"]
    print(f"{(int(memory) - int(peak)) >> 20} MiB below the {int(memory) >> 20} allowed")


# Decodes after a prompt, and goes over prompts of other lengths: what oneDNN keeps for each new shape is memory, too.
DECODE = r"""
import re, sys, torch, llm_partial_run, llm_sepweight
from importlib.metadata import entry_points
path, family, rows, context, tokens, steps = *sys.argv[1:3], *map(int, sys.argv[3:])
(family,) = [found.load() for found in entry_points(group="llm_microlibs.families", name=family)]
weights = llm_sepweight.open(path, layout=family.layout)
parts = family.parts(family.Config.from_hf(weights.config))
budget = dict(rows=rows, context=context, tokens=tokens)
try:
    llm_partial_run.plan(parts, weights, memory=1, **budget)
except llm_partial_run.BudgetError as error:
    memory = error.smallest
with llm_partial_run.PartialRun(parts, weights, memory=memory, **budget) as run:
    for length in [*range(context - steps, context), *range(context, 1, -context // 32)]:
        ids = torch.randint(96, (context, rows), generator=torch.Generator().manual_seed(0 if length > context - steps else length))
        run.forward.last_logits(ids.T[:, :length], torch.full((rows,), length))
peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]
print(memory, int(peak) * 1024)
"""

WIDE: dict[str, Any] = dict(hidden_size=512, vocab_size=2048, num_hidden_layers=3, num_attention_heads=8)
LLAMA = LlamaConfig(**WIDE, intermediate_size=1024)
BLOOM = BloomConfig(hidden_size=512, vocab_size=2048, n_layer=3, n_head=8)
MIXTRAL = MixtralConfig(
    **WIDE, intermediate_size=256, num_local_experts=32, num_experts_per_tok=4, num_key_value_heads=4
)
FALCON = FalconConfig(hidden_size=1136, vocab_size=2048, num_hidden_layers=1, num_attention_heads=71)


@pytest.mark.parametrize(
    ("config", "context", "tokens", "steps"),
    [(LLAMA, 400, 256, 120), (BLOOM, 400, 256, 120), (MIXTRAL, 512, 512, 2), (FALCON, 512, 1024, 2)],
    ids=["llama", "bloom", "many experts", "falcon"],
)
def test_a_process_that_has_met_many_shapes_stays_within_its_memory(config, context, tokens, steps, tmp_path):
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    arguments = [str(tmp_path), config.model_type, *map(str, (2, context, tokens, steps))]
    done = subprocess.run([sys.executable, "-c", DECODE, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    memory, peak = map(int, done.stdout.split())
    assert peak <= memory, f"{(peak - memory) >> 20} MiB more than allowed"
    print(f"{(memory - peak) >> 20} MiB below the {memory >> 20} allowed")
