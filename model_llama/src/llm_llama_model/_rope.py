"""Rotary embedding: which frequencies a config asks for, and how queries and keys are turned by them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# What a config may say for each rope_type. Any other key would mean another embedding, so it is refused.
COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
KEYS: dict[str, frozenset[str]] = {
    "default": COMMON,
    "linear": COMMON | {"factor"},
    "dynamic": COMMON | {"factor", "original_max_position_embeddings"},
    "llama3": COMMON | {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": COMMON
    | {"factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"}
    | {"beta_fast", "beta_slow", "truncate", "finetuned"},
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Parameters of the rotary embedding, made by `Rope.from_hf`."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 0  # positions before the context was stretched
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # cos and sin are multiplied by it

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, max_position_embeddings: int) -> Rope:
        """Reads `rope_parameters`, or the older `rope_theta` with `rope_scaling`; ValueError names what is unknown."""
        name, given = _rope_mapping(config)
        rope_type = _rope_type(name, given)
        if unknown := sorted(given.keys() - KEYS[rope_type]):
            raise ValueError(f"{name}: {unknown[0]!r} means nothing to rope_type {rope_type!r}")
        if given.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(
                f"{name}: partial_rotary_factor {given['partial_rotary_factor']!r} is not supported, only 1"
            )
        rope = {key: value for key, value in given.items() if value is not None}
        rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
        if rope_type in ("llama3", "yarn") and (original := config.get("original_max_position_embeddings")):
            rope["original_max_position_embeddings"] = original  # beside the mapping it wins, as in transformers

        def number(key: str, default: float | None = None) -> float:
            value = rope.get(key, default)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name}: rope_type {rope_type!r} needs a positive number as {key!r}, got {value!r}")
            return value

        theta = number("rope_theta")
        if rope_type == "default":
            return cls(theta=theta)
        if rope_type == "linear":
            return cls(rope_type=rope_type, theta=theta, factor=number("factor"))

        original = int(number("original_max_position_embeddings", max_position_embeddings))
        if rope_type == "dynamic":
            original = min(original, max_position_embeddings)
            return cls(rope_type=rope_type, theta=theta, factor=number("factor"), original_length=original)
        if rope_type == "llama3":
            low, high = number("low_freq_factor"), number("high_freq_factor")
            if low >= high:
                raise ValueError(f"{name}: low_freq_factor {low} must be less than high_freq_factor {high}")
            return cls(
                rope_type=rope_type,
                theta=theta,
                factor=number("factor"),
                original_length=original,
                low_freq_factor=low,
                high_freq_factor=high,
            )
        if not isinstance(truncate := rope.get("truncate", True), bool):
            raise ValueError(f"{name}: truncate must be true or false, got {truncate!r}")
        factor = number("factor", max_position_embeddings / original)
        attention_factor = _yarn_scale(factor, 1.0)
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            attention_factor = _yarn_scale(factor, number("mscale")) / _yarn_scale(factor, number("mscale_all_dim"))
        return cls(
            rope_type=rope_type,
            theta=theta,
            factor=factor,
            original_length=original,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=truncate,
            attention_factor=number("attention_factor", attention_factor),
        )

    def cos_sin(self, positions: Tensor, head_dim: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions [B, T], each [B, T, 1, head_dim]: computed in fp32, returned in `dtype`.

        Raises ValueError where `dynamic` rope meets a position that would change the keys of all earlier ones.
        """
        if self.rope_type == "dynamic" and positions.numel() and (last := int(positions.max())) >= self.original_length:
            raise ValueError(
                f"position {last}: rope_type 'dynamic' is supported within its original length {self.original_length},"
                " since beyond it each new token changes the keys of all earlier ones; use a shorter context"
            )
        angles = positions[..., None].float() * inverse_frequencies(self, head_dim, positions.device)
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]  # (B, T, 1, head_dim)
        cos, sin = angles.cos() * self.attention_factor, angles.sin() * self.attention_factor
        return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x [B, T, heads, head_dim], the first half of each head paired with the second half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@lru_cache(maxsize=64)
def inverse_frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position, fp32 [head_dim / 2]: computed on the CPU, whatever device and dtype are the default."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    wavelengths = rope.theta**exponents  # in positions per radian
    if rope.rope_type == "linear":
        result = 1.0 / wavelengths / rope.factor
    elif rope.rope_type == "llama3":
        result = _llama3(1.0 / wavelengths, rope)
    elif rope.rope_type == "yarn":
        result = _yarn(wavelengths, rope, head_dim)
    else:  # within its original length, dynamic is the default
        result = 1.0 / wavelengths
    return result.to(device)


def _llama3(fast: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: what turns fewer than `low_freq_factor` times within the original length is slowed by `factor`,
    what turns more than `high_freq_factor` times is kept, the rest lies between."""
    turns = rope.original_length / (2 * math.pi / fast)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * fast / rope.factor + keep * fast


def _yarn(wavelengths: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071, section 3.2): the same with `beta_slow` and `beta_fast`, linear over dimensions."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * (1 / (rope.factor * wavelengths)) + keep * (1 / wavelengths)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _rope_mapping(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and value of the mapping that describes the embedding; an empty one where there is none."""
    given = [(name, config[name]) for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    if len(given) == 2 and given[0][1] != given[1][1]:
        raise ValueError("rope_parameters and rope_scaling disagree; keep the one that is meant")
    name, rope = given[0] if given else ("rope_parameters", {})
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name} must be a mapping, got {rope!r}")
    return name, rope


def _rope_type(name: str, rope: Mapping[str, Any]) -> str:
    spelled = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    if len(spelled) == 2 and spelled[0] != spelled[1]:
        raise ValueError(f"{name}: rope_type {spelled[0]!r} and type {spelled[1]!r} disagree")
    rope_type = spelled[0] if spelled else "default"
    if rope_type not in KEYS:
        raise ValueError(f"{name}: unknown rope_type {rope_type!r}, supported are {', '.join(KEYS)}")
    return rope_type
