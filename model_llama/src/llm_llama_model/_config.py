"""What a config.json says, read strictly: a value that would change the numbers is understood or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._rope import Rope

# What a missing key means differs from one model_type to the next.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2},
    "Yi": {"max_position_embeddings": 4096, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "mixtral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "eos_token_id": 2,
    },
    "qwen3_moe": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}
MIXTURES = ("mixtral", "qwen3_moe")

# Keys by which a relative of these models computes, with the values at which they do nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "alibi": (None, False),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "shared_expert_intermediate_size": (None, 0),
    "n_shared_experts": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
NO_EXPERTS: dict[str, tuple[Any, ...]] = {"num_experts": (None, 0), "num_local_experts": (None, 0)}


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How tokens are sent to experts, in a mixture of experts.

    `layers` has one entry per layer: whether it has experts. `norm_topk_prob`: the weights of the chosen add up to 1.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    norm_topk_prob: bool
    fp32_weights: bool
    layers: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The numbers and switches of one model; made by `Config.from_hf`.

    `windows` has one entry per layer: how many positions a query sees, its own included, or None for all before it.
    `dtype` is the name of the type that config.json says, such as `"bfloat16"`, or None. Parts do not depend on it, and files
    that were converted may be stored in another; it is for those who run ranges of one model and want all in the same.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    routing: Routing | None
    tie_word_embeddings: bool
    eos_ids: tuple[int, ...]
    dtype: str | None

    @property
    def longest_context(self) -> int | None:
        """How many positions can be computed, from 0 on; None where nothing limits them.

        >>> Config.from_hf(dict(model_type="llama", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        ...                     num_attention_heads=4, max_position_embeddings=64,
        ...                     rope_scaling={"type": "dynamic", "factor": 2.0})).longest_context
        64
        """
        return self.rope.original_length if self.rope.rope_type == "dynamic" else None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Reads the mapping of a Hugging Face config.json, as any version of transformers writes it.

        Raises ValueError naming the key for a missing, unknown or unsupported value.

        >>> config = Config.from_hf(dict(model_type="llama", vocab_size=96, hidden_size=32, intermediate_size=48,
        ...                              num_hidden_layers=2, num_attention_heads=4, eos_token_id=2))
        >>> config.head_dim, config.num_key_value_heads, config.eos_ids
        (8, 4, (2,))
        """
        model_type = config.get("model_type")
        if model_type not in DEFAULTS:
            raise ValueError(f"model_type {model_type!r} is not of this family, supported are {', '.join(DEFAULTS)}")
        for key, neutral in (NEUTRAL if model_type in MIXTURES else NEUTRAL | NO_EXPERTS).items():
            if key in config and config[key] not in neutral:
                raise ValueError(f"{key} {config[key]!r} is not supported for model_type {model_type!r}")

        config = DEFAULTS[model_type] | dict(config)
        hidden_size, num_attention_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
        num_key_value_heads = _integer(config, "num_key_value_heads", num_attention_heads)
        num_hidden_layers = _integer(config, "num_hidden_layers")
        max_position_embeddings = _integer(config, "max_position_embeddings")
        attention_bias = _flag(config, "attention_bias", only=("llama", "Yi", "qwen2", "qwen3", "qwen3_moe"))
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {num_attention_heads} is not a multiple of"
                f" num_key_value_heads {num_key_value_heads}"
            )
        return cls(
            model_type=model_type,
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size"),
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=_head_dim(config, hidden_size, num_attention_heads),
            rms_norm_eps=_rms_norm_eps(config),
            max_position_embeddings=max_position_embeddings,
            rope=Rope.from_hf(config, max_position_embeddings=max_position_embeddings),
            windows=_windows(config, num_hidden_layers),
            qkv_bias=model_type == "qwen2" or attention_bias,
            o_bias=model_type != "qwen2" and attention_bias,  # Qwen2 has its own rule and does not read the key
            mlp_bias=_flag(config, "mlp_bias", only=("llama", "Yi")),
            qk_norm=model_type in ("qwen3", "qwen3_moe"),
            routing=_routing(config, num_hidden_layers) if model_type in MIXTURES else None,
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            eos_ids=_eos_ids(config),
            dtype=_dtype(config),
        )


