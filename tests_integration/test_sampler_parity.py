"""The sampler against Hugging Face: its processors on the same logits, its `generate` on the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llm_sampler
from llm_sampler._scores import Scores
from llm_sampler._stages import History, chain

VOCABULARY = 32_003


def ours(logits: Tensor, ids: Tensor, prompt: int, **options: float) -> Tensor:
    """The logits over the vocabulary after the stages, in Hugging Face's order."""
    rows = len(logits)
    settings = {name: [value] * rows for name, value in options.items()}
    history = History(ids, [ids.shape[1]] * rows, [prompt] * rows)
    scores = Scores(logits, None, logits.shape[-1])
    order = [name for name in llm_sampler.HUGGING_FACE_ORDER if name in options]
    for stage in chain(order, settings, range(rows), logits.device):
        scores = stage(scores, history)
    return scores.widened().values


def theirs(logits: Tensor, ids: Any, **options: float) -> Tensor:
    kinds = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    chosen = [kinds[name](options[name]) for name in kinds if name in options]
    for processor in chosen:
        logits = processor(ids, logits.clone())  # type: ignore[arg-type]
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"temperature": 0.7},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"repetition_penalty": 1.1, "temperature": 0.8, "top_k": 50, "top_p": 0.9},
        {"repetition_penalty": 0.8, "temperature": 1.4, "top_k": 200, "top_p": 0.7, "min_p": 0.02},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_stages_equal_hugging_faces_processors(options: dict[str, float], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, VOCABULARY, generator=generator) * scale
    ids = torch.randint(VOCABULARY, (3, 40), generator=generator)
    torch.testing.assert_close(ours(logits, ids, 10, **options), theirs(logits, ids, **options), atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=211,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


PROMPTS = [[5, 9, 100, 3], [7], [8, 8, 1, 0, 44, 13, 2]]
STOPS = [17, 60, 61, 62, 63, 64]


@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_text_equals_generate_for_rows_of_different_length(
    model: transformers.PreTrainedModel, penalty: float
) -> None:
    """Our rows go through the model as one right-padded batch, theirs one by one."""
    rows = llm_sampler.generate(
        lambda ids: model(ids, use_cache=False).logits,
        PROMPTS,
        max_new_tokens=24,
        temperature=0,
        repetition_penalty=penalty,
        stop_ids=STOPS,
    )
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = torch.tensor([prompt])
        out: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=STOPS,
            pad_token_id=0,
        )
        assert list(row.tokens) == out[0, len(prompt) :].tolist()
        assert row.finished == ("stop" if row.tokens[-1] in STOPS else "length")


def test_raw_logprobs_equal_the_models(model: transformers.PreTrainedModel) -> None:
    [row] = llm_sampler.generate(lambda ids: model(ids).logits, PROMPTS[:1], max_new_tokens=8, seed=0, top_k=5)
    ids = torch.tensor([PROMPTS[0] + list(row.tokens)])
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
    want = logprobs.gather(-1, torch.tensor(row.tokens).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.tensor(row.logprobs), want, atol=1e-5, rtol=0)


def test_scores_equal_the_models_log_likelihoods(model: transformers.PreTrainedModel) -> None:
    continuations = [[1], [2], [1, 5, 6], [200, 3]]
    results = llm_sampler.score(lambda ids: model(ids).logits, PROMPTS[0], continuations)
    for result, continuation in zip(results, continuations, strict=True):
        ids = torch.tensor([PROMPTS[0] + continuation])
        labels = torch.tensor([[-100] * len(PROMPTS[0]) + continuation])
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        assert result.mean == pytest.approx(-float(loss), abs=1e-5)


def test_streamed_text_equals_decode_with_a_published_kind_of_tokenizer() -> None:
    """Byte-level pairs and byte fallback, both with the tokenizers library's own decoders."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    text = "Zürich, naïve: 你好 👩‍👩‍👧 end. " * 6
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = decoders.ByteLevel()
    fallback = Tokenizer(
        models.BPE({f"<0x{i:02X}>": i for i in range(256)} | {"▁": 256, "e": 257}, [], byte_fallback=True)
    )
    fallback.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fallback.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for tokenizer in (level, fallback):
        ids = tokenizer.encode(text).ids
        steps = [llm_sampler.Step((0,), (token,), (0.0,), (0.0,), (None,)) for token in ids]
        pieces = list(llm_sampler.stream_text(steps, tokenizer.decode))
        assert "".join(pieces) == tokenizer.decode(ids) == text
        assert not any("\ufffd" in piece for piece in pieces)
