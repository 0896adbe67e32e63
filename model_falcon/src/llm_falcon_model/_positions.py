"""How a query knows how far away a key is: rotary embedding, or alibi in the rw models."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def cos_sin(
    positions: Tensor, head_dim: int, *, theta: float, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [B, T], each [B, T, 1, head_dim]: computed in fp32, returned in `dtype`."""
    angles = positions[..., None].float() * inverse_frequencies(theta, factor, head_dim, positions.device)
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]  # (B, T, 1, head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x [B, T, heads, head_dim], the first half of each head paired with the second half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@lru_cache(maxsize=64)
def inverse_frequencies(theta: float, factor: float, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position, fp32 [head_dim / 2]: computed on the CPU, whatever device and dtype are the default."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    return (1.0 / theta**exponents / factor).to(device)


def alibi(key_positions: Tensor, num_heads: int, head_dim: int, *, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of keys at positions [B, S]: [B, num_heads, 1, S] (arXiv 2108.12409).

    It grows with the key's position, which to a softmax is the same as falling with its distance. Falcon rounds it to
    bf16, whatever `dtype` is, and divides it by sqrt(head_dim) as it does the scores.
    """
    rounded = slopes(num_heads, key_positions.device)[:, None].bfloat16() * key_positions[:, None]  # (B, heads, S)
    return (rounded.to(dtype) / math.sqrt(head_dim))[:, :, None]


@lru_cache(maxsize=16)
def slopes(num_heads: int, device: torch.device) -> Tensor:
    """fp32 [num_heads]: powers of 2**(-8 / n) for the largest power of two n, then the odd ones of its square root."""
    n = 2 ** int(math.log2(num_heads))
    powers = torch.arange(1, n + 1, dtype=torch.int32, device="cpu")
    odd = torch.arange(1, 2 * (num_heads - n) + 1, 2, dtype=torch.int32, device="cpu")
    base, between = (torch.tensor(2 ** (-k / n), dtype=torch.float32, device="cpu") for k in (8, 4))
    return torch.cat((base**powers, between**odd)).to(device)
