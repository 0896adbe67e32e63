"""Constrained decoding through the libraries that people use for it, as they are published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from llm_sampler import generate, regex
from llm_sampler._regex import _texts

TOKENIZER = Tokenizer.from_file(str(Path(__file__).parents[1] / "demo" / "model" / "tokenizer.json"))
SIZE = TOKENIZER.get_vocab_size()
END = 0
HUGGING_FACE = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token=TOKENIZER.id_to_token(END))
TABLE = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2
PATTERN = r"(Paris|Rome|[a-z]{2,9}), [0-9]{1,3}(\.[0-9])?"
LIBRARIES = ["llguidance", "xgrammar", "outlines_core"]


def table(ids: Tensor) -> Tensor:
    return TABLE[ids]


def text_of(row: Any) -> str:
    return TOKENIZER.decode([token for token in row.tokens if token != END])


def with_xgrammar(pattern: str) -> Any:
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor

    info = xgrammar.TokenizerInfo.from_huggingface(HUGGING_FACE, vocab_size=SIZE, stop_token_ids=[END])
    grammar = xgrammar.GrammarCompiler(info).compile_regex(pattern)
    return lambda row: LogitsProcessor(grammar)


def with_outlines(pattern: str) -> Any:
    pytest.importorskip("outlines")
    from outlines.backends.outlines_core import OutlinesCoreBackend, OutlinesCoreLogitsProcessor
    from outlines.models.transformers import TransformerTokenizer
    from outlines_core import Index

    tokenizer = TransformerTokenizer(HUGGING_FACE)  # type: ignore[arg-type]
    vocabulary = OutlinesCoreBackend.create_outlines_core_vocabulary(
        tokenizer.get_vocab(), tokenizer.eos_token_id, tokenizer.eos_token, tokenizer.convert_token_to_string
    )
    index = Index(pattern, vocabulary)
    return lambda row: OutlinesCoreLogitsProcessor(index, "torch")


def with_llguidance(pattern: str) -> Any:
    """Through outlines, which is where it has a logits processor for torch."""
    pytest.importorskip("outlines")
    llguidance = pytest.importorskip("llguidance")
    from llguidance.hf import from_tokenizer
    from outlines.backends.llguidance import LLGuidanceLogitsProcessor

    vocabulary = from_tokenizer(HUGGING_FACE, n_vocab=SIZE, eos_token=END)
    grammar = llguidance.grammar_from("regex", pattern)
    return lambda row: LLGuidanceLogitsProcessor(grammar, vocabulary, "torch")


@pytest.mark.parametrize("library", [with_xgrammar, with_outlines, with_llguidance])
def test_published_processors_constrain_rows_of_different_length_that_end_at_different_times(library: Any) -> None:
    prompts = [[5], [6, 7, 8], [9, 9], [5, 6, 7, 8, 9]]
    options: dict[str, Any] = {"max_new_tokens": 60, "stop_ids": END, "temperature": 1.2}
    with torch.compiler.set_stance("force_eager"):  # a compiler would take longer than all else here
        rows = generate(table, prompts, seed=[1, 2, 3, 4], processors=library(PATTERN), **options)
        [alone] = generate(table, prompts[2:3], seed=[3], processors=library(PATTERN), **options)
    assert {row.finished for row in rows} == {"stop"}
    assert len({len(row.tokens) for row in rows}) > 1
    assert all(re.fullmatch(PATTERN, text_of(row)) for row in rows)
    assert alone.tokens == rows[2].tokens


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, HUGGING_FACE], ids=["tokenizers", "transformers"])
@pytest.mark.parametrize("pattern", [PATTERN, "[0-9]{3}", "(yes|no)"])
def test_regex_rows_match_as_a_whole_and_end_by_themselves(library: str, tokenizer: Any, pattern: str) -> None:
    pytest.importorskip(library)
    factory = regex(pattern, tokenizer, end_id=END, library=library)
    rows = generate(table, [[5]] * 6, max_new_tokens=60, seed=3, processors=factory)
    for row in rows:
        assert row.finished == "complete"
        assert re.fullmatch(pattern, text_of(row))


def test_libraries_agree_token_for_token() -> None:
    drawn = []
    for library in ("llguidance", "xgrammar"):
        pytest.importorskip(library)
        factory = regex(PATTERN, TOKENIZER, end_id=END, library=library)
        drawn.append([row.tokens for row in generate(table, [[5]] * 8, max_new_tokens=60, seed=0, processors=factory)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("library", LIBRARIES)
def test_characters_that_take_several_tokens_are_matched_or_refused(library: str) -> None:
    pytest.importorskip(library)
    pattern = "[é☃]{2}!"
    if library == "outlines_core":
        with pytest.raises(ValueError, match="outlines_core refuses the pattern"):
            regex(pattern, TOKENIZER, end_id=END, library=library)
        return
    factory = regex(pattern, TOKENIZER, end_id=END, library=library)
    for row in generate(table, [[5]] * 4, max_new_tokens=20, seed=0, processors=factory):
        assert re.fullmatch(pattern, text_of(row))


def test_tokens_are_read_behind_one_that_is_text_whatever_the_order_of_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = {"Ã": 0, "©": 1, "©a": 2, "a": 3, "b": 4}  # bytes: the first two are the halves of é
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.decoder = decoders.ByteLevel()
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for first in ids:
        order = {first: ids[first], **ids}
        monkeypatch.setattr(own, "get_vocab", lambda order=order: order)
        assert _texts(own) == {3: "a", 4: "b"}
    with monkeypatch.context() as halves:
        halves.setattr(own, "get_vocab", lambda: {"Ã": 0, "©": 1})
        with pytest.raises(ValueError, match="none of its tokens is text by itself"):
            _texts(own)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_pattern_that_is_none_is_refused_at_once(library: str) -> None:
    pytest.importorskip(library)
    with pytest.raises(ValueError, match=f"{library} refuses the pattern"):
        regex("(", TOKENIZER, end_id=END, library=library)


def test_regex_takes_the_end_from_the_tokenizer_or_asks_for_it() -> None:
    pytest.importorskip("llguidance")
    [row] = generate(table, [[5]], max_new_tokens=30, seed=0, processors=regex("[0-9]+", HUGGING_FACE))
    assert row.finished == "length" or row.tokens[-1] == END
    with pytest.raises(ValueError, match="regex needs end_id"):
        regex("[0-9]+", TOKENIZER)
    with pytest.raises(ValueError, match="library is 'lark'"):
        regex("[0-9]+", TOKENIZER, end_id=END, library="lark")


def test_hugging_faces_stateful_processors_work_one_instance_for_each_row() -> None:
    def factory(row: int) -> transformers.LogitsProcessorList:
        return transformers.LogitsProcessorList(
            [
                transformers.ForcedEOSTokenLogitsProcessor(9, END),
                transformers.ExponentialDecayLengthPenalty((2, 1.5), END, 3),
                transformers.SuppressTokensAtBeginLogitsProcessor([1, 2, END], 3),
                transformers.PrefixConstrainedLogitsProcessor(lambda _, ids: [END, 10 + row, 20 + row], 1),
            ]
        )

    rows = generate(table, [[5, 6, 7]] * 4, max_new_tokens=9, seed=1, stop_ids=END, processors=factory)
    for index, row in enumerate(rows):
        assert row.finished == "stop"
        assert 1 < len(row.tokens) <= 6
        assert set(row.content) <= {10 + index, 20 + index}
