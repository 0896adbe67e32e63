"""A module of somebody else against its weights: which tensors are streamed by slices, which whole, which stay."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._blocks import parts_of, places
from ._units import Model, Unit, _slices, can_stand_for, check_dtype, prevailing_dtype

SMALL = 1 << 20  # bytes: a tensor of a block that is no larger always stays, as does any with one dimension
TABLE = 4 << 20  # bytes: an embedding that is no larger stays: models use those of positions in many ways
CONV1D = "transformers.pytorch_utils.Conv1D"  # GPT-2's: x @ weight + bias; a slice of it gives no outputs, only sums
FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"  # x @ weight.T, and then + bias

KEYS_AND_VALUES = {  # what transformers calls the layers that keep these, or less; a short convolution does
    "full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "conv",
}  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """How each tensor of a module is served, by (part, name)."""

    model: Model
    sliced: Mapping[tuple[str, str], nn.Linear]  # the matrix of this module, which computes slice by slice
    called: Mapping[tuple[str, str], nn.Module]  # the matrix of this module, bound as one while it runs
    whole: Mapping[tuple[str, str], tuple[int, ...]]  # bound as one while its block runs: its shape
    gathered: tuple[tuple[str, str], ...]  # of which rows are looked up
    whole_nbytes: int  # bytes of what is bound as one while a block runs, for the block that has most of it
    called_nbytes: int  # and of the largest matrix that is bound as one while its module runs
    dtypes: Mapping[tuple[str, str], torch.dtype]  # what each computes in


def kind_of(module: nn.Module) -> str | None:
    """How a module computes with its `weight`: "linear", "falcon" or "conv1d"; None where that is not known.

    Nor is it known where the instance has a forward of its own, unless that is only its class's.
    """
    own = vars(module).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(module).forward:
        return None
    if type(module) is nn.Linear:
        return "linear"
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return {CONV1D: "conv1d", FALCON: "falcon"}.get(name)


def survey_blocks(
    module: nn.Module,
    blocks: Mapping[str, nn.Module],
    weights: Any,
    *,
    dtype: torch.dtype | None,
    context: int,
    whole_blocks: bool,
) -> Survey:
    """Hold the module against the weights that are there, and decide for each tensor how it is served.

    Raises ValueError naming part and tensor where one is missing, or its shape or dtype is not the module's.
    """
    check_dtype(dtype)
    parts = {part: weights.tensors(part) for part in _parts(module, blocks)}
    named = places(module, blocks)
    for key, tensor in module.state_dict(keep_vars=True).items():
        _check(key, tensor, *named[key], parts)
    once = {id(tensor): named[key] for key, tensor in module.state_dict(keep_vars=True).items()}
    dtype = dtype or prevailing_dtype(_info(place, parts) for place in once.values())
    if dtype is None:
        raise ValueError(f"{type(module).__name__} has no weights in floating point: there is nothing to run")

    dtypes: dict[tuple[str, str], torch.dtype] = {}
    own_dtype = _own_dtypes(module, dtype)
    units: list[Unit] = []
    kept: list[tuple[str, str]] = []
    sliced: dict[tuple[str, str], Any] = {}
    called: dict[tuple[str, str], nn.Module] = {}
    whole: dict[tuple[str, str], tuple[int, ...]] = {}
    gathered: list[tuple[str, str]] = []
    kept_nbytes = gathered_nbytes = stored_nbytes = vocab_size = hidden_size = 0
    converted = False
    widths = dict.fromkeys(parts, 0)  # elements per token that the matrices of a part give
    whole_nbytes = dict.fromkeys(parts, 0)
    called_nbytes = 0
    counted: set[int] = set()  # tensors, of which one that is tied comes several times
    for key, tensor in module.state_dict(keep_vars=True).items():
        part, name = named[key]
        info = _info((part, name), parts)
        compute = own_dtype(key, tensor) if info.dtype.is_floating_point else info.dtype
        dtypes[part, name] = compute
        converted |= compute != info.dtype
        stored_nbytes += 0 if id(tensor) in counted else info.nbytes
        counted.add(id(tensor))
        nbytes = info.nbytes // info.dtype.itemsize * compute.itemsize
        path, _, leaf = key.rpartition(".")
        owner = module.get_submodule(path)
        in_block = part.startswith("mid")
        kind = kind_of(owner) if leaf == "weight" and not (in_block and whole_blocks) else None
        if kind == "conv1d":
            called[part, name] = owner
            called_nbytes = max(called_nbytes, nbytes)
            widths[part] += info.shape[1]
            hidden_size = hidden_size or info.shape[0]
        elif kind:
            sliced[part, name] = owner
            widths[part] += info.shape[0]
            hidden_size = hidden_size or info.shape[1]
            vocab_size = max(vocab_size, info.shape[0]) if part == "end" else vocab_size
        elif leaf == "weight" and isinstance(owner, nn.Embedding) and not in_block:
            hidden_size = info.shape[1]
            if nbytes > TABLE:
                gathered.append((part, name))
                gathered_nbytes += info.nbytes
            else:
                kept.append((part, name))
                kept_nbytes += nbytes
            continue
        elif in_block and ((len(info.shape) > 1 and nbytes > SMALL) or tuple(info.shape) != tuple(tensor.shape)):
            whole[part, name] = tuple(tensor.shape)
            whole_nbytes[part] += nbytes
            widths[part] += sum(tensor.shape[-2:]) * (_routed(module) if tensor.dim() > 2 else 1)
        else:
            kept.append((part, name))
            kept_nbytes += nbytes
            continue
        units += _slices(part, name, info.shape[0], info.nbytes, nbytes)
    turns = {part: turn for turn, part in enumerate(parts_of(module, blocks))}
    units.sort(key=lambda unit: turns[unit.part])
    block_width = max(widths[part] for part in parts if part.startswith("mid"))
    model = Model(
        tuple(units), (), tuple(kept), kept_nbytes, gathered_nbytes, stored_nbytes, dtype, converted, vocab_size,
        hidden_size, max(block_width + _scores(module, context, dtype), vocab_size),
    )  # fmt: skip
    return Survey(model, sliced, called, whole, tuple(gathered), max(whole_nbytes.values()), called_nbytes, dtypes)


def _own_dtypes(module: nn.Module, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.dtype]:
    """What a tensor of the state dict computes in, where most compute in `dtype`: as `from_pretrained(dtype=...)` has it.

    A transformers model names those that stay in fp32, beside bf16 or beside fp16 alone; and what the module has in
    another dtype than most of its tensors keeps it.
    """
    named: list[str] = []
    if dtype in (torch.float16, torch.bfloat16):
        named += getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    if dtype == torch.float16:
        named += getattr(module, "_keep_in_fp32_modules", None) or ()
    pattern = re.compile("|".join(name.replace("*", ".*") for name in named) or "(?!)")
    sizes: Counter[torch.dtype] = Counter()
    for tensor in module.state_dict(keep_vars=True).values():
        sizes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    ((most, _),) = sizes.most_common(1)

    def own(key: str, tensor: torch.Tensor) -> torch.dtype:
        if pattern.search(key):
            return torch.float32
        return dtype if tensor.dtype == most else tensor.dtype

    return own


def cache_nbytes(module: nn.Module, rows: int, context: int, dtype: torch.dtype) -> int:
    """Keys and values that a transformers model keeps, by its config; 0 where the module has none.

    Layers with a window, or a short convolution, keep less than that. Raises ValueError where some keep something else.
    """
    _refuse_other_states(module)
    latent = any(hasattr(child, "expand_kv") for child in module.modules())  # transformers' from 5.x on

    def kept(config: Any) -> int:
        _, key_heads, key, value = _heads(config)
        if latent:
            indexed = getattr(config, "index_head_dim", None) or 0  # a key more, by which an indexer chooses tokens
            return config.kv_lora_rank + config.qk_rope_head_dim + indexed
        return key_heads * (key + value)

    # A decoder keeps as much again of its encoder, which is counted with as many tokens.
    crossed = 2 if getattr(getattr(module, "config", None), "is_encoder_decoder", False) else 1
    return crossed * sum(map(kept, _layers(module))) * rows * context * dtype.itemsize


def largest_kept_nbytes(module: nn.Module, rows: int, context: int, dtype: torch.dtype) -> int:
    """Of the keys, or the values, of one layer; 0 where the config does not say."""
    wide = (key_heads * max(key, value) for _, key_heads, key, value in map(_heads, _layers(module)))
    return max(wide, default=0) * rows * context * dtype.itemsize


def _refuse_other_states(module: nn.Module) -> None:
    """A recurrent layer has a state for each row, and its scan a work of many times the width of a token, both in fp32."""
    others = sorted({*(getattr(_text_config(module), "layer_types", None) or ())} - KEYS_AND_VALUES)
    stateful = next((child for child in module.modules() if getattr(child, "_is_stateful", False)), None)
    if others or stateful is not None:
        kinds = f"layers of type {', '.join(others)}" if others else "recurrent layers"
        raise ValueError(
            f"{type(module if stateful is None else stateful).__name__} has {kinds}, which keep something else than keys "
            "and values: their state and the work of their scan are not counted. Give cache= the bytes of all that the "
            "model keeps for rows= and context=, and of what one such layer allocates for tokens= tokens, most of it in fp32"
        )


def copied_nbytes(module: nn.Module, rows: int, context: int, dtype: torch.dtype) -> int:
    """What attention copies of the keys and values of one layer, for a while.

    A cache grows by `cat`: the longer keys, or values, are there beside the shorter ones, and both where a window is cut out
    of them. Where several heads share a key, both are repeated for each head, as transformers does it wherever there is a
    mask and more than one token. Latent ones are expanded for each head, and put together. Where values are narrower than
    keys, or all heads share one, torch takes both in fp32, and scales the keys. Where models compute attention themselves,
    their products take the keys, and then the values, in fp32.
    """

    def copied(config: Any) -> int:
        heads, key_heads, key, value = _heads(config)
        windowed = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        grown = key_heads * (key + value if windowed else max(key, value))
        repeated = heads * (key + value) if heads > key_heads else 0
        expanded = heads * (2 * key + value) if getattr(config, "kv_lora_rank", None) else 0
        by_torch = heads if key != value else key_heads * _multi_query(config)
        by_model = heads * (_eager(config) and dtype != torch.float32)  # repeated before they are widened
        in_fp32 = by_torch * (2 * key + value) + by_model * max(key, value)
        return (grown + repeated + expanded) * dtype.itemsize + in_fp32 * 4

    return max(map(copied, _layers(module)), default=0) * rows * context


def _layers(module: nn.Module) -> list[Any]:
    """The config of each layer."""
    config = _text_config(module)
    if getattr(config, "is_heterogeneous", False):  # as Gemma 4's: what differs has to be asked of the layers
        return list(config.per_layer_config)
    # Beside an encoder the decoder may have another number.
    counts = [
        getattr(config, name, None) or 0 for name in ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
    ]
    return [config] * max(counts)


def _heads(config: Any) -> tuple[int, int, int, int]:
    """Query heads, heads of keys and values, and what a key and a value have in each; 0 where the config does not say."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0, 0, 0, 0
    key_heads = 1 if _multi_query(config) else getattr(config, "num_key_value_heads", None) or heads
    key = getattr(config, "head_dim", None) or config.hidden_size // heads
    if hasattr(config, "qk_nope_head_dim"):  # then head_dim may be that of the turned part alone
        key = config.qk_nope_head_dim + config.qk_rope_head_dim
    return heads, key_heads, key, getattr(config, "v_head_dim", None) or key


