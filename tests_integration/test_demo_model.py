"""The embedded demo model, read by transformers."""

from __future__ import annotations

import random
import runpy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

DEMO = Path(__file__).parents[1] / "demo"
FACTS = runpy.run_path(str(DEMO / "facts.py"))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "model/tokenizer.json"))


@torch.no_grad()
def complete(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[str], steps: int = 16) -> list[str]:
    """Greedy completions up to the end of the text; right-padded rows, each seeing only its own past."""
    rows = [encoding.ids for encoding in tokenizer.encode_batch(prompts)]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()) + steps, dtype=torch.long)
    for row, known in zip(ids, rows, strict=True):
        row[: len(known)] = torch.tensor(known)
    every = torch.arange(len(rows))
    for step in range(steps):
        ids[every, lengths + step] = model(input_ids=ids).logits[every, lengths + step - 1].argmax(-1)
    made = [row[length : length + steps].tolist() for row, length in zip(ids, lengths, strict=True)]
    return [tokenizer.decode(row[: row.index(model.config.eos_token_id)]) for row in made]


def test_demo_model_answers_its_questions(model, tokenizer):
    facts = random.Random(7).sample(FACTS["fixed_questions"](), 60)
    answers = complete(model, tokenizer, [f"Q: {question}\nA:" for question, _ in facts])
    wrong = [(fact, answer) for fact, answer in zip(facts, answers, strict=True) if answer != f" {fact[1]}"]
    assert len(wrong) <= 1, wrong


def test_demo_model_tells_true_from_false(model, tokenizer):
    facts = random.Random(7).sample(FACTS["checks"](seed=4), 60)  # false statements that training need not have shown
    answers = complete(model, tokenizer, [f"Q: {question}\nA:" for question, _ in facts])
    wrong = [(fact, answer) for fact, answer in zip(facts, answers, strict=True) if answer != f" {fact[1]}"]
    assert len(wrong) <= 3, wrong


def test_demo_model_completes_statements(model, tokenizer):
    sentences = FACTS["sentences"]()[::16]
    assert complete(model, tokenizer, [prompt for prompt, _ in sentences]) == [rest for _, rest in sentences]


def test_demo_model_is_three_small_files():
    sizes = {file.name: file.stat().st_size for file in (DEMO / "model").iterdir()}
    assert set(sizes) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert sum(sizes.values()) <= 3_000_000


def test_facts_never_contradict_each_other():
    answers: dict[str, str] = {}
    for question, answer in FACTS["fixed_questions"]() + [fact for seed in range(20) for fact in FACTS["checks"](seed)]:
        assert answers.setdefault(question, answer) == answer, question
