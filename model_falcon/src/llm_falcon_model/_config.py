"""What a config.json says, read strictly: a value that would change the numbers is understood or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._presets import PRESETS

# What a missing key means. The two older model_types are the code that came with the first uploads.
DEFAULTS: dict[str, dict[str, Any]] = {
    "falcon": {"multi_query": True, "parallel_attn": True, "eos_token_id": 11},
    "RefinedWebModel": {"multi_query": False, "parallel_attn": False, "eos_token_id": 2},
    "RefinedWeb": {"multi_query": False, "parallel_attn": True, "eos_token_id": 2},
}
OLD_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}

# Keys by which a relative of these models computes, with the values at which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation": (None, "gelu"),
    "apply_residual_connection_post_layernorm": (None, False),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers and switches of one model; made by `Config.from_hf` or `Config.preset`.

    `num_kv_heads` is the number that is stored: 1 where all heads share one (7b), 8 in 40b, 180b and 11B.
    `separate_layernorms`: attention and MLP, side by side, have a norm each (40b, 180b).
    `dtype` is the name of the type that config.json says, such as `"bfloat16"`, or None; parts do not depend on it.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    layer_norm_epsilon: float
    max_position_embeddings: int
    alibi: bool
    rope_theta: float
    rope_factor: float
    bias: bool
    parallel_attn: bool
    separate_layernorms: bool
    tie_word_embeddings: bool
    eos_ids: tuple[int, ...]
    dtype: str | None

    @classmethod
    def preset(cls, name: str) -> Config:
        """The sizes of a published model: falcon-7b, falcon-40b, falcon-180b, falcon-11b, falcon-rw-1b, falcon-rw-7b.

        Raises ValueError naming the models there are.

        >>> config = Config.preset("falcon-40b")
        >>> config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_kv_heads
        (60, 8192, 128, 8)
        """
        if name.lower() not in PRESETS:
            raise ValueError(f"no preset is called {name!r}, there are {', '.join(PRESETS)}")
        return cls.from_hf(PRESETS[name.lower()])

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Reads the mapping of a Hugging Face config.json, old (`RefinedWebModel`, `n_head_kv`) or new.

        Raises ValueError naming the key for a missing, unknown or unsupported value.

        >>> config = Config.from_hf(dict(model_type="RefinedWeb", vocab_size=96, hidden_size=32, n_layer=2, n_head=4,
        ...                              n_head_kv=2, eos_token_id=11))
        >>> config.num_kv_heads, config.separate_layernorms, config.eos_ids
        (2, True, (11,))
        """
        model_type = config.get("model_type")
        if model_type not in DEFAULTS:
            raise ValueError(f"model_type {model_type!r} is not of this family, supported are {', '.join(DEFAULTS)}")
        for key, neutral in NEUTRAL.items():
            if key in config and config[key] not in neutral:
                raise ValueError(f"{key} {config[key]!r} is not supported for model_type {model_type!r}")

        config = DEFAULTS[model_type] | _with_new_names(config)
        hidden_size, num_attention_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}"
            )
        alibi, new = _flag(config, "alibi"), _new_decoder_architecture(config)
        if (hidden_size // num_attention_heads) % 2 and not alibi:
            raise ValueError(
                f"head_dim {hidden_size // num_attention_heads} (hidden_size / num_attention_heads) is odd,"
                " but rotary embedding turns pairs"
            )
        theta, factor = _rope(config)
        return cls(
            model_type=model_type,
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            ffn_hidden_size=_integer(config, "ffn_hidden_size", 4 * hidden_size),
            num_hidden_layers=_integer(config, "num_hidden_layers"),
            num_attention_heads=num_attention_heads,
            num_kv_heads=_num_kv_heads(config, num_attention_heads, new=new),
            head_dim=hidden_size // num_attention_heads,
            layer_norm_epsilon=_positive(config, "layer_norm_epsilon", 1e-5),
            max_position_embeddings=_integer(config, "max_position_embeddings", 2048),
            alibi=alibi,
            rope_theta=theta,
            rope_factor=factor,
            bias=_flag(config, "bias"),
            parallel_attn=_parallel_attn(config, new=new),
            separate_layernorms=_separate_layernorms(config, new=new),
            tie_word_embeddings=_flag(config, "tie_word_embeddings", default=True),
            eos_ids=_eos_ids(config),
            dtype=_dtype(config),
        )


def _with_new_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `n_layer` and its like under the names that they have today."""
    renamed = {key: value for key, value in config.items() if key not in OLD_NAMES}
    for old, new in OLD_NAMES.items():
        if config.get(old) is None:
            continue
        if renamed.get(new) not in (None, config[old]):
            raise ValueError(f"{old} {config[old]!r} and {new} {renamed[new]!r} disagree; keep the one that is meant")
        renamed[new] = config[old]
    return renamed


def _new_decoder_architecture(config: Mapping[str, Any]) -> bool:
    """40b and later: keys and values in groups. The first upload of 40b says so by `n_head_kv`."""
    by_name = config["model_type"] == "RefinedWeb" and config.get("num_kv_heads") is not None
    return _flag(config, "new_decoder_architecture", default=by_name)


def _num_kv_heads(config: Mapping[str, Any], num_attention_heads: int, *, new: bool) -> int:
    """Where the older models have one key head, or one for each head, `num_kv_heads` does not count."""
    if not new:
        return 1 if _flag(config, "multi_query") else num_attention_heads
    num_kv_heads = _integer(config, "num_kv_heads", num_attention_heads)
    if num_attention_heads % num_kv_heads:
        raise ValueError(f"num_attention_heads {num_attention_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    return num_kv_heads


def _parallel_attn(config: Mapping[str, Any], *, new: bool) -> bool:
    parallel_attn = _flag(config, "parallel_attn")
    if new and not parallel_attn:
        raise ValueError("parallel_attn false has no meaning with new_decoder_architecture true")
    return parallel_attn


def _separate_layernorms(config: Mapping[str, Any], *, new: bool) -> bool:
    norms = _integer(config, "num_ln_in_parallel_attn", 2 if new else 1)
    if norms not in ((1, 2) if new else (1,)):
        raise ValueError(
            f"num_ln_in_parallel_attn {norms} has no meaning with new_decoder_architecture {str(new).lower()}"
        )
    return norms == 2


def _rope(config: Mapping[str, Any]) -> tuple[float, float]:
    """Base and divisor of the frequencies, from `rope_parameters` or the older `rope_theta` with `rope_scaling`."""
    given = [(name, config[name]) for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    if len(given) == 2 and given[0][1] != given[1][1]:
        raise ValueError("rope_parameters and rope_scaling disagree; keep the one that is meant")
    name, rope = given[0] if given else ("rope_parameters", {})
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name} must be a mapping, got {rope!r}")
    spelled = [rope[key] for key in ("rope_type", "type") if rope.get(key) is not None]
    if len(spelled) == 2 and spelled[0] != spelled[1]:
        raise ValueError(f"{name}: rope_type {spelled[0]!r} and type {spelled[1]!r} disagree")
    rope_type = spelled[0] if spelled else "default"
    if rope_type not in ("default", "linear"):
        raise ValueError(f"{name}: rope_type {rope_type!r} is not supported, only 'default' and 'linear'")
    known = {"rope_type", "type", "rope_theta"} | ({"factor"} if rope_type == "linear" else set())
    if unknown := sorted(rope.keys() - known):
        raise ValueError(f"{name}: {unknown[0]!r} means nothing to rope_type {rope_type!r}")
    theta = _positive(config if rope.get("rope_theta") is None else rope, "rope_theta", 10000.0)
    return theta, _positive(rope, "factor") if rope_type == "linear" else 1.0


def _eos_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = [] if value is None else [value] if isinstance(value, int) else value
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) for i in ids):
        raise ValueError(f"eos_token_id must be an id, a list of ids or null, got {value!r}")
    return tuple(ids)


def _dtype(config: Mapping[str, Any]) -> str | None:
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise ValueError(f"dtype {dtype!r} is not supported, only bfloat16, float16 and float32")
    return dtype


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be an integer of at least 1, got {value!r}")
    return value


def _positive(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    return value


def _flag(config: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    return value
