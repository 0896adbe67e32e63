"""Drafts by a smaller model with the same tokenizer: one continuation, or a tree of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ._drafts import Draft, positive
from ._draw import draw, log_probabilities
from ._forward import Forward, ForwardFunc
from ._row import Row
from ._sampler import Sampler
from ._scores import Scores
from ._settings import plain

ACCEPT, DRAFT = 2, 3  # what uniforms of a row are for; those of the i-th draft for one place are 2 * i further on


class DraftTree:
    """Drafts a tree with a smaller model: `widths[d]` tokens after each of those at depth d.

    forward_func: as that of `sample`, called once for each depth; it must have the same tokenizer. The rows' settings
    apply to its logits as to the model's, but not their processors. Rows longer than its `max_length` get no drafts. Unless
    all widths are 1, the model needs a forward_func with `tree_logits`. Of the tokens after one, the first is drawn with
    the very number in [0, 1) with which the model's own will be, the others are the most likely; for speculation by
    rejection all are drawn independently.

    Example:
        >>> import torch
        >>> from llm_sampler import sample
        >>> after = torch.eye(5).roll(1, dims=1) * 9                      # 0 -> 1 -> 2 -> 3 -> 4 -> 0
        >>> model = lambda ids: after[ids]
        >>> steps = sample(model, [[0]], max_new_tokens=9, seed=0, drafter=DraftTree(model, widths=(1, 1, 1)))
        >>> len(list(steps)), steps.stats.forwards
        (9, 3)
    """

    def __init__(self, forward_func: ForwardFunc, widths: Sequence[int]):
        self._forward = Forward(forward_func)
        widths = plain(widths)
        if not isinstance(widths, Sequence) or not widths:
            raise ValueError(f"widths is {widths!r}; say how many tokens follow one at each depth, as in (4, 2, 1)")
        self.widths = tuple(positive("widths", width) for width in widths)
        self.branching = max(self.widths) > 1

    def drafts(
        self, rows: Sequence[Row], limits: Sequence[int], sampler: Sampler, vocabulary: int, by_chance: bool
    ) -> list[Draft]:
        trees = [_Tree([], [], []) for _ in rows]
        ends = [(index, -1, row.ids) for index, row in enumerate(rows)]  # (row, node, the ids up to it)
        for depth, width in enumerate(self.widths):
            ends = [end for end in ends if depth < limits[end[0]] and len(end[2]) <= self._forward.max_length]
            if not ends:
                break
            level = [_row_ending_in(rows[index], place, ids) for place, (index, _, ids) in enumerate(ends)]
            of = [rows[index].index for index, _, _ in ends]
            guesses = self._guesses(sampler.among(level, of), level, of, width, vocabulary, by_chance)
            ends = [
                (index, node, [*ids, token])
                for (index, parent, ids), (tokens, q) in zip(ends, guesses, strict=True)
                for node, token in trees[index].grow(parent, tokens, q)
            ]
        return [Draft(tree.tokens, tree.parents, tree.probabilities if by_chance else None) for tree in trees]

    def _guesses(
        self, own: Sampler, level: list[Row], of: list[int], width: int, vocabulary: int, by_chance: bool
    ) -> list[tuple[list[int], Tensor | None]]:
        """For each row of the level up to `width` tokens, and the distribution that they were drawn from."""
        ids, lengths = own.table.copy_of(level), [len(row.ids) for row in level]
        logits = self._forward(ids, lengths, 1, "drafter", of)[:, 0]
        if logits.shape[-1] < vocabulary or (logits.shape[-1] != vocabulary and own.vocab_size is None):
            raise ValueError(
                f"drafter: its model has a vocabulary of {logits.shape[-1]}, and forward_func one of {vocabulary}; "
                "they must share a tokenizer: give its size, at most the smaller of these, as vocab_size if only the heads are "
                "padded differently"
            )
        logits = logits[:, :vocabulary]
        for index, row, peak in zip(of, level, logits.amax(-1).tolist(), strict=True):
            if not math.isfinite(peak):
                raise ValueError(f"drafter: row {index}, step {row.step}: the largest logit of its model is {peak}")
        scores = own.process(logits, level).scores
        drawn = draw(scores, [row.uniform() for row in level])[0].flatten().tolist()
        likely = logits[:, : own.vocab_size].topk(min(width, logits.shape[-1])).indices.tolist()
        guesses: list[tuple[list[int], Tensor | None]] = [
            ([first, *(token for token in others if token != first)][:width], None)
            for first, others in zip(drawn, likely, strict=True)
        ]
        if by_chance:
            uniforms = [[row.uniform(DRAFT + 2 * i) for row in level] for i in range(width)]
            samples = [draw(scores, numbers)[0].flatten().tolist() for numbers in uniforms]
            for place in range(len(level)):
                if own.settings["temperature"][place] > 0:
                    guesses[place] = ([tokens[place] for tokens in samples], probabilities(scores, place, vocabulary))
        for place, best in enumerate(scores.values.amax(-1).tolist()):
            if best == -math.inf:  # the settings leave nothing of what this model deems possible
                guesses[place] = ([], None)
        return guesses


class DraftModel(DraftTree):
    """Drafts one continuation of `tokens` tokens with a smaller model; see `DraftTree` for the rest.

    Example:
        >>> import torch
        >>> from llm_sampler import sample
        >>> after = torch.eye(5).roll(1, dims=1) * 9                      # 0 -> 1 -> 2 -> 3 -> 4 -> 0
        >>> model = lambda ids: after[ids]
        >>> steps = sample(model, [[0]], max_new_tokens=9, seed=0, drafter=DraftModel(model, tokens=7))
        >>> len(list(steps)), steps.stats.forwards
        (9, 2)
    """

    def __init__(self, forward_func: ForwardFunc, tokens: int = 4):
        super().__init__(forward_func, (1,) * positive("tokens", tokens))


def probabilities(scores: Scores, place: int, vocabulary: int) -> Tensor:
    """What a row draws from, as a distribution [vocabulary] in float64."""
    values = log_probabilities(scores.values[place]).exp_()
    full = values.new_zeros(max(vocabulary, scores.vocabulary) + 1)  # the last is for columns without a candidate
    if scores.ids is None:
        full[: len(values)] = values
    else:
        full.scatter_(-1, scores.ids[place], values)
    return full[:vocabulary]


class _Tree:
    def __init__(self, tokens: list[int], parents: list[int], probabilities: list[Tensor | None]):
        self.tokens, self.parents, self.probabilities = tokens, parents, probabilities

    def grow(self, parent: int, tokens: list[int], q: Tensor | None) -> list[tuple[int, int]]:
        """Add tokens after a node; (node, token) of the new ones, of which an equal one goes on once."""
        grown: dict[int, int] = {}
        for token in tokens:
            grown.setdefault(token, len(self.tokens))
            self.tokens.append(token)
            self.parents.append(parent)
            self.probabilities.append(q)
        return [(node, token) for token, node in grown.items()]


def _row_ending_in(row: Row, place: int, ids: list[int]) -> Row:
    """The row with other ids, as one of a level."""
    other = Row(
        place,
        list(ids),
        row.prompt,
        row.end,
        row.shortest,
        row.key,
        row.stops,
        mirostat_tau=row.mirostat_tau,
        mirostat_eta=row.mirostat_eta,
    )
    other.mu = row.mu
    return other
