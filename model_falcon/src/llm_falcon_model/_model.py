"""The decoder: begin (embedding), layers, end (norm and head). One set of classes, switches from the config."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._config import Config
from ._positions import alibi, cos_sin, rotate

Cache = tuple[Tensor, Tensor]  # keys and values, each (rows, slots, num_kv_heads, head_dim)
MASK_ELEMENTS = 1 << 21  # with alibi each head has a mask of its own: so many numbers of it at a time


class Begin(nn.Module):
    """input_ids [B, T], positions [B, T] -> x [B, T, hidden_size]."""

    gathered: ClassVar[dict[str, str]] = {"word_embeddings.weight": "input_ids"}  # looked up by row, never read whole

    def __init__(self, config: Config) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)  # to draw random numbers on meta takes seconds
        self.word_embeddings = nn.Embedding.from_pretrained(weight, freeze=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class Layer(nn.Module):
    """One decoder layer: x [B, T, hidden_size], positions [B, T] -> x.

    Without a cache x holds whole rows, each from position 0 on; right padding is exact, as no query sees a later key.

    With `cache` (`new_cache`, or views of its B rows) the new keys and values are first written in place at `slots`
    [B, T] (default: `positions`; padding names a spare slot beyond every position). A query at position p then sees
    the slots <= p among the first `kv_len` (default: all). Where `kv_len == T` and every row starts at position 0,
    nothing older is to be seen, and the kernel's own causal path is taken. `mask` [B, T, kv_len], true where seen,
    replaces the rule.
    """

    rewind = "any"  # a cache can be rolled back to any length: stale slots are unseen until they are overwritten

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.layer_norm_epsilon)
        self.parallel_attn, self.separate_layernorms = config.parallel_attn, config.separate_layernorms
        if config.separate_layernorms:
            self.ln_attn, self.ln_mlp = norm(), norm()
        else:
            self.input_layernorm = norm()
        self.self_attention = Attention(config)
        if not config.parallel_attn:
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
        normed = self.ln_attn(x) if self.separate_layernorms else self.input_layernorm(x)
        attended = self.self_attention(normed, positions, cache, slots=slots, kv_len=kv_len, mask=mask)
        if self.parallel_attn:
            return x + (self.mlp(self.ln_mlp(x) if self.separate_layernorms else normed) + attended)
        h = x + attended
        return h + self.mlp(self.post_attention_layernorm(h))

    def new_cache(
        self, rows: int, slots: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Cache:
        """Zeroed keys and values for `rows` rows of `slots` positions; `dtype` must be that of x."""
        shape = (rows, slots, self.self_attention.num_kv_heads, self.self_attention.head_dim)
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
    """Attention whose keys and values are shared by all heads (7b), by groups of heads (40b), or not at all (rw)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.alibi, self.rope_theta, self.rope_factor = config.alibi, config.rope_theta, config.rope_factor
        size = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, size, bias=False)
        self.query_key_value_bias = bias(size, config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.dense_bias = bias(config.hidden_size, config)

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
        qkv = plus(self.query_key_value(x), self.query_key_value_bias).view(
            batch, length, self.num_kv_heads, -1, self.head_dim
        )
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]  # (B, T, heads | kv heads, head_dim)
        if not self.alibi:
            cos, sin = cos_sin(positions, self.head_dim, theta=self.rope_theta, factor=self.rope_factor, dtype=x.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        if cache is not None:
            rows = torch.arange(batch, device=x.device)[:, None]
            for stored, new in zip(cache, (k, v), strict=True):
                stored[rows, positions if slots is None else slots] = new
        fresh = kv_len == length and mask is None and not positions[:, 0].any()
        whole = cache is None or fresh  # whole rows: what is seen is what was just computed
        if cache is not None and not fresh:
            k, v = cache[0][:, :kv_len], cache[1][:, :kv_len]
        own = torch.arange(length, device=x.device).expand(batch, -1)
        seen = mask
        if mask is None and (self.alibi or not whole):
            seen = visible(own[:1] if whole else positions, k.shape[1])
        if self.alibi:
            drafts = None if mask is None else own if cache is None else slots
            added = alibi(key_positions(positions, k.shape[1], drafts), self.num_heads, self.head_dim, dtype=x.dtype)
            assert seen is not None
            out = attend_biased(q, k, v, seen, added)
        else:
            out = attend(q, k, v, seen)  # (B, T, heads, head_dim)
        return plus(self.dense(out.reshape(batch, length, -1)), self.dense_bias)


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


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(head_dim)) v, causal where mask is None, keys and values never expanded to all heads.

    q [B, T, heads, head_dim]; k and v [B, S, num_kv_heads, head_dim]; mask [B or 1, T, S], true where seen.
    """
    batch, length, heads, head_dim = q.shape
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    mask = None if mask is None else mask[:, None]
    if length == 1:  # the heads of a group stand in for queries: half the time of enable_gqa, and as exact
        q = q.view(batch, k.shape[1], heads // k.shape[1], head_dim)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(batch, length, heads, head_dim)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != k.shape[1]
    )
    return out.transpose(1, 2)


def attend_biased(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, added: Tensor) -> Tensor:
    """softmax(q k / sqrt(head_dim) + added) v, some heads at a time: added [B or 1, heads, 1, S], the rest as `attend`."""
    heads, kv_heads = q.shape[2], k.shape[2]
    group = heads // kv_heads
    at_once = max(1, MASK_ELEMENTS // (group * mask.shape[0] * mask.shape[1] * mask.shape[2]))
    outputs = []
    for first in range(0, kv_heads, at_once):
        shared, own = slice(first, first + at_once), slice(first * group, (first + at_once) * group)
        own_mask = added[:, own].masked_fill(~mask[:, None], -torch.inf)  # (B, heads, T, S)
        q_, k_, v_ = (t.transpose(1, 2) for t in (q[:, :, own], k[:, :, shared], v[:, :, shared]))
        outputs.append(F.scaled_dot_product_attention(q_, k_, v_, attn_mask=own_mask, enable_gqa=group > 1))
    return torch.cat(outputs, dim=1).transpose(1, 2)


class MLP(nn.Module):
    """Feed-forward network with the exact GELU."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.dense_h_to_4h_bias = bias(config.ffn_hidden_size, config)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)
        self.dense_4h_to_h_bias = bias(config.hidden_size, config)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(plus(self.dense_h_to_4h(x), self.dense_h_to_4h_bias))
        return plus(self.dense_4h_to_h(h), self.dense_4h_to_h_bias)


def bias(size: int, config: Config) -> nn.Parameter | None:
    """The bias of a Linear, beside it: Falcon was trained with products that are rounded before the bias is added."""
    return nn.Parameter(torch.empty(size)) if config.bias else None


def plus(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias
