"""What the config.json of each published Falcon says, so that one can be planned and built without a download."""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {"model_type": "falcon", "vocab_size": 65024, "eos_token_id": 11, "dtype": "bfloat16"}
RW: dict[str, Any] = COMMON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
NEW: dict[str, Any] = COMMON | {"new_decoder_architecture": True, "num_kv_heads": 8}

PRESETS: dict[str, dict[str, Any]] = {
    "falcon-7b": COMMON | {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71},
    "falcon-40b": NEW | {"hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128},
    "falcon-180b": NEW | {"hidden_size": 14848, "num_hidden_layers": 80, "num_attention_heads": 232},
    "falcon-11b": NEW
    | {
        "hidden_size": 4096,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_ln_in_parallel_attn": 1,
        "ffn_hidden_size": 16384,
        "max_position_embeddings": 8192,
        "rope_theta": 500042.0,
        "tie_word_embeddings": False,
    },
    "falcon-rw-1b": RW
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "vocab_size": 50304,
        "eos_token_id": 2,
    },
    "falcon-rw-7b": RW | {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 64},
}
