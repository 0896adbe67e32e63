"""The decoder: begin (embedding and its norm), layers, end (norm and head)."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._config import Config

Cache = tuple[Tensor, Tensor]  # keys and values, each (rows, slots, heads, head_dim)
SCORES = 1 << 20  # attention scores computed at a time, each of 8 bytes in all: 8 MiB


class Begin(nn.Module):
    """input_ids [B, T], positions [B, T] -> x [B, T, hidden_size]."""

    gathered: ClassVar[dict[str, str]] = {"word_embeddings.weight": "input_ids"}  # looked up by row, never read whole

    def __init__(self, config: Config) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)  # to draw random numbers on meta takes seconds
        self.word_embeddings = nn.Embedding.from_pretrained(weight, freeze=False)
        self.word_embeddings_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.word_embeddings_layernorm(self.word_embeddings(input_ids))


class Layer(nn.Module):
    """One decoder layer: x [B, T, hidden_size], positions [B, T] -> x.

    Without a cache x holds whole rows, each from position 0 on; right padding is exact, as no query sees a later key.

    With `cache` (`new_cache`, or views of its B rows) the new keys and values are first written in place at `slots`
    [B, T] (default: `positions`; padding names a spare slot beyond every position). A query at position p then sees
    the slots <= p among the first `kv_len` (default: all). `mask` [B, T, kv_len], true where seen, replaces the rule.
    """

    rewind = "any"  # a cache can be rolled back to any length: stale slots are unseen until they are overwritten

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_epsilon)
        self.input_layernorm = norm()
        self.self_attention = Attention(config)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: Cache | None = None,
        *,
        slots: Tensor | None = None,
        kv_len: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        h = x + self.self_attention(self.input_layernorm(x), positions, cache, slots=slots, kv_len=kv_len, mask=mask)
        return h + self.mlp(self.post_attention_layernorm(h))

    def new_cache(
        self, rows: int, slots: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Cache:
        """Zeroed keys and values for `rows` rows of `slots` positions; `dtype` must be that of x."""
        shape = (rows, slots, self.self_attention.num_heads, self.self_attention.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


class End(nn.Module):
    """x [B, T, hidden_size] -> logits [B, T, vocab_size]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.ln_f(x))


class Attention(nn.Module):
    """Attention with a key for each head, which knows distances by alibi."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: Cache | None,
        *,
        slots: Tensor | None,
        kv_len: int | None,
        mask: Tensor | None,
    ) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.query_key_value(x).view(batch, length, self.num_heads, 3, self.head_dim).unbind(3)
        own = torch.arange(length, device=x.device).expand(batch, -1)
        if cache is not None:
            for stored, new in zip(cache, (k, v), strict=True):
                stored[torch.arange(batch, device=x.device)[:, None], positions if slots is None else slots] = new
            k, v = cache[0][:, :kv_len], cache[1][:, :kv_len]
        seen = visible(own[:1] if cache is None else positions, k.shape[1]) if mask is None else mask
        drafts = None if mask is None else own if cache is None else slots
        out = attend(q, k, v, seen, key_positions(positions, k.shape[1], drafts))
        return self.dense(out.reshape(batch, length, -1))


def visible(positions: Tensor, kv_len: int) -> Tensor:
    """Which of `kv_len` slots a query at positions [B, T] sees: [B, T, kv_len], true where seen."""
    last = positions.clamp(0, kv_len - 1)[..., None]  # so that a padding query, too, sees something: no NaN
    return torch.arange(kv_len, device=positions.device) <= last


def key_positions(positions: Tensor, kv_len: int, slots: Tensor | None) -> Tensor:
    """The positions of the keys in the first `kv_len` slots, [B or 1, kv_len]: a slot's own number, but for the
    `slots` [B, T] that drafts at `positions` [B, T] were just written to."""
    at = torch.arange(kv_len + 1, device=positions.device)[None]
    if slots is None:
        return at[:, :kv_len]
    return at.repeat(len(slots), 1).scatter(1, slots.clamp(max=kv_len), positions)[:, :kv_len]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, key_positions: Tensor) -> Tensor:
    """softmax(q k / sqrt(head_dim) + alibi) v, a row and some heads at a time: views of the cache, and few scores.

    q [B, T, heads, head_dim]; k and v [B, S, heads, head_dim]; mask [B or 1, T, S], true where seen; key_positions
    [B or 1, S]. alibi is rounded to the dtype of q, as in training; scores and softmax are fp32.
    """
    batch, length, heads, _ = q.shape
    at_once = max(1, SCORES // (length * k.shape[1]))
    out = torch.empty_like(q)
    for row in range(batch):
        unseen, at = ~mask[row % len(mask)], key_positions[row % len(key_positions)]
        alibi = (slopes(heads, q.device)[:, None, None] * at).to(q.dtype)  # (heads, 1, S)
        for first in range(0, heads, at_once):
            some = slice(first, first + at_once)
            q_, k_, v_ = (t[row, None, :, some].transpose(1, 2) for t in (q, k, v))  # (1, some heads, T or S, head_dim)
            added = alibi[None, some].masked_fill(unseen, -torch.inf)  # (1, some heads, T, S)
            out[row, :, some] = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=added)[0].transpose(0, 1)
    return out


@lru_cache(maxsize=16)
def slopes(num_heads: int, device: torch.device) -> Tensor:
    """How fast alibi (arXiv 2108.12409) grows with a key's position, fp32 [num_heads]; to a softmax that is the same
    as falling with its distance.

    Powers of 2**(-8 / n) for the largest power of two n, then the odd powers of its square root.
    """
    n = 2 ** int(math.log2(num_heads))
    powers = torch.arange(1, n + 1, dtype=torch.int32, device="cpu")
    odd = torch.arange(1, 2 * (num_heads - n) + 1, 2, dtype=torch.int32, device="cpu")
    base, between = (torch.tensor(2 ** (-k / n), dtype=torch.float32, device="cpu") for k in (8, 4))
    return torch.cat((base**powers, between**odd)).to(device)


class MLP(nn.Module):
    """Feed-forward network with the tanh approximation of GELU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(gelu(self.dense_h_to_4h(x)))


def gelu(x: Tensor) -> Tensor:
    """The formula as BLOOM was trained with it, rounded after each step: torch's own kernel gives other bits in bf16."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))
