"""What the config.json of each published BLOOM says, so that one can be planned and built without a download."""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {"model_type": "bloom", "vocab_size": 250880, "eos_token_id": 2, "dtype": "float16"}

PRESETS: dict[str, dict[str, Any]] = {  # BLOOMZ has the same sizes
    "bloom-560m": COMMON | {"hidden_size": 1024, "n_layer": 24, "n_head": 16},
    "bloom-1b1": COMMON | {"hidden_size": 1536, "n_layer": 24, "n_head": 16},
    "bloom-1b7": COMMON | {"hidden_size": 2048, "n_layer": 24, "n_head": 16},
    "bloom-3b": COMMON | {"hidden_size": 2560, "n_layer": 30, "n_head": 32},
    "bloom-7b1": COMMON | {"hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "bloom": COMMON | {"hidden_size": 14336, "n_layer": 70, "n_head": 112, "dtype": "bfloat16"},  # 176b
}
