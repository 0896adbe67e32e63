"""Beam search against Hugging Face's `generate(num_beams=...)` on the same models."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers

import llm_sampler

VOCABULARY = 41


@pytest.fixture(scope="module", params=[0.3, 1.0], ids=["flat", "peaked"])
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=request.param,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
def test_beams_and_scores_equal_generates(
    model: transformers.PreTrainedModel, length_penalty: float, early_stopping: Any
) -> None:
    """Our prompts of different length are searched in one call, theirs one by one."""
    chance = random.Random(f"{length_penalty} {early_stopping}")
    count = 5
    prompts = [[chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 6))] for _ in range(count)]
    stops = [chance.sample(range(VOCABULARY), chance.randint(1, 6)) for _ in range(count)]
    lengths = [chance.randint(1, 12) for _ in range(count)]
    beams = [chance.randint(2, 6) for _ in range(count)]
    penalties = [chance.choice([1.0, 1.4]) for _ in range(count)]
    ours = llm_sampler.beam_search(
        lambda ids: model(ids, use_cache=False).logits,
        prompts,
        max_new_tokens=lengths,
        num_beams=beams,
        stop_ids=stops,
        repetition_penalty=penalties,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        theirs: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beams[row],
            num_return_sequences=beams[row],
            do_sample=False,
            max_new_tokens=lengths[row],
            eos_token_id=stops[row],
            pad_token_id=VOCABULARY - 1,
            repetition_penalty=penalties[row],
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert len(ours[row]) == beams[row]
        texts = [text[len(prompt) :] for text in theirs.sequences.tolist()]
        assert [list(beam.tokens) for beam in ours[row]] == [
            text[: len(beam.tokens)] for text, beam in zip(texts, ours[row], strict=True)
        ]
        assert all(
            set(text[len(beam.tokens) :]) <= {VOCABULARY - 1} for text, beam in zip(texts, ours[row], strict=True)
        )
        assert [beam.score for beam in ours[row]] == pytest.approx(theirs.sequences_scores.tolist(), abs=2e-4)
