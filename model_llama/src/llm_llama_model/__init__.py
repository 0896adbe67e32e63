"""The Llama family (Llama 1 to 3, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Yi) as parts that can be run one at a time."""

from __future__ import annotations

from ._config import Config
from ._layout import layout
from ._model import Begin, End, Layer
from ._parts import parts

__version__ = "0.1.0"
__all__ = ["Begin", "Config", "End", "Layer", "layout", "parts"]
