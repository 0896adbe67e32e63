"""Where each key of a Hugging Face checkpoint belongs among the parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ._config import Config

LINEARS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
COMPUTED = (  # stored by old versions of transformers, computed here
    "self_attention.rotary.inv_freq",
    "self_attention.rotary_emb.inv_freq",
    "self_attention.maybe_rotary.inv_freq",
)


def layout(key: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The places, each (part, name), of the tensor that a checkpoint stores under `key`; none where it is not needed.

    The first is its own. At the second, as of a tied head, it stands where the checkpoint has no tensor for that place.

    config: the model's config.json. Raises ValueError naming a key, or a layer, that such a model has no place for.

    >>> falcon = dict(model_type="falcon", vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    >>> layout("transformer.h.3.mlp.dense_h_to_4h.weight", falcon)
    [('mid.00003', 'mlp.dense_h_to_4h.weight')]
    >>> layout("transformer.word_embeddings.weight", falcon)
    [('begin', 'word_embeddings.weight'), ('end', 'lm_head.weight')]
    """
    known = Config.from_hf(config)
    if key == "transformer.word_embeddings.weight":
        head = [("end", "lm_head.weight")] if known.tie_word_embeddings else []
        return [("begin", "word_embeddings.weight"), *head]
    if key == "lm_head.weight":  # also where it is tied: it may be another matrix, or the only one that is stored
        embedding = [("begin", "word_embeddings.weight")] if known.tie_word_embeddings else []
        return [("end", "lm_head.weight"), *embedding]
    if match := re.fullmatch(r"transformer\.(ln_f\.(?:weight|bias))", key):
        return [("end", match[1])]

    match = re.fullmatch(r"transformer\.h\.([0-9]+)\.(.+)", key)
    if not match:
        raise ValueError(f"checkpoint key {key!r} has no place in a model of model_type {known.model_type!r}")
    layer, name = int(match[1]), match[2]
    if layer >= known.num_hidden_layers:
        raise ValueError(
            f"checkpoint key {key!r}: the model has {known.num_hidden_layers} layers, none numbered {layer}"
        )
    if name in COMPUTED:
        return []
    if name.removesuffix(".bias") in LINEARS:  # added to a rounded product, so it is no part of the Linear here
        name = name.replace(".bias", "_bias")
    if name not in _layer_names(known):
        raise ValueError(f"checkpoint key {key!r} has no place in a layer of this {known.model_type!r} model")
    return [(f"mid.{layer:05d}", name)]


def _layer_names(config: Config) -> set[str]:
    """The names in `Layer(config, 0).state_dict()`."""
    if config.separate_layernorms:
        norms = ("ln_attn", "ln_mlp")
    else:
        norms = ("input_layernorm",) if config.parallel_attn else ("input_layernorm", "post_attention_layernorm")
    weights = {f"{name}.weight" for name in norms + LINEARS}
    return weights | {f"{name}.bias" for name in norms} | {f"{name}_bias" for name in LINEARS * config.bias}
