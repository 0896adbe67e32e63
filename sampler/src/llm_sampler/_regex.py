"""Regular expressions over token ids, by whichever library is installed that compiles them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor


class Matcher(Protocol):
    """What one row has generated so far, against what it may; allowed: the ids below `vocabulary` that may come next."""

    def allowed(self, vocabulary: int) -> Tensor: ...
    def take(self, token: int) -> None: ...
    def is_complete(self) -> bool: ...


def compiled(pattern: str, tokenizer: Any, end_id: int | None, library: str | None) -> Callable[[], Matcher]:
    """A function that makes a new matcher of `pattern`, at its start."""
    if library is None:
        library = next((name for name in _LIBRARIES if find_spec(name)), None)
        if library is None:
            raise ImportError("regex needs a library that compiles it: pip install 'llm_sampler[regex]' (llguidance)")
    if library not in _LIBRARIES:
        raise ValueError(f"library is {library!r}; known are {', '.join(_LIBRARIES)}")
    if not find_spec(library):
        raise ImportError(f"{library} is not installed; pip install {library}, or leave `library` away")
    if end_id is None:
        end_id = getattr(tokenizer, "eos_token_id", None)
    if end_id is None:
        raise ValueError("regex needs end_id, the token that ends a text: this tokenizer does not name one")
    try:
        return _LIBRARIES[library](pattern, tokenizer, end_id)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{library} refuses the pattern {pattern!r} with this tokenizer: {error}") from error


class _Steps:
    """A matcher over a library's own, which says what is allowed as ids; that is asked for once for each token."""

    def __init__(self, end_id: int, allowed: Callable[[], Tensor], take: Callable[[int], Any]):
        self._end_id = end_id
        self._ask = allowed
        self._take = take
        self._known: Tensor | None = None
        self._ended = False

    def allowed(self, vocabulary: int) -> Tensor:
        if self._known is None:
            self._known = torch.tensor([self._end_id]) if self._ended else self._ask()
        return self._known[self._known < vocabulary]

    def take(self, token: int) -> None:
        self._ended = self._ended or token == self._end_id
        if not self._ended:
            self._take(token)
        self._known = None

    def is_complete(self) -> bool:
        return self._ended or self.allowed(1 << 62).tolist() in ([], [self._end_id])


def _llguidance(pattern: str, tokenizer: Any, end_id: int) -> Callable[[], Matcher]:
    from llguidance import LLMatcher, LLTokenizer

    own = getattr(tokenizer, "backend_tokenizer", tokenizer)
    vocabulary = LLTokenizer(own.to_str(), eos_token=end_id)
    grammar = LLMatcher.grammar_from_regex(pattern)

    def new() -> Matcher:
        matcher = LLMatcher(vocabulary, grammar)
        if matcher.is_error():
            raise ValueError(matcher.get_error())

        def allowed() -> Tensor:
            return torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8).nonzero().flatten()

        return _Steps(end_id, allowed, matcher.consume_token)

    new()  # an error in the pattern is told now, not at the first token
    return new


def _xgrammar(pattern: str, tokenizer: Any, end_id: int) -> Callable[[], Matcher]:
    import xgrammar

    vocabulary = xgrammar.TokenizerInfo.from_huggingface(_hugging_face(tokenizer), stop_token_ids=[end_id])
    grammar = xgrammar.GrammarCompiler(vocabulary, max_threads=1).compile_regex(pattern)
    bits = torch.arange(32)

    def new() -> Matcher:
        matcher = xgrammar.GrammarMatcher(grammar)

        def allowed() -> Tensor:
            mask = xgrammar.allocate_token_bitmask(1, vocabulary.vocab_size)
            matcher.fill_next_token_bitmask(mask)
            flat = (mask[0].unsqueeze(-1) >> bits & 1).flatten()
            return flat[: vocabulary.vocab_size].nonzero().flatten()

        return _Steps(end_id, allowed, matcher.accept_token)

    return new


def _outlines_core(pattern: str, tokenizer: Any, end_id: int) -> Callable[[], Matcher]:
    from outlines_core import Guide, Index, Vocabulary

    table: dict[str | bytes, list[int]] = {}
    for token, text in _texts(_hugging_face(tokenizer)).items():
        if token != end_id and text:
            table.setdefault(text, []).append(token)
    index = Index(pattern, Vocabulary(end_id, table))

    def new() -> Matcher:
        guide = Guide(index)
        return _Steps(
            end_id, lambda: torch.tensor(sorted(guide.get_tokens())), lambda token: guide.advance(token, False)
        )

    return new


_LIBRARIES: dict[str, Callable[[str, Any, int], Callable[[], Matcher]]] = {
    "llguidance": _llguidance,
    "xgrammar": _xgrammar,
    "outlines_core": _outlines_core,
}


def _hugging_face(tokenizer: Any) -> Any:
    """A `tokenizers.Tokenizer` in transformers' clothes, which these libraries look for."""
    if hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise ImportError(
            "xgrammar and outlines_core take a tokenizers.Tokenizer by way of transformers, which cannot be imported: "
            "pip install transformers, or take llguidance, library='llguidance'"
        ) from error
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _texts(tokenizer: Any) -> dict[int, str]:
    """What each token adds to a text: what it decodes to behind another one, for leading spaces are stripped."""
    tokens = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    alone = ((token, tokenizer.decode([token])) for token in tokens)
    before, start = next(((token, len(text)) for token, text in alone if text and "\ufffd" not in text), (None, 0))
    if before is None:
        raise ValueError("none of its tokens is text by itself")
    texts = {token: tokenizer.decode([before, token])[start:] for token in tokens}
    return {token: text for token, text in texts.items() if "\ufffd" not in text}  # part of a character is no text
