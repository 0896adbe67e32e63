"""The sampler against Hugging Face: its processors on the same logits, its `generate` on the same model."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import llm_sampler
from llm_sampler._prepare import prepared
from llm_sampler._sampler import Drawn

VOCABULARY = 32_003
PROMPT, GENERATED = 30, 10
DEFAULTS = {name: p.default for name, p in inspect.signature(llm_sampler.sample).parameters.items()}


def ours(logits: Tensor, ids: Tensor, **options: Any) -> Tensor:
    """The logits over the vocabulary after all stages; the rows were given PROMPT of the ids and drew the others."""
    rows, sampler = prepared({**DEFAULTS, "input_ids": ids[:, :PROMPT], "max_new_tokens": GENERATED + 1, **options})
    for column in ids[:, PROMPT:].T.tolist():
        sampler.accept(rows, [Drawn(token, 0.0, 0.0) for token in column])
    return sampler.process(logits, rows).scores.widened().values


def theirs(logits: Tensor, ids: Any, *processors: Any) -> Tensor:
    for processor in processors:
        logits = processor(ids, logits.clone())
    return logits


def some(*places: int) -> list[int]:
    """Ids at these places of the last row, so that what names them has something to do."""
    return [int(IDS[-1, place]) for place in places]


GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(VOCABULARY, (3, PROMPT + GENERATED), generator=GENERATOR)
IDS[0, 20:24] = IDS[0, 36:40]  # a row that repeats itself: three tokens, and what came next
IDS[0, 37:40] = IDS[0, 20:23]
WORDS = [[5], [*some(-1), 77], [*some(-3, -2, -1), 78], [*some(-4, -2, -1), 79], some(7, 8)]
BIAS = {(7,): 2.5, (31_000,): -3.0, (*some(-1), 9): 4.0, (*some(-2, -1), 10): -1.5, (*some(-1, -2), 11): 9.0}
STOPS = [17, 60, 61, 62, 63, 64]
CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "repetition": ({"repetition_penalty": 1.3}, [transformers.RepetitionPenaltyLogitsProcessor(1.3)]),
    "bias": (
        {"logit_bias": BIAS},
        [transformers.SequenceBiasLogitsProcessor([[list(key), value] for key, value in BIAS.items()])],
    ),
    "bad words": ({"bad_words_ids": WORDS}, [transformers.NoBadWordsLogitsProcessor(WORDS)]),
    "suppressed": ({"bad_words_ids": [[1], [2]]}, [transformers.SuppressTokensLogitsProcessor([1, 2])]),
    "one of each": ({"no_repeat_ngram_size": 1}, [transformers.NoRepeatNGramLogitsProcessor(1)]),
    "no 3-gram": ({"no_repeat_ngram_size": 3}, [transformers.NoRepeatNGramLogitsProcessor(3)]),
    "no 5-gram": ({"no_repeat_ngram_size": 5}, [transformers.NoRepeatNGramLogitsProcessor(5)]),
    "minimum not reached": (
        {"min_new_tokens": GENERATED + 1, "stop_ids": STOPS},
        [transformers.MinNewTokensLengthLogitsProcessor(PROMPT, GENERATED + 1, STOPS)],
    ),
    "minimum reached": (
        {"min_new_tokens": GENERATED, "stop_ids": STOPS},
        [transformers.MinNewTokensLengthLogitsProcessor(PROMPT, GENERATED, STOPS)],
    ),
    "allowed": (
        {"allowed_token_ids": [*range(9), 31_999]},
        [transformers.PrefixConstrainedLogitsProcessor(lambda row, ids: [*range(9), 31_999], 1)],
    ),
    "temperature": ({"temperature": 0.7}, [transformers.TemperatureLogitsWarper(0.7)]),
    "top-k": ({"top_k": 50}, [transformers.TopKLogitsWarper(50)]),
    "top-p": ({"top_p": 0.9}, [transformers.TopPLogitsWarper(0.9)]),
    "min-p": ({"min_p": 0.05}, [transformers.MinPLogitsWarper(0.05)]),
    "typical": ({"typical_p": 0.8}, [transformers.TypicalLogitsWarper(0.8)]),
    "typical, narrow": ({"typical_p": 0.1}, [transformers.TypicalLogitsWarper(0.1)]),
    "epsilon": ({"epsilon_cutoff": 3e-4}, [transformers.EpsilonLogitsWarper(3e-4)]),
    "epsilon, none reach it": ({"epsilon_cutoff": 0.9}, [transformers.EpsilonLogitsWarper(0.9)]),
    "eta": ({"eta_cutoff": 0.02}, [transformers.EtaLogitsWarper(0.02)]),
    "eta, high": ({"eta_cutoff": 0.3}, [transformers.EtaLogitsWarper(0.3)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_each_stage_equals_hugging_faces_processor(case: str, scale: float) -> None:
    options, processors = CASES[case]
    logits = torch.randn(len(IDS), VOCABULARY, generator=torch.Generator().manual_seed(1)) * scale
    got, want = ours(logits, IDS, **options), theirs(logits, IDS, *processors)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    reached = case not in ("minimum reached", "no 5-gram")
    assert torch.equal(got, logits) != reached, "the case does something, unless it must not"


def test_hugging_face_keeps_ties_in_typical_sampling_and_stop_ids_among_bad_words_where_the_readme_says_so() -> None:
    ids, logits = torch.zeros(1, PROMPT, dtype=torch.long), torch.tensor([[0.0, 0.0, 0.0, 0.0, -5.0]])
    assert theirs(logits, ids, transformers.TypicalLogitsWarper(0.5)).isfinite().sum() == 4
    assert ours(logits, ids, typical_p=0.5).isfinite().sum() == 3, "two have a little less than half of the mass"
    bad = transformers.NoBadWordsLogitsProcessor([[1], [2]], eos_token_id=torch.tensor([2]))
    assert theirs(logits, ids, bad).isfinite().tolist() == [[True, False, True, True, True]]
    assert ours(logits, ids, bad_words_ids=[[1], [2]], stop_ids=2).isfinite().tolist() == [
        [True, False, False, True, True]
    ]


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("foreign", [False, True])
def test_all_together_equal_hugging_faces_in_their_order(scale: float, foreign: bool) -> None:
    """With foreign=True the processors are theirs, one set for each row, and only the warpers ours."""
    order = ["bias", "repetition", "no 3-gram", "bad words", "minimum not reached"]
    warpers = ["temperature", "top-k", "top-p", "min-p", "typical", "epsilon", "eta"]
    own = [name for name in order + warpers if not foreign or name in warpers]
    options = {name: value for case in own for name, value in CASES[case][0].items()}
    options |= {"top_k": 2000, "min_p": 0.001}
    if foreign:
        options["processors"] = lambda row: transformers.LogitsProcessorList(
            [
                transformers.SequenceBiasLogitsProcessor([[list(key), value] for key, value in BIAS.items()]),
                transformers.RepetitionPenaltyLogitsProcessor(1.3),
                transformers.NoRepeatNGramLogitsProcessor(3),
                transformers.NoBadWordsLogitsProcessor(WORDS),
                transformers.MinNewTokensLengthLogitsProcessor(PROMPT, GENERATED + 1, STOPS),
            ]
        )
    logits = torch.randn(len(IDS), VOCABULARY, generator=torch.Generator().manual_seed(1)) * scale
    processors = [processor for case in order + warpers for processor in CASES[case][1]]
    processors[6:9:2] = [transformers.TopKLogitsWarper(2000), transformers.MinPLogitsWarper(0.001)]
    torch.testing.assert_close(ours(logits, IDS, **options), theirs(logits, IDS, *processors), atol=1e-6, rtol=1e-6)


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
    options: dict = {"max_new_tokens": 8, "seed": 0, "top_k": 5, "logprobs": True}
    [row] = llm_sampler.generate(lambda ids: model(ids).logits, PROMPTS[:1], **options)
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
