"""What a config.json says, read strictly: a value that would change the numbers is understood or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._presets import PRESETS

NAMES = {  # as transformers calls them -> as config.json may have them, today's spelling first
    "hidden_size": ("hidden_size", "n_embed"),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
}

# Keys by which a relative of these models computes, with the values at which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "apply_residual_connection_post_layernorm": (None, False),
    "quantization_config": (None,),
    "skip_bias_add_qkv": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers of one model; made by `Config.from_hf` or `Config.preset`.

    `dtype` is the name of the type that config.json says, such as `"bfloat16"`, or None; parts do not depend on it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    layer_norm_epsilon: float
    tie_word_embeddings: bool
    eos_ids: tuple[int, ...]
    dtype: str | None

    @classmethod
    def preset(cls, name: str) -> Config:
        """The sizes of a published model: bloom-560m, bloom-1b1, bloom-1b7, bloom-3b, bloom-7b1, and bloom, of 176b.

        Raises ValueError naming the models there are.

        >>> config = Config.preset("bloom")
        >>> config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        (70, 14336, 112)
        """
        if name.lower() not in PRESETS:
            raise ValueError(f"no preset is called {name!r}, there are {', '.join(PRESETS)}")
        return cls.from_hf(PRESETS[name.lower()])

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Reads the mapping of a Hugging Face config.json, with the names of today or of the first uploads.

        Raises ValueError naming the key for a missing, unknown or unsupported value.

        >>> Config.from_hf(dict(model_type="bloom", vocab_size=96, n_embed=32, n_layer=2, n_head=4)).head_dim
        8
        """
        if (model_type := config.get("model_type")) != "bloom":
            raise ValueError(f"model_type {model_type!r} is not of this family, supported is bloom")
        for key, neutral in NEUTRAL.items():
            if key in config and config[key] not in neutral:
                raise ValueError(f"{key} {config[key]!r} is not supported for model_type {model_type!r}")

        if config.get("slow_but_exact") and (config.get("pretraining_tp") or 1) > 1:
            raise ValueError(
                f"slow_but_exact {config['slow_but_exact']!r} with pretraining_tp {config['pretraining_tp']!r} is not "
                "supported: sums are then rounded by slices; set slow_but_exact to false"
            )
        hidden_size, num_attention_heads = _named(config, "hidden_size"), _named(config, "num_attention_heads")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}"
            )
        return cls(
            model_type=model_type,
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            num_hidden_layers=_named(config, "num_hidden_layers"),
            num_attention_heads=num_attention_heads,
            head_dim=hidden_size // num_attention_heads,
            layer_norm_epsilon=_positive(config, "layer_norm_epsilon", 1e-5),
            tie_word_embeddings=_flag(config, "tie_word_embeddings", default=True),
            eos_ids=_eos_ids(config),
            dtype=_dtype(config),
        )


def _named(config: Mapping[str, Any], name: str) -> int:
    """The integer that may stand under several names; those that are there have to agree."""
    given = {key: config[key] for key in NAMES[name] if config.get(key) is not None}
    if len(set(given.values())) > 1:
        said = " and ".join(f"{key} {value!r}" for key, value in given.items())
        raise ValueError(f"{said} disagree; keep the one that is meant")
    return _integer(given, next(iter(given), NAMES[name][0]))


def _eos_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id", 2)
    ids = [] if value is None else [value] if isinstance(value, int) else value
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) for i in ids):
        raise ValueError(f"eos_token_id must be an id, a list of ids or null, got {value!r}")
    return tuple(ids)


def _dtype(config: Mapping[str, Any]) -> str | None:
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ValueError(f"dtype {dtype!r} is not supported, only bfloat16, float16 and float32")
    return dtype


def _integer(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be an integer of at least 1, got {value!r}")
    return value


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return value


def _flag(config: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value
