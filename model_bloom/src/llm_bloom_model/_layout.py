"""Where each key of a Hugging Face checkpoint belongs among the parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ._config import Config

LINEARS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
LAYER = ("input_layernorm", "post_attention_layernorm", *LINEARS)  # each with a weight and a bias


def layout(key: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The places, each (part, name), of the tensor that a checkpoint stores under `key`; none where it is not needed.

    The first is its own. At the second, as of a tied head, it stands where the checkpoint has no tensor for that place.

    Keys may begin with `transformer.`, as transformers writes them, or not, as in the published files.
    config: the model's config.json. Raises ValueError naming a key, or a layer, that such a model has no place for.

    >>> bloom = dict(model_type="bloom", vocab_size=96, hidden_size=32, n_layer=4, n_head=4)
    >>> layout("h.3.mlp.dense_h_to_4h.bias", bloom)
    [('mid.00003', 'mlp.dense_h_to_4h.bias')]
    >>> layout("transformer.word_embeddings.weight", bloom)
    [('begin', 'word_embeddings.weight'), ('end', 'lm_head.weight')]
    """
    known = Config.from_hf(config)
    bare = key.removeprefix("transformer.")
    if bare == "word_embeddings.weight":
        head = [("end", "lm_head.weight")] if known.tie_word_embeddings else []
        return [("begin", bare), *head]
    if key == "lm_head.weight":  # also where it is tied: it may be another matrix, or the only one that is stored
        embedding = [("begin", "word_embeddings.weight")] if known.tie_word_embeddings else []
        return [("end", "lm_head.weight"), *embedding]
    if re.fullmatch(r"word_embeddings_layernorm\.(weight|bias)", bare):
        return [("begin", bare)]
    if re.fullmatch(r"ln_f\.(weight|bias)", bare):
        return [("end", bare)]

    match = re.fullmatch(r"h\.([0-9]+)\.((.+)\.(?:weight|bias))", bare)
    if not match or match[3] not in LAYER:
        raise ValueError(f"checkpoint key {key!r} has no place in a model of model_type {known.model_type!r}")
    layer, name = int(match[1]), match[2]
    if layer >= known.num_hidden_layers:
        raise ValueError(
            f"checkpoint key {key!r}: the model has {known.num_hidden_layers} layers, none numbered {layer}"
        )
    return [(f"mid.{layer:05d}", name)]
