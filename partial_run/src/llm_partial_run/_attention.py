"""Attention that a module computes itself, step by step: its products in 16 bits on a CPU leave nothing behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._products import makes_code

_T: Any = Tensor
BATCHED = {torch.matmul, torch.bmm, torch.baddbmm, torch.einsum, _T.matmul, _T.bmm, _T.baddbmm, _T.__matmul__}


class InFp32(TorchFunctionMode):
    """Products of scores and values, [..., rows, K] with [..., K, N], are taken in fp32 and rounded once.

    In 16 bits they would be oneDNN's, which keeps about 0.7 MiB for ever for each shape; and each length of a prompt has
    others. The kernels for fp32 keep nothing, and both sum in fp32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in BATCHED or "out" in kwargs:
            return func(*args, **kwargs)
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if len({x.dtype for x in tensors}) != 1 or not all(map(_matters, tensors)):
            return func(*args, **kwargs)
        wide = {name: _wide(x) for name, x in kwargs.items()}
        return func(*map(_wide, args), **wide).to(tensors[0].dtype)


def _matters(x: Tensor) -> bool:
    """Not so for a weight: it has two dimensions, or is a tensor that sees to its products itself."""
    return makes_code(x) and x.dim() > 2 and type(x) in (Tensor, nn.Parameter)


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) else x
