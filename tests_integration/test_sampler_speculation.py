"""Speculation over real models: Hugging Face's, with its cache or with a tree of drafts, and one that is streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llm_sampler
from llm_sampler import DraftModel, DraftTree, PromptLookup, from_huggingface

VOCABULARY = 67
PROMPTS = [[5, 9, 30, 3, 5, 9], [7], [8, 8, 1, 0, 44, 13, 2, 8, 8]]


def llama(seed: int, layers: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(0, layers=2)


@pytest.fixture(scope="module")
def smaller(model: Any) -> Any:
    """The same embedding, first layer and head: of the model's opinion now and then."""
    small = llama(0, layers=1)
    small.load_state_dict(model.state_dict(), strict=False)
    return small


class WithTrees:
    """A Hugging Face model whose forward takes a draft tree: a mask of each node's ancestors, positions by depth."""

    def __init__(self, model: Any):
        self.model = model

    def __call__(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits

    def tree_logits(self, ids: Tensor, parents: Tensor) -> Tensor:
        rows, width = ids.shape
        seen = torch.ones(width, width, dtype=torch.bool).tril().repeat(rows, 1, 1)
        positions = torch.arange(width).repeat(rows, 1)
        first = parents[:, 0] + 1
        for row in range(rows):
            for node, parent in enumerate(parents[row].tolist()):
                at = int(first[row]) + node
                seen[row, at] = seen[row, parent] if parent >= 0 else False
                seen[row, at, at] = True
                positions[row, at] = positions[row, parent] + 1 if parent >= 0 else 0
        mask = torch.zeros(rows, 1, width, width).masked_fill(~seen.unsqueeze(1), torch.finfo(torch.float32).min)
        logits = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        nodes = first.unsqueeze(-1) + torch.arange(parents.shape[1])
        return logits[torch.arange(rows).unsqueeze(-1), nodes]


@pytest.mark.parametrize("kind", ["lookup", "model", "lookup tree", "model tree"])
def test_greedy_text_equals_hugging_faces_generate(model: Any, smaller: Any, kind: str) -> None:
    drafter = {
        "lookup": PromptLookup(6, min_match=1),
        "model": DraftModel(from_huggingface(smaller), tokens=5),
        "lookup tree": PromptLookup(4, min_match=1, branches=3),
        "model tree": DraftTree(lambda ids: smaller(ids).logits, widths=(3, 2, 1)),
    }[kind]
    forward = WithTrees(model) if "tree" in kind else from_huggingface(model)
    steps = llm_sampler.sample(forward, PROMPTS, max_new_tokens=40, temperature=0, drafter=drafter)
    texts: list[list[int]] = [[] for _ in PROMPTS]
    for step in steps:
        for row, token in zip(step.rows, step.tokens, strict=True):
            texts[row].append(token)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(ids, max_new_tokens=40, do_sample=False, **options)
        assert text == out[0, len(prompt) :].tolist()
    assert steps.stats.accepted > 10
    assert steps.stats.forwards < 40


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}])
def test_sampled_text_is_the_same_with_and_without_drafts(model: Any, smaller: Any, settings: dict[str, Any]) -> None:
    options = {"max_new_tokens": 30, "seed": 5, **settings}
    plain = llm_sampler.generate(lambda ids: model(ids, use_cache=False).logits, PROMPTS, **options)
    for forward, drafter in (
        (from_huggingface(model), DraftModel(from_huggingface(smaller))),
        (WithTrees(model), DraftTree(from_huggingface(smaller), (2, 2))),
        (from_huggingface(model), DraftTree(from_huggingface(smaller), (3, 2, 1))),
        (from_huggingface(model), PromptLookup(min_match=1)),
    ):
        drafted = llm_sampler.generate(forward, PROMPTS, drafter=drafter, **options)
        assert [row.tokens for row in drafted] == [row.tokens for row in plain]


def test_drafts_beams_and_parallel_samples_run_on_a_streamed_model_and_share_the_prompt() -> None:
    import llm_llama_model as llama_family
    import llm_partial_run
    import llm_sepweight

    directory = Path(__file__).parent.parent / "demo/model"
    weights = llm_sepweight.open(directory, layout=llama_family.layout)
    config = llama_family.Config.from_hf(weights.config)
    prompt = torch.randint(config.vocab_size, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    with llm_partial_run.PartialRun(
        llama_family.parts(config), weights, memory="1GiB", runtime=0, rows=8, context=128
    ) as run:
        plain = llm_sampler.generate(run.forward, [prompt, [3]], max_new_tokens=40, temperature=0)
        before = run.stats.passes
        steps = llm_sampler.sample(
            run.forward, [prompt, [3]], max_new_tokens=40, temperature=0, drafter=PromptLookup(8, min_match=1)
        )
        texts: dict[int, list[int]] = {0: [], 1: []}
        for step in steps:
            for row, token in zip(step.rows, step.tokens, strict=True):
                texts[row].append(token)
        assert [tuple(texts[row]) for row in (0, 1)] == [row.tokens for row in plain]
        assert run.stats.passes - before == steps.stats.forwards < 40
        four = llm_sampler.generate(run.forward, [prompt], n=4, max_new_tokens=5, seed=0)
        assert four == llm_sampler.generate(run.forward, [prompt] * 4, max_new_tokens=5, seed=0)
        [beams] = llm_sampler.beam_search(run.forward, [prompt], num_beams=4, max_new_tokens=5)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        ids = torch.tensor([prompt])
        best: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=4,
            do_sample=False,
            max_new_tokens=5,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(beams[0].tokens) == best[0, len(prompt) :].tolist()
    weights.close()
