"""Units: the pieces of a model that are kept or read, and computed, as one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

COMPUTED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # fp8 is quantized: it needs scales besides
SLICE = 4 << 20  # bytes: one read. Larger ones are no faster, and fewer of them fit in a ring of the same size


@dataclass(frozen=True, order=True, slots=True)
class Unit:
    """Rows `start:stop` of a Linear's weight, about `SLICE` bytes of them where a row is not more.

    However much memory there is, a Linear is computed by the same slices: so every budget gives the same bits.
    """

    part: str
    name: str
    start: int
    stop: int
    nbytes: int  # as stored: what a read costs
    kept_nbytes: int  # in the computing dtype: what keeping it costs

    def __str__(self) -> str:
        return f"{self.part}: {self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Model:
    """What there is to place: the sliced matrices in the order of a pass, and what always stays."""

    units: tuple[Unit, ...]
    experts: tuple[Unit, ...]  # slices of routed experts, of which a pass needs those that its tokens are sent to
    kept: tuple[tuple[str, str], ...]  # (part, name): norms, biases, all that is no Linear's matrix
    kept_nbytes: int
    gathered_nbytes: int  # matrices of which only single rows are ever read
    stored_nbytes: int
    dtype: torch.dtype
    converted: bool  # some weights are stored in another dtype than they compute in
    vocab_size: int  # logits per position; 0 without an end
    hidden_size: int
    widths: int  # most elements per token that the Linears of one layer give
    wanted_nbytes: int = 0  # of routed experts, those that one token is sent to


def in_order(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The parts as a pass goes through them: begin, layers by number (as given, where they have other names), end."""
    between = [part for part in parts if part not in ("begin", "end")]
    if all(re.fullmatch(r"mid\.\d{5}", part) for part in between):
        between.sort()
    return {part: parts[part] for part in ("begin", *between, "end") if part in parts}


def survey(parts: Mapping[str, nn.Module], weights: Any, dtype: torch.dtype | None) -> Model:
    """Hold the modules against the weights that are there, and cut the matrices into units.

    Raises ValueError naming part and tensor where one is missing, or its shape or dtype is not the module's.
    """
    check_dtype(dtype)
    infos = {
        part: {
            name: _checked(weights, place_of(part, module, name), tensor)
            for name, tensor in module.state_dict().items()
        }
        for part, module in parts.items()
    }
    dtype = dtype or prevailing_dtype(info for named in infos.values() for info in named.values())
    if dtype is None:
        raise ValueError(f"no weights in floating point in the parts {list(parts)}: there is nothing to run")
    units: list[Unit] = []
    experts: list[Unit] = []
    kept: list[tuple[str, str]] = []
    kept_nbytes = gathered_nbytes = stored_nbytes = vocab_size = hidden_size = widths = 0
    wanted_nbytes = 0
    converted = False
    for part, module in parts.items():
        linears = {weight_of(name) for name in linears_of(module)}
        gathered = getattr(module, "gathered", {})
        widths = max(widths, _width(module) if part.startswith("mid") else 0)
        for name, info in infos[part].items():
            place = place_of(part, module, name)
            stored_nbytes += info.nbytes
            compute = dtype if info.dtype.is_floating_point else info.dtype
            converted |= compute != info.dtype
            nbytes = info.nbytes // info.dtype.itemsize * compute.itemsize
            if name in gathered:
                gathered_nbytes += info.nbytes
                hidden_size = info.shape[1]
            elif name in linears:
                into = units if place == (part, name) else experts
                if into is experts:
                    routed: Any = module.get_submodule(module.routed)  # pyright: ignore
                    wanted_nbytes += info.nbytes * routed.num_experts_per_tok // len(routed)
                into += _slices(*place, info.shape[0], info.nbytes, nbytes)
                hidden_size = hidden_size or info.shape[1]
                vocab_size = info.shape[0] if part == "end" else vocab_size
            else:
                kept.append((part, name))
                kept_nbytes += nbytes
    return Model(
        tuple(units), tuple(experts), tuple(kept), kept_nbytes, gathered_nbytes, stored_nbytes, dtype, converted,
        vocab_size, hidden_size, widths, wanted_nbytes,
    )  # fmt: skip


