"""A module of somebody else, seen as parts: what comes before its blocks, each block, and what comes after them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ._tied import names_of_one, spare

Layout = Callable[[str, Mapping[str, Any]], list[Any]]
COMPUTED = re.compile(
    r"(^|\.)(attn|attention)\.(masked_)?bias$|(^|\.)rotary_emb\.inv_freq$"
)  # buffers that were stored once


def find_blocks(module: nn.Module, blocks: str | Iterable[nn.Module] | None = None) -> dict[str, nn.Module]:
    """The blocks of a module in order, by their paths: the children of its largest list of modules.

    A list of modules is an `nn.ModuleList`, or an `nn.Sequential` whose children are of one class; the largest is the
    one with the most parameters, and of two that are alike the outer one.

    :param blocks: the path of such a list ("model.layers"), or the blocks themselves, in order.
    :raises ValueError: where there is none; it names what there is.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 9))
    >>> list(find_blocks(model))
    ['1.0', '1.1']
    """
    paths = {child: path for path, child in module.named_modules()}
    lists = {path: child for path, child in module.named_modules() if _is_list(child)}
    if blocks is None:
        if not lists:
            raise ValueError(
                f"{type(module).__name__} has no sequence of blocks, no nn.ModuleList with two children or more: "
                "give blocks=, the blocks themselves in the order in which they are called"
            )
        blocks = max(lists, key=lambda path: sum(p.numel() for p in lists[path].parameters()))
    if isinstance(blocks, str):
        if blocks not in paths.values() or not list(module.get_submodule(blocks).children()):
            raise ValueError(
                f"blocks={blocks!r} is no list of modules in {type(module).__name__}; there are {sorted(lists)}"
            )
        blocks = [block for block in module.get_submodule(blocks)._modules.values() if block is not None]
    chosen = list(blocks)
    strange = [type(block).__name__ for block in chosen if block not in paths or block is module]
    if strange or not chosen:
        raise ValueError(
            f"blocks= has {f'a {strange[0]} that is no child of' if strange else 'no block of'} {type(module).__name__}"
        )
    if len(set(chosen)) < len(chosen):
        raise ValueError(
            f"{paths[max(chosen, key=chosen.count)]} is in the sequence of blocks more than once: "
            "a block that is called twice in a pass cannot be streamed"
        )
    return {paths[block]: block for block in chosen}


def parts_of(module: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The module as parts: begin and end are the module itself, of which they name the tensors beside the blocks.

    They come in the order of the blocks. Their numbers are another: the one in which the module registers them.
    """
    numbered = _numbered(module, blocks)
    return {"begin": module, **{numbered[path]: block for path, block in blocks.items()}, "end": module}


