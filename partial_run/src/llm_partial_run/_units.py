"""Units: the pieces of a model that are kept or read, and computed, as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SLICE = 8 << 20  # bytes: one read. Larger ones are no faster, and the ring takes several of them from the resident set


@dataclass(frozen=True)
class Unit:
    """Rows `start:stop` of a Linear's weight, at most `SLICE` bytes of them where a row is not more.

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
    kept: tuple[tuple[str, str], ...]  # (part, name): norms, biases, all that is no Linear's matrix
    kept_nbytes: int
    gathered_nbytes: int  # matrices of which only single rows are ever read
    stored_nbytes: int
    dtype: torch.dtype
    converted: bool  # some weights are stored in another dtype than they compute in
    vocab_size: int  # logits per position; 0 without an end
    hidden_size: int
    widths: int  # most elements per token that the Linears of one layer give


def survey(parts: Mapping[str, nn.Module], weights: Any, dtype: torch.dtype | None) -> Model:
    """Hold the modules against the weights that are there, and cut the matrices into units.

    Raises ValueError naming part and tensor where one is missing, or its shape or dtype is not the module's.
    """
    units: list[Unit] = []
    kept: list[tuple[str, str]] = []
    kept_nbytes = gathered_nbytes = stored_nbytes = vocab_size = hidden_size = widths = 0
    converted = False
    for part, module in parts.items():
        stored = weights.tensors(part)
        _check(part, module, stored)
        linears = {f"{name}.weight" if name else "weight": m for name, m in linears_of(module).items()}
        gathered = getattr(module, "gathered", {})
        widths = max(widths, sum(m.out_features for m in linears.values()) if part.startswith("mid") else 0)
        for name in module.state_dict():
            info = stored[name]
            stored_nbytes += info.nbytes
            if dtype is None and info.dtype.is_floating_point:
                dtype = info.dtype
            compute = dtype if info.dtype.is_floating_point and dtype is not None else info.dtype
            converted |= compute != info.dtype
            nbytes = info.nbytes // info.dtype.itemsize * compute.itemsize
            if name in gathered:
                gathered_nbytes += info.nbytes
                hidden_size = info.shape[1]
            elif name in linears:
                units += _slices(part, name, info.shape[0], info.nbytes, nbytes)
                hidden_size = hidden_size or info.shape[1]
                vocab_size = info.shape[0] if part == "end" else vocab_size
            else:
                kept.append((part, name))
                kept_nbytes += nbytes
    if dtype is None:
        raise ValueError(f"no weights in floating point in the parts {list(parts)}: there is nothing to run")
    return Model(
        tuple(units), tuple(kept), kept_nbytes, gathered_nbytes, stored_nbytes, dtype, converted, vocab_size,
        hidden_size, widths,
    )  # fmt: skip


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """The Linears of a module, by name, in the order in which they are registered."""
    return {name: child for name, child in module.named_modules() if type(child) is nn.Linear}


def _slices(part: str, name: str, rows: int, nbytes: int, kept_nbytes: int) -> list[Unit]:
    count = min(rows, -(-nbytes // SLICE))
    step = -(-rows // count)
    return [
        Unit(part, name, start, stop := min(start + step, rows), (stop - start) * nbytes // rows,
             (stop - start) * kept_nbytes // rows)
        for start in range(0, rows, step)
    ]  # fmt: skip


def _check(part: str, module: nn.Module, stored: Mapping[str, Any]) -> None:
    for name, tensor in module.state_dict().items():
        if name not in stored:
            raise ValueError(
                f"{part}: the weights have no {name!r}; they have {sorted(stored)}. Do config and checkpoint belong together?"
            )
        if tuple(stored[name].shape) != tuple(tensor.shape):
            raise ValueError(
                f"{part}: {name} is {list(stored[name].shape)} in the weights and {list(tensor.shape)} in the model. "
                "Do config and checkpoint belong together?"
            )
        if stored[name].dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(
                f"{part}: {name} is stored as {stored[name].dtype}, the model computes in floating point: "
                "quantized weights cannot be run; use the unquantized checkpoint"
            )
