"""For the command line: the layout that a model's installed package offers, by the model_type of its config."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from llm_sepweight._catalog import PART_NAME
from llm_sepweight._checkpoint import Layout, as_named

FAMILIES = "llm_microlibs.families"


def find_layout(name: str | None) -> Layout:
    """That of `package:function`; without a name, of the installed package that knows the checkpoint's model_type."""
    if name is None:
        return _by_family
    module, _, function = name.partition(":")
    sys.path.insert(0, "")  # a module in the working directory will do
    try:
        return getattr(importlib.import_module(module), function or "layout")
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--layout {name}: {error}") from error
    finally:
        sys.path.remove("")


def _by_family(key: str, config: Mapping[str, Any]) -> Sequence[Any]:
    if re.match(rf"{PART_NAME.pattern}\.", key):  # begin.pth, mid.00000.pth, ...
        return as_named(key, config)
    return _family(config.get("model_type")).layout(key, config)


@cache
def _family(model_type: str | None) -> Any:
    found = {entry.name: entry for entry in entry_points(group=FAMILIES)}
    if model_type not in found:
        raise ValueError(
            f"no installed package knows the model_type {model_type!r}; those here know {', '.join(sorted(found)) or 'none'}. "
            "Install the model's package, such as llm_llama_model, or pass --layout"
        )
    return found[model_type].load()
