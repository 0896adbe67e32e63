"""Scores and perplexities against transformers on the same model, and boundaries with a published kind of tokenizer."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import llm_sampler


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=211, n_embd=64, n_layer=2, n_head=4, n_positions=32)
    config.initializer_range = 0.3
    return transformers.GPT2LMHeadModel(config).eval()


@torch.no_grad()
def losses_of_the_recipe(model: Any, ids: torch.Tensor, max_length: int, stride: int) -> list[tuple[float, int]]:
    """The loop of transformers' "Perplexity of fixed-length models": each window's loss, and the labels it is a mean of."""
    out, before = [], 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - before)] = -100
        out.append((float(model(window, labels=labels).loss), int((labels[:, 1:] != -100).sum())))
        before = end
        if end == ids.shape[1]:
            return out
    raise AssertionError


@pytest.mark.parametrize("stride", [1, 8, 16, 31, 32])
def test_perplexity_is_that_of_the_documented_recipe(model: Any, stride: int) -> None:
    ids = torch.randint(211, (1, 150), generator=torch.Generator().manual_seed(1))
    windows = losses_of_the_recipe(model, ids, 32, stride)
    result = llm_sampler.perplexity(llm_sampler.from_huggingface(model), ids, max_length=32, stride=stride)
    tokens = sum(count for _, count in windows)
    assert len(result.logprobs) == tokens
    assert result.perplexity == pytest.approx(math.exp(sum(loss * count for loss, count in windows) / tokens), rel=1e-5)
    # its own average weighs a window by its labels less one, also where none was lost to the shift; the losses agree
    at, own = 0, []
    for _, count in windows:
        own.append(-sum(result.logprobs[at : at + count]) / count)
        at += count
    assert own == pytest.approx([loss for loss, _ in windows], abs=1e-5)


def test_scores_of_many_questions_are_the_models_log_likelihoods(model: Any) -> None:
    contexts = [[5, 9, 100, 3], [7], [5, 9, 100]]
    choices = [[[1], [2], [1, 5, 6]], [[200, 3], [200]], [[3, 1], [3, 2, 9, 9]]]
    for forward in (lambda ids: model(ids).logits, llm_sampler.from_huggingface(model)):
        results = llm_sampler.score(forward, contexts, choices, end_id=0, baseline=[210])
        for context, own, scores in zip(contexts, choices, results, strict=True):
            for choice, result in zip(own, scores, strict=True):
                tail = [*choice, 0]
                for head, total in ((context, result.sum), ([210], result.baseline)):
                    labels = torch.tensor([[-100] * len(head) + tail])
                    with torch.no_grad():
                        loss = float(model(torch.tensor([head + tail]), labels=labels).loss)
                    assert total == pytest.approx(-loss * len(tail), abs=2e-5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level pairs that have learned "Answer", and "Ans", and " yes" with its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["Answer Ans Answer: yes no yes no Ans Answer"] * 9, trainer)
    return tokenizer


def test_a_boundary_that_a_real_tokenizer_joins_is_seen(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("Answer").ids) == 1
    head, rows = llm_sampler.encode_choices(tokenizer.encode, "Answer:", [" yes", " no"])
    assert [tokenizer.decode(ids) for ids in (head, *rows)] == ["Answer:", " yes", " no"]
    with pytest.raises(ValueError, match="'wer'.*boundary='backoff'"):
        llm_sampler.encode_choices(tokenizer.encode, "Answer: Ans", [" no", "wer"])
    with pytest.raises(ValueError, match="'yes'"):
        llm_sampler.encode_choices(tokenizer.encode, "Answer: ", ["yes", "no"])
    for context, choices in (("Answer: ", ["yes", "no"]), ("Answer: Ans", [" no", "wer"])):
        head, rows = llm_sampler.encode_choices(tokenizer.encode, context, choices, boundary="backoff")
        assert [head + row for row in rows] == [tokenizer.encode(context + choice).ids for choice in choices]


def test_the_begin_token_of_a_transformers_tokenizer_is_there_once(tokenizer: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    begun = Tokenizer.from_str(tokenizer.to_str())
    begun.add_special_tokens(["<s>"])
    begin = begun.token_to_id("<s>")
    begun.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    encode = transformers.PreTrainedTokenizerFast(tokenizer_object=begun, bos_token="<s>").encode
    for boundary in ("error", "separate", "backoff"):
        head, rows = llm_sampler.encode_choices(encode, "Answer:", [" yes", " no"], boundary=boundary)
        assert head == [begin, *tokenizer.encode("Answer:").ids]
        assert rows == [tokenizer.encode(" yes").ids, tokenizer.encode(" no").ids]


def test_the_application_serves_behind_a_real_asgi_server(model: Any) -> None:
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn, an ASGI server, is not installed")
    app = llm_sampler.asgi_app(llm_sampler.from_huggingface(model), token="secret", max_bytes=1 << 20, timeout=5)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        with llm_sampler.from_url(f"http://127.0.0.1:{port}", token="secret", dtype="float32") as remote:
            ours = llm_sampler.generate(remote, [[5, 9], [7]], max_new_tokens=8, seed=0)
            local = llm_sampler.generate(lambda ids: model(ids).logits, [[5, 9], [7]], max_new_tokens=8, seed=0)
            assert [row.tokens for row in ours] == [row.tokens for row in local]
            with pytest.raises(llm_sampler.RemoteError, match="413"):
                remote(torch.ones(60, 32).long())
        with pytest.raises(llm_sampler.RemoteError, match="401"):
            llm_sampler.from_url(f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()
