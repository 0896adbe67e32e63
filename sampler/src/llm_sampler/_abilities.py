"""What a model of transformers can do, as far as its class and its configuration say it."""

from __future__ import annotations

import sys
from typing import Any

WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # names of a bound on who sees whom


def cache_class(model: Any, takes: set[str]) -> type:
    """transformers.DynamicCache, from the transformers that the model came with; ValueError for who has no use of it."""
    reason = ""
    if kinds := other_layers(model):
        reason = f"keeps a state that cannot be wound back to an earlier token ({kinds}): "
    elif "past_key_values" not in takes:
        reason = "takes no past_key_values: "
    elif counts_ids(model):
        reason = "counts positions from the ids: "
    elif getattr(text_config(model), "is_decoder", None) is False and any(
        getattr(part, "is_decoder", None) is False for part in model.modules()
    ):
        reason = "sees later tokens too: load it with is_decoder=True, or "
    if reason:
        raise ValueError(f"{type(model).__name__} {reason}give cache=False, which computes all tokens each time")
    modules = (sys.modules.get(base.__module__.partition(".")[0]) for base in type(model).__mro__)
    found = next((module.DynamicCache for module in modules if hasattr(module, "DynamicCache")), None)  # type: ignore[union-attr]
    if found is None or not hasattr(found(), "layers"):
        raise ValueError(
            f"{type(model).__name__} comes with no cache that is understood here: update transformers to 4.56 or newer, "
            "or give cache=False"
        )
    return found


def cannot_be_told_of_padding(model: Any, takes: set[str]) -> bool:
    """Whether padding in front of a row would move its positions, or be seen."""
    kind = getattr(text_config(model), "model_type", None)
    return (
        "attention_mask" not in takes
        or counts_ids(model)
        or kind in _SEES_PADDING
        or ("position_ids" not in takes and kind not in _FROM_MASK)
    )


def text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def position_count(model: Any) -> int | None:
    """How many tokens it has positions for; None where it does not say, or needs none."""
    config = text_config(model)
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None) or 0
    if counts_ids(model):
        length -= (config.pad_token_id or 0) + 1  # those up to the place of padding are no token's
    return length if length > 0 else None


def length_of_the_same_rope(config: Any) -> int | None:
    """After how many tokens its rope changes the keys of the first ones; None for one that never does."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    of_layers = [rope, *(own for own in rope.values() if isinstance(own, dict))]  # one, or one for each kind of layer
    changing = [own for own in of_layers if own.get("rope_type", own.get("type")) in _CHANGING]
    lengths = [own.get("original_max_position_embeddings") for own in changing]
    lengths += [getattr(config, name, None) for name in ("original_max_position_embeddings", "max_position_embeddings")]
    return min((int(length) for length in lengths if length), default=0) if changing else None


def other_layers(model: Any) -> str:
    """Kinds of its layers that are no attention to all or the last tokens, as far as it says; "" for none."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ()) - _ATTENTION
    return ", ".join(sorted(kinds)) or ("recurrent" if getattr(model, "_is_stateful", False) else "")


def counts_ids(model: Any) -> bool:
    """Whether it finds its positions in the ids, among which an id of padding takes none (RoBERTa)."""
    name = "create_position_ids_from_input_ids"
    return any(hasattr(part, name) or hasattr(sys.modules.get(type(part).__module__), name) for part in model.modules())


_FROM_MASK = ("bloom", "mpt")  # kinds of models that take no position_ids and find their positions in the mask
_SEES_PADDING = ("xlm", "flaubert")  # kinds of models whose causal mask forgets the one that they are given
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_CHANGING = ("dynamic", "longrope")  # kinds of rope under which more tokens change the keys of the first ones
