"""Drafters: cheap guesses at what comes next, for one forward of the model to check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ._forward import Forward
from ._row import Row
from ._sampler import Sampler
from ._settings import plain


@dataclass(frozen=True, slots=True)
class Draft:
    """What may follow a row, for a drafter of your own to return: a chain of ids, or a tree.

    parents: for each token the index of the one that it follows, -1 for the end of the row; None for a chain.
    probabilities: for each token the distribution [vocabulary] that it was drawn from, given its parents and the
    drafts for the same place before it; None where chance had no part. Speculation by rejection needs the true ones.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None
    probabilities: Sequence[Tensor | Sequence[float] | None] | None = None


CustomDrafter: TypeAlias = Callable[[list[list[int]], list[int]], Sequence[Sequence[int] | Draft]]


class Drafter(Protocol):
    """What drafted_steps asks for drafts: one for each row, no deeper than its limit.

    branching: whether drafts may be trees. by_chance: draw them, and say from which probabilities; else guess what the
    rows' own uniforms will draw.
    """

    branching: bool

    def drafts(
        self, rows: Sequence[Row], limits: Sequence[int], sampler: Sampler, vocabulary: int, by_chance: bool
    ) -> list[Draft]: ...


class PromptLookup:
    """Drafts what came next where the end of a row has occurred in it before; no second model is needed.

    Pays where text repeats what is in its prompt: summaries, edits, answers with quotations, code (Saxena 2023).

    tokens: how many are drafted at most. min_match: how many at the end must have occurred before; of several places the
    longest match counts, the latest of equals. branches: how many places are followed, as a tree; more than one needs
    a forward_func with `tree_logits`.

    Example:
        >>> import torch
        >>> from llm_sampler import sample
        >>> after = torch.eye(5).roll(1, dims=1) * 9                      # 0 -> 1 -> 2 -> 3 -> 4 -> 0
        >>> steps = sample(lambda ids: after[ids], [[0, 1, 2, 3, 4, 0]], max_new_tokens=9, temperature=0,
        ...                drafter=PromptLookup(tokens=4))
        >>> [token for step in steps for token in step.tokens], steps.stats.forwards
        ([1, 2, 3, 4, 0, 1, 2, 3, 4], 3)
    """

    def __init__(self, tokens: int = 10, *, min_match: int = 2, branches: int = 1):
        self.tokens = positive("tokens", tokens)
        self.min_match = positive("min_match", min_match)
        self.branches = positive("branches", branches)
        self.branching = self.branches > 1

    def drafts(
        self, rows: Sequence[Row], limits: Sequence[int], sampler: Sampler, vocabulary: int, by_chance: bool
    ) -> list[Draft]:
        return [self._of(row, min(limit, self.tokens)) for row, limit in zip(rows, limits, strict=True)]

    def _of(self, row: Row, count: int) -> Draft:
        found = [(length, place) for place, length in row.repeats(frozenset()) if length >= self.min_match]
        tokens: list[int] = []
        parents: list[int] = []
        children: dict[tuple[int, int], int] = {}
        branches = 0
        for _, place in sorted(found, reverse=True) if self.branches > 1 else [max(found)] if found else []:
            text = row.ids[place : place + count]
            while len(text) < count:  # it runs into the row's end, and goes on with what it has drafted itself
                text.append(text[len(text) - (len(row.ids) - place)])
            node, new = -1, False
            for token in text:
                if (node, token) not in children:
                    new = True
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                node = children[node, token]
            branches += new
            if branches == self.branches:
                break
        return Draft(tokens, parents)


def drafter_of(given: Any, forward: Forward) -> Drafter:
    """A drafter as the loop asks it, from what sample was given."""
    if hasattr(given, "drafts"):
        if given.branching:
            forward.checker_of_trees("drafter")
            if forward.check_trees is not None:
                forward.check_trees()
        return given
    if not callable(given):
        raise TypeError(
            f"drafter is {given!r}; it must be PromptLookup, DraftModel or DraftTree, or a function of the rows' ids and "
            "limits that gives tokens for each row"
        )
    return _Custom(given)


class _Custom:
    """A function of the caller's, whose drafts are checked."""

    branching = True  # perhaps; where they are, and cannot be checked, that is said then

    def __init__(self, function: Any):
        self._function = function

    def drafts(
        self, rows: Sequence[Row], limits: Sequence[int], sampler: Sampler, vocabulary: int, by_chance: bool
    ) -> list[Draft]:
        given = plain(self._function([list(row.ids) for row in rows], list(limits)))
        if not isinstance(given, Sequence) or len(given) != len(rows):
            what = len(given) if isinstance(given, Sequence) else type(given).__name__
            raise ValueError(
                f"drafter gave {what} for {len(rows)} rows; give one sequence of ids, or a Draft, for each"
            )
        return [
            _checked(draft if isinstance(draft, Draft) else Draft(draft), row, limit, vocabulary, by_chance)
            for draft, row, limit in zip(given, rows, limits, strict=True)
        ]


def _checked(draft: Draft, row: Row, limit: int, vocabulary: int, by_chance: bool) -> Draft:
    """The draft down to depth `limit`; ValueError names what is wrong with it."""
    where = f"drafter: row {row.index}, step {row.step}"
    draft = Draft(plain(draft.tokens), plain(draft.parents), draft.probabilities)
    if not isinstance(draft.tokens, Sequence):
        raise ValueError(f"{where}: {draft.tokens!r} is not a sequence of ids")
    count = len(draft.tokens)
    for token in draft.tokens:
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(f"{where}: {token!r} is drafted, and ids are integers from 0 to {vocabulary - 1}")
    parents = range(-1, count - 1) if draft.parents is None else draft.parents
    if len(parents) != count or not all(type(p) is int and -1 <= p < i for i, p in enumerate(parents)):
        raise ValueError(f"{where}: parents {parents!r} do not name, for each of {count} tokens, an earlier one or -1")
    probabilities = None
    if draft.probabilities is not None and by_chance:
        try:
            probabilities = [None if q is None else torch.as_tensor(q) for q in draft.probabilities]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{where}: probabilities are not a distribution for each token: {error}") from None
        if len(probabilities) != count:
            raise ValueError(
                f"{where}: {len(probabilities)} probabilities for {count} tokens; give one tensor for each"
            )
        for token, q in zip(draft.tokens, probabilities, strict=True):
            if q is None:
                continue
            if q.shape != (vocabulary,) or not bool((q >= 0).all()) or abs(float(q.sum()) - 1) > 1e-3:
                raise ValueError(f"{where}: probabilities {list(q.shape)} are not a distribution over {vocabulary} ids")
            if not float(q[token]) > 0:
                raise ValueError(f"{where}: {token} is drafted, and has no probability in what it was drawn from")
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    kept = [index for index, depth in enumerate(depths) if depth <= limit]
    place = {index: new for new, index in enumerate(kept)} | {-1: -1}
    return Draft(
        [draft.tokens[index] for index in kept],
        [place[parents[index]] for index in kept],
        [probabilities[index] for index in kept] if probabilities is not None else None,
    )


def positive(name: str, value: Any) -> int:
    value = plain(value)
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer >= 1")
    return value