def _windows(config: Mapping[str, Any], num_hidden_layers: int) -> tuple[int | None, ...]:
    """The window of each layer: Llama has none, Mistral and Mixtral one for all, Qwen where `use_sliding_window` says so,
    Qwen2 and Qwen3 in some layers."""
    model_type = config["model_type"]
    qwen = model_type in ("qwen2", "qwen3", "qwen3_moe")
    used = _flag(config, "use_sliding_window", default=not qwen)
    window = None if config.get("sliding_window") is None else _integer(config, "sliding_window")
    if window is not None and not qwen and not (model_type in ("mistral", "mixtral") and used):
        raise ValueError(
            f"sliding_window {window} with use_sliding_window {used} means nothing to model_type {model_type!r};"
            " null stands for full attention"
        )
    window = window if used else None
    chosen = model_type in ("qwen2", "qwen3")  # layer by layer
    first = _integer(config, "max_window_layers", 28, least=0) if chosen else 0
    windows = tuple(window if layer >= first else None for layer in range(num_hidden_layers))

    if (layer_types := config.get("layer_types")) is None:
        return windows
    if len(layer_types) != num_hidden_layers:
        raise ValueError(f"layer_types has {len(layer_types)} entries for num_hidden_layers {num_hidden_layers}")
    if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types: {unknown.pop()!r} is neither 'full_attention' nor 'sliding_attention'")
    if "sliding_attention" in layer_types and window is None:
        raise ValueError("layer_types: 'sliding_attention' without a sliding_window that is in use")
    typed = tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)
    if typed != windows and not chosen:
        raise ValueError(f"layer_types {layer_types} disagrees with what model_type {model_type!r} does in every layer")
    return typed


def _routing(config: Mapping[str, Any], num_hidden_layers: int) -> Routing:
    """Mixtral has experts in every layer; Qwen3-MoE in each `decoder_sparse_step`-th that is not in `mlp_only_layers`."""
    mixtral = config["model_type"] == "mixtral"
    given = {key: config[key] for key in ("num_experts", "num_local_experts") if config.get(key) is not None}
    if len(set(given.values())) > 1:
        said = " and ".join(f"{key} {value!r}" for key, value in given.items())
        raise ValueError(f"{said} disagree; keep the one that is meant")
    num_experts = _integer(given, next(iter(given), "num_experts"), 8 if mixtral else 128)
    num_experts_per_tok = _integer(config, "num_experts_per_tok")
    if num_experts_per_tok > num_experts:
        raise ValueError(f"num_experts_per_tok {num_experts_per_tok} is more than the {num_experts} experts there are")
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, (list, tuple)) or not all(isinstance(layer, int) for layer in dense):
        raise ValueError(f"mlp_only_layers must be a list of layer numbers, got {dense!r}")
    step = _integer(config, "decoder_sparse_step", 1)
    if mixtral and (dense or step > 1):
        raise ValueError("mlp_only_layers and decoder_sparse_step mean nothing to model_type 'mixtral'")
    return Routing(
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        intermediate_size=_integer(config, "intermediate_size" if mixtral else "moe_intermediate_size"),
        norm_topk_prob=mixtral or _flag(config, "norm_topk_prob"),
        fp32_weights=mixtral,
        layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_hidden_layers)),
    )


def _head_dim(config: Mapping[str, Any], hidden_size: int, num_attention_heads: int) -> int:
    if config.get("head_dim") is None and hidden_size % num_attention_heads:
        raise ValueError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads},"
            " and there is no head_dim"
        )
    if (head_dim := _integer(config, "head_dim", hidden_size // num_attention_heads)) % 2:
        raise ValueError(f"head_dim {head_dim} is odd, but rotary embedding turns pairs")
    return head_dim


def _rms_norm_eps(config: Mapping[str, Any]) -> float:
    eps = config.get("rms_norm_eps", 1e-6)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"rms_norm_eps must be a positive number, got {eps!r}")
    return eps


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


def _integer(config: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be an integer of at least {least}, got {value!r}")
    return value


def _flag(config: Mapping[str, Any], key: str, *, default: bool = False, only: tuple[str, ...] = ()) -> bool:
    """A true or false value; `only` names the model types, if not all, that may say true."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    if value and only and config["model_type"] not in only:
        raise ValueError(f"{key} true means nothing to model_type {config['model_type']!r}")
    return value
