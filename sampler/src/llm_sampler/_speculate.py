"""The loop with drafts: one forward checks several tokens of each row, and the row gains those that hold.

A draft is walked from the row's end on. A position is processed once the one before it is the row's own, so stages and
processors that keep state see what they would see without drafts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._draft_model import ACCEPT
from ._drafts import Draft, Drafter
from ._draw import draw, log_probabilities
from ._forward import Forward
from ._note import noted
from ._row import Row
from ._sampler import Drawn, Sampler
from ._stats import Stats
from ._step import Step


def drafted_steps(
    forward: Forward,
    rows: list[Row],
    logits: Tensor,
    sampler: Sampler,
    cancelled: set[int],
    stats: Stats,
    drafter: Drafter,
    by_chance: bool,
) -> Generator[Step]:
    """The steps of `rows`, given the logits [B, V] after their prompts.

    by_chance: speculation by rejection. Else each token is drawn as it would be without drafts, and those that were
    drafted have their successor's logits already.
    """
    vocabulary = min(logits.shape[-1], sampler.vocab_size or logits.shape[-1])
    walks = [_Walk(row, Draft((), ()), place, 0) for place, row in enumerate(rows)]
    logits = logits.unsqueeze(1)
    while rows:
        over: set[int] = set()
        while walks := [walk for walk in walks if walk.row.index not in cancelled]:
            here = logits[[walk.place for walk in walks], [walk.column for walk in walks]]
            walking = [walk.row for walk in walks]
            drawn = _rejecting(sampler, here, walks) if by_chance else sampler.choose(here, walking)
            step = sampler.accept(walking, drawn)
            stats.gained(walking)
            over |= {row for row, finished in zip(step.rows, step.finished, strict=True) if finished is not None}
            held = [walk.follows(one.token) for walk, one in zip(walks, drawn, strict=True)]
            for walk, accepted in zip(walks, held, strict=True):
                stats.checked(walk.row, 0, accepted)
            yield step
            walks = [
                walk for walk, accepted in zip(walks, held, strict=True) if accepted and walk.row.index not in over
            ]
        rows = [row for row in rows if row.index not in over | cancelled]
        if rows:
            limits = [  # the last token comes from the forward anyway
                max(min(row.end - 1, forward.max_length) - len(row.ids), 0) for row in rows
            ]
            where = f"forward {stats.forwards}"
            with noted("drafter", where):
                drafts = drafter.drafts(rows, limits, sampler, vocabulary, by_chance)
            logits, roots = _checked(forward, rows, drafts, sampler, where)
            stats.forwarded(rows)
            for row, draft in zip(rows, drafts, strict=True):
                stats.checked(row, len(draft.tokens), 0)
            walks = [
                _Walk(row, draft, place, root)
                for place, (row, draft, root) in enumerate(zip(rows, drafts, roots, strict=True))
            ]


@dataclass(slots=True)
class _Walk:
    """A row on its way along its draft, at one of the draft's tokens or, with -1, at its own last one.

    place: which row of the logits is its own. root: the column of those after its own last token; those after the
    tokens of the draft follow in their order.
    """

    row: Row
    draft: Draft
    place: int
    root: int
    node: int = -1

    @property
    def column(self) -> int:
        return self.root + 1 + self.node

    def children(self) -> list[int]:
        """The tokens of the draft for the next place."""
        return [node for node, parent in enumerate(self.draft.parents or ()) if parent == self.node]

    def follows(self, token: int) -> bool:
        """Go to the child that is `token`; False where there is none."""
        node = next((node for node in self.children() if self.draft.tokens[node] == token), None)
        self.node = self.node if node is None else node
        return node is not None


def _checked(
    forward: Forward, rows: Sequence[Row], drafts: Sequence[Draft], sampler: Sampler, where: str
) -> tuple[Tensor, list[int]]:
    """Logits [B, N, V] after each row's last token and each of its draft's; and the column of the former.

    Rows go with their drafts behind them; one that is shorter than the N positions asked for is filled up, on the right
    where it changes nothing.
    """
    n = 1 + max(len(draft.tokens) for draft in drafts)
    branches = any(parent != node - 1 for draft in drafts for node, parent in enumerate(draft.parents or ()))
    lengths = [len(row.ids) for row in rows]
    if branches:
        ends = [length + n - 1 for length in lengths]
    else:
        ends = [max(length + len(draft.tokens), n) for length, draft in zip(lengths, drafts, strict=True)]
    indices = [row.index for row in rows]
    known = sampler.table.copy_of(rows)
    ids = known.new_full((len(rows), max(ends)), sampler.table.pad_id)
    ids[:, : known.shape[1]] = known
    for place, (length, draft) in enumerate(zip(lengths, drafts, strict=True)):
        ids[place, length : length + len(draft.tokens)] = torch.tensor(draft.tokens, dtype=ids.dtype)
    if not branches:
        logits = forward(ids, ends, n, where, indices)
        return logits, [length - 1 - (end - n) for length, end in zip(lengths, ends, strict=True)]
    parents = [
        [length - 2] + [length + parent if parent >= 0 else length - 1 for parent in draft.parents or ()]
        for length, draft in zip(lengths, drafts, strict=True)
    ]
    filled = [  # beside the row's last token, so that no position is beyond its drafts
        [*own, *[length - 2] * (n - len(own))] for own, length in zip(parents, lengths, strict=True)
    ]
    return forward.tree(ids, torch.tensor(filled, device=ids.device), where, indices), [0] * len(rows)


@torch.no_grad()
def _rejecting(sampler: Sampler, logits: Tensor, walks: Sequence[_Walk]) -> list[Drawn]:
    """A token for each walk, distributed as without drafts (Leviathan et al. 2023, Chen et al. 2023).

    A draft x from q is taken with probability min(1, p(x) / q(x)); if it is not, p becomes what of it q did not cover,
    the positive part of p - q, for the next draft or the draw. Drafts that no chance was in have q(x) = 1.
    """
    processed = sampler.process(logits, [walk.row for walk in walks])
    scores = processed.scores
    tokens, logprobs = draw(scores, [walk.row.uniform() for walk in walks])
    for place, walk in enumerate(walks):
        children = walk.children()
        if not children:
            continue
        given = log_probabilities(scores.values[place]).exp_()
        ids = torch.arange(len(given), device=given.device) if scores.ids is None else scores.ids[place]
        probabilities: Any = walk.draft.probabilities  # checked: tensors
        p, taken = given, None
        for i, node in enumerate(children):
            token, q = walk.draft.tokens[node], probabilities[node] if probabilities else None
            hits = (ids == token).nonzero()
            at = int(hits[0]) if len(hits) else None
            chance = 0.0 if at is None else float(p[at])
            if walk.row.uniform(ACCEPT + 2 * i) * (1.0 if q is None else float(q[token])) < chance:
                taken = at
                break
            p = _rest(p, ids, at, q)
        if taken is None:
            cdf = p.cumsum(-1)
            target = torch.searchsorted(cdf, walk.row.uniform() * cdf[-1], right=True)
            taken = int(torch.minimum(target, torch.searchsorted(cdf, cdf[-1])).clamp(max=len(p) - 1))
        tokens[place], logprobs[place] = ids[taken], given[taken].log()
    return sampler.drawn(processed, tokens, logprobs)


def _rest(p: Tensor, ids: Tensor, at: int | None, q: Tensor | None) -> Tensor:
    """The positive part of p - q over `ids`, as a distribution; p where rounding left nothing of it."""
    if q is not None:
        rest = (p - q.to(p)[ids.clamp(max=len(q) - 1)]).clamp_(min=0)
    else:
        rest = p.clone()
        if at is not None:
            rest[at] = 0
    total = rest.cumsum(-1)[-1]  # one after the other: what has no mass changes nothing
    return rest / total if float(total) > 0 else p