def _multi_query(config: Any) -> bool:
    """Whether it is a Falcon of which all heads share one key."""
    return bool(getattr(config, "multi_query", False)) and not getattr(config, "new_decoder_architecture", False)


def attending(module: nn.Module, survey: Survey) -> frozenset[str]:
    """The parts whose own code is little but attention: step by step, beside matrices whose modules are all known."""
    known = {part for part, _ in (*survey.sliced, *survey.called)}
    others = {part for part, _ in survey.whole}
    return frozenset(known - others if attends_itself(module) else ())


def attends_itself(module: nn.Module) -> bool:
    """Whether its attention is, or may be, its own products, and not torch's attention."""
    return getattr(_text_config(module), "_attn_implementation", None) in (None, "eager")


def _eager(config: Any) -> bool:
    """Whether the model computes attention itself, step by step."""
    return getattr(config, "_attn_implementation", None) == "eager"


def _scores(module: nn.Module, context: int, dtype: torch.dtype) -> int:
    """Elements per token of attention scores, and of a mask for each head, for a model that holds all of them at once.

    Two in fp32 and four in the computing dtype are more than was seen of any model that computes them one by one; torch,
    too, does so for a key that is shared without being repeated, and for values that are not as wide as keys.
    """

    def held(config: Any) -> int:
        heads, _, key, value = _heads(config)
        eager = _eager(config) or _multi_query(config) or key != value
        # Falcon's goes into the mask, which is then one of each row and head
        alibi = bool(getattr(config, "alibi", False))
        return heads * ((4 * dtype.itemsize + 2 * 4) * eager + dtype.itemsize * alibi)

    nbytes = max(map(held, _layers(module)), default=0) * context
    return -(-nbytes // (2 * dtype.itemsize))  # the plan counts a width twice


def _routed(module: nn.Module) -> int:
    """How often a token's width comes where a stack of experts computes: permuted, in fp32, and once for each it goes to."""
    return 4 * (getattr(_text_config(module), "num_experts_per_tok", None) or 1)


def _text_config(module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _parts(module: nn.Module, blocks: Mapping[str, nn.Module]) -> list[str]:
    return list(dict.fromkeys(part for part, _ in places(module, blocks).values()))


def _info(place: tuple[str, str], parts: Mapping[str, Mapping[str, Any]]) -> Any:
    return parts[place[0]][place[1]]


def _check(key: str, tensor: torch.Tensor, part: str, name: str, parts: Mapping[str, Mapping[str, Any]]) -> None:
    stored = parts[part]
    if name not in stored:
        raise ValueError(
            f"{part}: the weights have no {name!r}; they have {sorted(stored)}. Do module and checkpoint belong together?"
        )
    info = stored[name]
    stacked = len(info.shape) > 2 and info.nbytes == tensor.numel() * info.dtype.itemsize
    if tuple(info.shape) != tuple(tensor.shape) and not (stacked and info.shape[2:] == tuple(tensor.shape[2:])):
        raise ValueError(
            f"{part}: {name} is {list(info.shape)} in the weights and {list(tensor.shape)} in the module. "
            "Do module and checkpoint belong together?"
        )
    if not info.shape:
        raise ValueError(
            f"{part}: {name} is a single number with no dimension, which cannot be read by rows: give the module a tensor "
            "of shape [1] in its place, and weights= a load(part) that gives it with this shape"
        )
    if not can_stand_for(info.dtype, tensor.dtype):
        raise ValueError(
            f"{part}: {name} is stored as {info.dtype}, the module computes in floating point: "
            "quantized weights cannot be run; use the unquantized checkpoint"
        )
