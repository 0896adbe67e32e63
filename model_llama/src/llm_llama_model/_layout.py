"""Where each key of a Hugging Face checkpoint belongs among the parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ._config import Config

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ALWAYS = (*QKV, "self_attn.o_proj", "input_layernorm", "post_attention_layernorm")
YI_NORMS = {"ln1.weight": "input_layernorm.weight", "ln2.weight": "post_attention_layernorm.weight"}  # first uploads
EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.([0-9]+)\.(\w+)\.weight")
FUSED = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(?:gate_up_proj|down_proj)")
READ: dict[str, Config] = {}  # the last config.json, as text -> what it says; a mixture has tens of thousands of keys
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
COMPUTED = "self_attn.rotary_emb.inv_freq"  # stored by old versions of transformers, computed here


def layout(key: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The places, each (part, name), of the tensor that a checkpoint stores under `key`; none where it is not needed.

    The first is its own. At the second, as of a tied head, it stands where the checkpoint has no tensor for that place.

    config: the model's config.json. Raises ValueError naming a key, or a layer, that such a model has no place for.

    >>> llama = dict(model_type="llama", vocab_size=96, hidden_size=32, intermediate_size=48,
    ...              num_hidden_layers=4, num_attention_heads=4, tie_word_embeddings=True)
    >>> layout("model.layers.3.mlp.up_proj.weight", llama)
    [('mid.00003', 'mlp.up_proj.weight')]
    >>> layout("model.embed_tokens.weight", llama)
    [('begin', 'embed_tokens.weight'), ('end', 'lm_head.weight')]
    """
    known = _known(config)
    if key == "model.embed_tokens.weight":
        head = [("end", "lm_head.weight")] if known.tie_word_embeddings else []
        return [("begin", "embed_tokens.weight"), *head]
    if key == "lm_head.weight":  # also where it is tied: it may be another matrix, or the only one that is stored
        embedding = [("begin", "embed_tokens.weight")] if known.tie_word_embeddings else []
        return [("end", "lm_head.weight"), *embedding]
    if key == "model.norm.weight":
        return [("end", "norm.weight")]

    match = re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", key)
    if not match:
        raise ValueError(f"checkpoint key {key!r} has no place in a model of model_type {known.model_type!r}")
    layer, name = int(match[1]), match[2]
    if layer >= known.num_hidden_layers:
        raise ValueError(
            f"checkpoint key {key!r}: the model has {known.num_hidden_layers} layers, none numbered {layer}"
        )
    if name == COMPUTED:
        return []
    if known.model_type == "Yi":
        name = YI_NORMS.get(name, name)
    if known.routing is not None and known.routing.layers[layer]:
        if match := EXPERT.fullmatch(name):
            return [_expert(key, layer, int(match[1]), match[2], known.routing.num_experts)]
        if FUSED.fullmatch(name):
            raise ValueError(
                f"checkpoint key {key!r} holds all experts of a layer: save the model with a tensor for each,"
                " as save_pretrained(..., save_original_format=True) does"
            )
        name = name.replace("block_sparse_moe.", "mlp.")
    if name not in _layer_names(known, layer):
        raise ValueError(f"checkpoint key {key!r} has no place in layer {layer} of this {known.model_type!r} model")
    return [(f"mid.{layer:05d}", name)]


def _known(config: Mapping[str, Any]) -> Config:
    """What a config.json says, read anew only where it is not that of the key before, or was changed in between."""
    text = repr(dict(config))
    if (known := READ.get(text)) is None:
        known = Config.from_hf(config)
        READ.clear()
        READ[text] = known
    return known


def _expert(key: str, layer: int, expert: int, name: str, num_experts: int) -> tuple[str, str]:
    """A part of the layer's part for each expert, whose weights have names as if it were alone."""
    name = MIXTRAL.get(name, name)
    if expert >= num_experts:
        raise ValueError(f"checkpoint key {key!r}: the layer has {num_experts} experts, none numbered {expert}")
    if name not in MIXTRAL.values():
        raise ValueError(f"checkpoint key {key!r} has no place in an expert")
    return f"mid.{layer:05d}/experts.{expert:05d}", f"{name}.weight"


def _layer_names(config: Config, layer: int) -> set[str]:
    """The names in `Layer(config, layer).state_dict()`, without those of experts."""
    sparse = config.routing is not None and config.routing.layers[layer]
    biased = QKV * config.qkv_bias + ("self_attn.o_proj",) * config.o_bias + MLP * config.mlp_bias
    normed = ("self_attn.q_norm", "self_attn.k_norm") * config.qk_norm
    matrices = ("mlp.gate",) if sparse else MLP
    return {f"{name}.weight" for name in ALWAYS + matrices + normed} | {f"{name}.bias" for name in biased}