def prevailing_dtype(infos: Iterable[Any]) -> torch.dtype | None:
    """The dtype in floating point that most bytes are stored in: norms in fp32, which often come first, decide nothing."""
    nbytes: Counter[torch.dtype] = Counter()
    for info in infos:
        nbytes[info.dtype] += info.nbytes if info.dtype.is_floating_point else 0
    return max(+nbytes, key=nbytes.__getitem__, default=None)


def check_dtype(dtype: object) -> None:
    """Raises ValueError where `dtype` is none to compute in; None is the one that most bytes are stored in."""
    if dtype is not None and dtype not in COMPUTED:
        raise ValueError(f"dtype={dtype!r} is none to compute in: give one of {', '.join(map(str, COMPUTED))}")


def can_stand_for(stored: torch.dtype, own: torch.dtype) -> bool:
    """Whether a tensor stored in one dtype can be converted to what the module has in another."""
    return stored in COMPUTED if own.is_floating_point else not stored.is_floating_point


def place_of(part: str, module: nn.Module, name: str) -> tuple[str, str]:
    """Where the store has a tensor of a part's module: (part, name).

    A module with `routed = "experts"` has experts of which each is a part of its own there: what the module calls
    `experts.5.up_proj.weight` is `up_proj.weight` of "mid.00003/experts.00005".
    """
    routed = getattr(module, "routed", None)
    head, _, rest = name.removeprefix(f"{routed}.").partition(".")
    if routed is None or not name.startswith(f"{routed}.") or not head.isdigit():
        return part, name
    return f"{part}/{routed}.{int(head):05d}", rest


def stored_parts(parts: Mapping[str, nn.Module]) -> list[str]:
    """The parts that the store has for these modules: theirs, and their experts'."""
    return list(dict.fromkeys(
        place_of(part, module, name)[0] for part, module in parts.items() for name in module.state_dict()
    ))  # fmt: skip


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of a module, by name, in the order in which they are registered."""
    return {name: child for name, child in module.named_modules() if type(child) is nn.Linear}


def weight_of(linear: str) -> str:
    """The name of a Linear's weight in the state dict of the module that it is in, or is."""
    return f"{linear}.weight" if linear else "weight"


def _width(module: nn.Module) -> int:
    """Elements per token that a layer's Linears give, those of as many experts as a token is sent to."""
    routed = getattr(module, "routed", None)
    widths = {name: linear.out_features for name, linear in linears_of(module).items()}
    if routed is None:
        return sum(widths.values())
    experts: Any = module.get_submodule(routed)
    inside = sum(width for name, width in widths.items() if name.startswith(f"{routed}."))
    return sum(widths.values()) - inside + inside // len(experts) * experts.num_experts_per_tok


def _slices(part: str, name: str, rows: int, nbytes: int, kept_nbytes: int) -> list[Unit]:
    step = rows if nbytes <= SLICE else _round(SLICE * rows // nbytes)
    return [
        Unit(part, name, start, stop := min(start + step, rows), (stop - start) * nbytes // rows,
             (stop - start) * kept_nbytes // rows)
        for start in range(0, rows, step)
    ]  # fmt: skip


def _round(rows: int) -> int:
    """A number of rows near this one that matrix kernels are made for: with others they reach half to four fifths of the rate."""
    for multiple in (128, 64, 16):
        if rows >= multiple:
            return round(rows / multiple) * multiple
    return max(rows, 1)


def _checked(weights: Any, place: tuple[str, str], tensor: Tensor) -> Any:
    """What the store says of a tensor, which has to be what the module has."""
    part, name = place
    remedy = "Take weights, with their index, and the config that the model is made by from the same checkpoint"
    where = f"the weights in {weights.path}" if hasattr(weights, "path") else "the weights"
    try:
        stored = weights.tensors(part)
    except ValueError as error:
        raise ValueError(f"{error}. {remedy}, or only parts that are there") from error
    if name not in stored:
        raise ValueError(f"{part}: {where} have no {name!r}; they have {sorted(stored)}. {remedy}")
    info = stored[name]
    if tuple(info.shape) != tuple(tensor.shape):
        raise ValueError(
            f"{part}: {name} is {list(info.shape)} in {where} and {list(tensor.shape)} in the model. {remedy}"
        )
    if not can_stand_for(info.dtype, tensor.dtype):
        raise ValueError(
            f"{part}: {name} is stored as {info.dtype} in {where}, the model computes in floating point: "
            "quantized weights cannot be run; use the unquantized checkpoint"
        )
    return info
