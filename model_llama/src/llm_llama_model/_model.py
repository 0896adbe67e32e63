"""The decoder: begin (embedding), layers, end (norm and head). One set of classes, switches from the config."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._config import Config
from ._mlp import MLP, NOWHERE, Experts, Router
from ._rope import rotate

Cache = tuple[Tensor, Tensor]  # keys and values, each (rows, slots, num_key_value_heads, head_dim)


class Begin(nn.Module):
    """input_ids [B, T], positions [B, T] -> x [B, T, hidden_size]."""

    gathered: ClassVar[dict[str, str]] = {"embed_tokens.weight": "input_ids"}  # looked up by row, never read whole

    def __init__(self, config: Config) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size)  # to draw random numbers on meta takes seconds
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)


class Layer(nn.Module):
    """One decoder layer: x [B, T, hidden_size], positions [B, T] -> x.

    Without a cache x holds whole rows, each from position 0 on; right padding is exact, as no query sees a later key.

    With `cache` (`new_cache`, or views of its B rows) the new keys and values are first written in place at `slots`
    [B, T] (default: `positions`; padding names a spare slot beyond every position). A query at position p then sees
    the slots <= p, and > p - window, among the first `kv_len` (default: all). Where `kv_len == T` and every row starts
    at position 0, nothing older is to be seen, and the kernel's own causal path is taken. `mask` [B, T, kv_len], true
    where seen, replaces the rule.

    A layer with experts names the child that has them in `routed`: weights of its item i, which lie in the part
    `mid.00003/experts.0000i`, are needed in passes in which a token is routed there, once `experts.announce` says so.
    Padding, which is what has a slot beyond its position, is routed nowhere.
    """

    rewind = "any"  # a cache can be rolled back to any length: stale slots are unseen until they are overwritten

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, window=config.windows[index])
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.routed = None
        if config.routing is None or not config.routing.layers[index]:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        else:
            self.routed = "experts"
            self.mlp = Router(config, config.routing)
            self.experts = Experts(config, config.routing)

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
        h = x + self.self_attn(self.input_layernorm(x), positions, cache, slots=slots, kv_len=kv_len, mask=mask)
        normed = self.post_attention_layernorm(h)
        if self.routed is None:
            return h + self.mlp(normed)
        tokens = normed.flatten(0, 1)  # (B * T, hidden_size)
        indices, weights = self.mlp(tokens)
        if cache is not None and slots is not None and mask is None:  # padding does not even see itself
            indices = indices.masked_fill((slots > positions).reshape(-1, 1), NOWHERE)
        return h + self.experts(tokens, indices, weights).view_as(h)

    def new_cache(
        self, rows: int, slots: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Cache:
        """Zeroed keys and values for `rows` rows of `slots` positions; `dtype` must be that of x."""
        shape = (rows, slots, self.self_attn.num_key_value_heads, self.self_attn.head_dim)
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


class End(nn.Module):
    """x [B, T, hidden_size] -> logits [B, T, vocab_size]."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.norm(x))


class Attention(nn.Module):
    """Attention with grouped keys and values (GQA), rotary positions and, where the config has one, a window."""

    def __init__(self, config: Config, *, window: int | None) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.rope, self.window = config.head_dim, config.rope, window
        q_size, kv_size = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

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
        q = self.q_norm(self.q_proj(x).view(batch, length, self.num_heads, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim))
        v = self.v_proj(x).view(batch, length, self.num_key_value_heads, self.head_dim)
        cos, sin = self.rope.cos_sin(positions, self.head_dim, dtype=x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        if cache is not None:
            rows = torch.arange(batch, device=x.device)[:, None]
            for stored, new in zip(cache, (k, v), strict=True):
                stored[rows, positions if slots is None else slots] = new
        fresh = kv_len == length and mask is None and not positions[:, 0].any()
        if cache is None or fresh:  # whole rows: what is seen is what was just computed
            positions = torch.arange(length, device=x.device)[None]
            causal = self.window is None or self.window >= length
        else:
            k, v = cache[0][:, :kv_len], cache[1][:, :kv_len]
            causal = False
        if mask is None and not causal:
            mask = visible(positions, k.shape[1], self.window)
        out = attend(q, k, v, mask)  # (B, T, heads, head_dim)
        return self.o_proj(out.reshape(batch, length, -1))


def visible(positions: Tensor, kv_len: int, window: int | None) -> Tensor:
    """Which of `kv_len` slots a query at positions [B, T] sees: [B, T, kv_len], true where seen."""
    last = positions.clamp(0, kv_len - 1)[..., None]  # so that a padding query, too, sees something: no NaN
    slots = torch.arange(kv_len, device=positions.device)
    seen = slots <= last
    return seen if window is None else seen & (slots > last - window)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k / sqrt(head_dim)) v, causal where mask is None, keys and values never expanded to all heads.

    q [B, T, heads, head_dim]; k and v [B, S, num_key_value_heads, head_dim]; mask [B or 1, T, S], true where seen.
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


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, then times the weight (arXiv 1910.07467; the order is the checkpoints')."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)
