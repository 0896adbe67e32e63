"""lm-evaluation-harness with `score` as its model gives the numbers of its own Hugging Face backend.

It brings 45 packages and 600 MB, so it is not in the development environment: `make test-harness` installs it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import llm_sampler

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed; `make test-harness` installs it", exc_type=ImportError
)
model_api: Any = pytest.importorskip("lm_eval.api.model")
windows_api: Any = pytest.importorskip("lm_eval.utils")
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

ANIMALS = ["dog", "cat", "horse", "blue whale", "eagle", "bat", "goldfish", "ox"]
TEXT = " ".join(f"The {animal} is an animal. Is it {word}? It is, or is not: {word}." for animal in ANIMALS
                for word in ("large", "small", "very small indeed", "fast", "slow"))  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Multiple choice with choices of one token and of several, and the perplexity of documents longer than the context."""
    path = tmp_path_factory.mktemp("data")
    words = ["large", "small", "very small indeed", "fast", "slow"]
    questions = [
        {"question": f"Is the {animal} {word}?", "choices": words, "answer": (i + j) % 5}
        for i, animal in enumerate(ANIMALS)
        for j, word in enumerate(words)
    ]
    (path / "questions.jsonl").write_text("\n".join(json.dumps(question) for question in questions))
    documents = [{"text": TEXT[start : start + size]} for start, size in ((0, 1200), (300, 90), (700, 700))]
    (path / "documents.jsonl").write_text("\n".join(json.dumps(document) for document in documents))

    def data(name: str) -> dict[str, Any]:
        return {
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path / name)}},
            "test_split": "test",
        }

    metrics = [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")]
    perplexities = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    return [
        {
            "task": "animals",
            **data("questions.jsonl"),
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "num_fewshot": 0,
            "metric_list": metrics,
        },
        {
            "task": "documents",
            **data("documents.jsonl"),
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": perplexities,
        },
    ]


def harness_model(forward: Any, tokenizer: Any, max_length: int) -> Any:
    class Scored(model_api.TemplateLM):
        """All that the harness asks of a model, by `llm_sampler.score`."""

        eot_token_id = tokenizer.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return tokenizer.encode(string, add_special_tokens=False)

        def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
            cut = [(context[-(max_length + 1 - len(target)) :], target) for _, context, target in requests]
            results = llm_sampler.score(forward, [context for context, _ in cut], [[target] for _, target in cut])
            return [(result.sum, result.is_greedy) for [result] in results]

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                windows = map(
                    windows_api.make_disjoint_window,
                    windows_api.get_rolling_token_windows(
                        ids, self.prefix_token_id, max_seq_len=max_length, context_len=1
                    ),
                )
                sums.append(sum(value for value, _ in self._loglikelihood_tokens([(None, *w) for w in windows])))
            return sums

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            raise AssertionError("no task here generates")

    return Scored()


def evaluated(model: Any, tasks: list[dict[str, Any]]) -> Any:
    return lm_eval.simple_evaluate(
        model, tasks=[dict(task) for task in tasks], bootstrap_iters=0, log_samples=True, random_seed=None
    )


@pytest.mark.filterwarnings("ignore")
def test_the_harness_gets_the_same_numbers_as_from_its_own_backend(checkpoint: Path, tasks: list) -> None:
    backend: Any = pytest.importorskip("lm_eval.models.huggingface").HFLM
    theirs = evaluated(backend(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4), tasks)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    with llm_sampler.serve(llm_sampler.from_huggingface(model)) as server, llm_sampler.from_url(server.url) as remote:
        for forward in (llm_sampler.from_huggingface(model), lambda ids: model(ids).logits, remote):
            ours = evaluated(harness_model(forward, tokenizer, max_length=96), tasks)
            for task, results in theirs["results"].items():
                for name, value in results.items():
                    if isinstance(value, float):
                        assert ours["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
            compared = 0
            for task in ("animals", "documents"):
                for own, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
                    for mine, expected in zip(own["resps"], other["resps"], strict=True):
                        mine, expected = (r[0] if isinstance(r[0], tuple) else r for r in (mine, expected))
                        assert mine[0] == pytest.approx(expected[0], abs=1e-3 if task == "documents" else 2e-4)
                        assert list(mine[1:]) == list(expected[1:])
                        compared += 1
            assert compared == 40 * 10 + 3
    assert 0 < theirs["results"]["animals"]["acc,none"] < 1
