"""Constraints as factories of processors, one for each row: `sample(..., processors=choices(...))`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._processors import Factory
from ._regex import Matcher, compiled
from ._settings import plain


def choices(sequences: Sequence[Sequence[int]], *, end_id: int | None = None) -> Factory:
    """Let each row generate one of `sequences` (token ids) and finish, as "complete".

    end_id: the token by which a row ends one choice that another one starts with; needed there alone.

    Raises:
        ValueError: where there is no choice, an empty one or two that are equal; or one starts with another, without
            end_id.

    Example:
        >>> import torch
        >>> from llm_sampler import generate
        >>> likes_3 = lambda ids: torch.tensor([0., 1., 2., 3.]).expand(*ids.shape, 4)
        >>> [row] = generate(likes_3, [[0]], max_new_tokens=9, temperature=0, processors=choices([[1, 0], [2, 3, 1]]))
        >>> row.tokens, row.finished
        ((2, 3, 1), 'complete')
    """
    sequences = plain(sequences)
    if not isinstance(sequences, Iterable):
        raise ValueError(f"choices: {sequences!r} is given; sequences of ids are needed, as in [[1, 2], [3]]")
    words = [tuple(sequence) if isinstance(sequence, Iterable) else sequence for sequence in sequences]
    if not words:
        raise ValueError("choices holds none; give at least one sequence of ids")
    end_id = plain(end_id)
    ends = () if end_id is None else (end_id,)
    root: dict[int, Any] = {}
    first: dict[tuple[int, ...], int] = {}
    for index, word in enumerate(words):
        if not isinstance(word, tuple) or not word or not all(type(token) is int and token >= 0 for token in word):
            raise ValueError(f"choices: {index} is {word!r}; a choice is one or more ids, each an integer >= 0")
        if first.setdefault(word, index) < index:
            raise ValueError(f"choices: {index} is the same as {first[word]}; leave one away")
        _node(root, (*word, *ends))
    if starts := [word for word in words if not ends and _node(root, word)]:
        raise ValueError(f"choices: another one starts with {starts[0]!r}; give end_id, so that a row can end with it")
    return lambda row: _Constrained(_Choices(root))


def regex(pattern: str, tokenizer: Any, *, end_id: int | None = None, library: str | None = None) -> Factory:
    """Let each row generate text that `pattern` matches as a whole, and finish when nothing can be added.

    tokenizer: a `tokenizers.Tokenizer` or a fast Hugging Face tokenizer. end_id: the token by which a row ends text that
    could go on; by default the Hugging Face tokenizer's own. library: "llguidance", "xgrammar" or "outlines_core"; by
    default the first of them that is installed. The pattern is compiled once, for all rows.

    Raises:
        ImportError: where none of them is installed, or transformers is not, through which xgrammar and outlines_core
            take a `tokenizers.Tokenizer`. ValueError: where the library refuses the pattern.
    """
    new = compiled(pattern, tokenizer, end_id, library)
    return lambda row: _Constrained(new())


class _Constrained:
    """A processor that asks a matcher what may come next, and takes each new id once."""

    def __init__(self, matcher: Matcher):
        self._matcher = matcher
        self._seen: int | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = ids.shape[1]
        self._follow(ids[0, self._seen :].tolist())
        allowed = self._matcher.allowed(scores.shape[-1]).to(scores.device)
        masked = torch.full_like(scores, -torch.inf)
        masked[:, allowed] = scores[:, allowed]
        return masked

    def is_complete(self, ids: Sequence[int]) -> bool:
        """Whether nothing may follow; asked after each token, with the row's ids."""
        self._follow(ids[self._seen :])
        return self._matcher.is_complete()

    def _follow(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._matcher.take(token)
        self._seen = (self._seen or 0) + len(tokens)


class _Choices:
    """Where a row stands in the trie of all choices: the node's keys may come next."""

    def __init__(self, node: dict[int, Any]):
        self._node = node

    def allowed(self, vocabulary: int) -> Tensor:
        if max(self._node, default=0) >= vocabulary:
            raise ValueError(f"choices: the id {max(self._node)} is not in the vocabulary, which has {vocabulary}")
        return torch.tensor(list(self._node), dtype=torch.long)

    def take(self, token: int) -> None:
        self._node = self._node[token]

    def is_complete(self) -> bool:
        return not self._node


def _node(root: dict[int, Any], word: Sequence[int]) -> dict[int, Any]:
    """The node of a trie that `word` leads to, made where it is missing."""
    for token in word:
        root = root.setdefault(token, {})
    return root
