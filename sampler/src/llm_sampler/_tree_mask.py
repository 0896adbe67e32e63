"""Who sees whom in rows whose last tokens are a tree of drafts."""

from __future__ import annotations

import torch
from torch import Tensor


def tree_mask(rows: list[list[int]], parents: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For right-aligned rows of ids, T wide, that end with the nodes of a tree: what is added to attention's scores,
    [B, 1, T, T], and the positions, [B, T].

    A node sees what is before node 0, its ancestors and itself, at the position behind its parent's; the tokens before
    see those before them. parents: for each node the place of its parent in its row.

    Example:
        >>> mask, positions = tree_mask([[5, 7, 8, 9]], [[0, 1, 1]], torch.float32)  # 5, then 7, then 8 or 9
        >>> positions.tolist(), (mask[0, 0] == 0).int().tolist()[-1]
        ([[0, 1, 2, 2]], [1, 1, 0, 1])
    """
    width = max(map(len, rows))
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding too: a softmax over nothing is NaN
    positions = torch.zeros(len(rows), width, dtype=torch.long)
    for b, (row, own) in enumerate(zip(rows, parents, strict=True)):
        pad, first = width - len(row), width - len(own)
        sees[b, pad:first, pad:first] = torch.ones(first - pad, first - pad, dtype=torch.bool).tril()
        positions[b, pad:first] = torch.arange(first - pad)
        for i, parent in enumerate(own):
            at = first + i
            if not -1 <= parent < at - pad:
                raise ValueError(f"row {b}: node {i} follows the token at {parent}, which is not before it")
            if parent >= 0:
                sees[b, at] |= sees[b, pad + parent]
                positions[b, at] = positions[b, pad + parent] + 1
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    return mask.unsqueeze(1), positions