def places(module: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """(part, name) of each parameter and persistent buffer: relative to its block, or beside the blocks in full."""
    order = {path: i for i, (path, _) in enumerate(module.named_modules())}
    first = min(order[path] for path in blocks)
    numbered = _numbered(module, blocks)
    found = {}
    for key in module.state_dict(keep_vars=True):
        owner, _, _ = key.rpartition(".")
        block = next((path for path in blocks if key.startswith(path + ".")), None)
        if block is not None:
            found[key] = numbered[block], key[len(block) + 1 :]
        else:
            found[key] = "begin" if order[owner] < first else "end", key
    return found


def layout_from_module(module: nn.Module, *, blocks: str | Iterable[nn.Module] | None = None) -> Layout:
    """The layout of a module's checkpoint: where each key belongs among the parts that `offload` makes of the module.

    Keys are those of `state_dict`. A tied tensor may be stored under any of its names. For a
    transformers model keys are renamed as `from_pretrained` renames them, with or without the prefix of the base model.
    Dropped are old checkpoints' computed buffers, what the module itself ignores, and for a base model the keys beside it.

    :param blocks: as for `offload`; their order makes no difference here.
    :returns: `layout(key, config) -> [(part, name)]`, as `llm_sepweight.open` takes it. It raises ValueError naming a key for
        which the module has no place.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 9))
    >>> layout = layout_from_module(model)
    >>> layout("0.weight", {}), layout("1.1.bias", {}), layout("2.bias", {})
    ([('begin', '0.weight')], [('mid.00001', 'bias')], [('end', '2.bias')])
    """
    named = places(module, find_blocks(module, blocks))
    belongs = {key: [place] for key, place in named.items()}
    for first, *others in names_of_one(module):
        belongs[first] += [named[key] for key in others]
        belongs |= {key: [spare(named[first], key)] for key in others}
    prefix = f"{base}." if (base := getattr(module, "base_model_prefix", "")) else ""
    rename = _renaming(module)

    def layout(key: str, config: Mapping[str, Any]) -> list[Any]:
        name, index = rename(key)
        for spelling in (name, prefix + name, name.removeprefix(prefix)):
            if spelling in belongs:
                found = belongs[spelling]
                return list(found) if index is None else [(part, name, index) for part, name in found]
        if not _dropped(module, name, prefix):
            raise ValueError(
                f"checkpoint key {key!r} has no place in this {type(module).__name__}, whose config may have fewer layers "
                "or no biases. Do module and checkpoint belong together?"
            )
        return []

    return layout


def _dropped(module: nn.Module, name: str, prefix: str) -> bool:
    """Whether a key that the module reads nothing from may be in its checkpoint all the same."""
    held = {*module.state_dict(keep_vars=True), *dict(module.named_buffers())}  # tied to another, or computed
    if held & {name, prefix + name, name.removeprefix(prefix)} or COMPUTED.search(name):
        return True
    if any(re.search(pattern, name) for pattern in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()):
        return True
    is_base = bool(prefix) and not hasattr(module, prefix.removesuffix("."))
    beside = not name.startswith(prefix) and name.partition(".")[0] not in dict(module.named_children())
    return is_base and beside


def _numbered(module: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, str]:
    """The part of each block, by its path. A layout numbers alike, whether it is told the order of the calls or not."""
    registered = [path for path, _ in module.named_modules() if path in blocks]
    return {path: f"mid.{i:05d}" for i, path in enumerate(registered)}


def _is_list(module: nn.Module) -> bool:
    children = list(module._modules.values())  # unlike children(), also the second time
    alike = isinstance(module, nn.ModuleList) or len({type(child) for child in children}) == 1
    return isinstance(module, nn.ModuleList | nn.Sequential) and len(children) > 1 and alike


def _renaming(module: nn.Module) -> Callable[[str], tuple[str, int | None]]:
    """What transformers calls a checkpoint's key when it loads it, and its row where it goes into a stack of tensors."""
    if not any(kind.__module__ == "transformers.modeling_utils" for kind in type(module).__mro__):
        return lambda key: (key, None)
    try:  # from version 5 on
        mapping: Any = importlib.import_module("transformers.conversion_mapping")
        loading: Any = importlib.import_module("transformers.core_model_loading")
    except ModuleNotFoundError:
        return lambda key: (key, None)
    changes = mapping.get_model_conversion_mapping(module)
    renamings = [change for change in changes if isinstance(change, loading.WeightRenaming)]
    converters = [change for change in changes if isinstance(change, loading.WeightConverter)]

    def rename(key: str) -> tuple[str, int | None]:
        before = loading.apply_renamings(key, renamings)
        name, pattern = loading.apply_converters(before, converters)
        if pattern is None:
            return name, None
        (converter,) = [converter for converter in converters if pattern in converter.source_patterns]
        return name, _row(key, before, pattern, converter.source_patterns, converter.operations)

    return rename


def _row(key: str, name: str, pattern: str, patterns: Sequence[str], operations: Sequence[Any]) -> int:
    """The row of an expert's matrix in the stack of all: gate and up take turns where both go into one tensor."""
    done = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in operations]
    number = re.search(re.escape(pattern).replace(r"\*", "([0-9]+)"), name)
    stacked = done == [("MergeModulelist", 0)] and len(patterns) == 1
    if number is None or not (stacked or done == [("MergeModulelist", 0), ("Concatenate", 1)]):
        raise ValueError(
            f"checkpoint key {key!r}: transformers makes its tensor from several by {[kind for kind, _ in done]}, "
            "and only stacked experts can be read where they lie"
        )
    return int(number[1]) * len(patterns) + list(patterns).index(pattern)
