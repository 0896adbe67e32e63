"""A tensor in one piece that a block computes with in ways of its own, such as stacked experts: in few shapes all the same."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._products import makes_code, of_few_shapes, product

_T: Any = Tensor
TIMES = {torch.matmul, torch.mm, _T.matmul, _T.mm, _T.__matmul__}  # x @ weight
BATCHED = TIMES | {torch.bmm, _T.bmm}  # x [E, rows, K] with weight [E, K, N]
GROUPED = {"_grouped_mm", "grouped_mm_fallback"}  # torch's own, and where it has none for a dtype, that of transformers


def whole(tensor: Tensor) -> Tensor:
    """The tensor, whose products see to their number of rows where that matters: in 16 bits on a CPU."""
    return tensor.as_subclass(Whole) if makes_code(tensor) else tensor


class Whole(torch.Tensor):
    """As any tensor, and so are its views; but what is multiplied by one of two dimensions goes through `of_few_shapes`.

    Each expert gets another number of rows, and with each prompt another: oneDNN would keep code for all of them.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear and _is_matrix(args[1:2]):
                return _times(*args, **kwargs)
            if func in TIMES and _is_matrix(args[1:]) and not kwargs:
                return _times(args[0], args[1].T)
            if func in BATCHED and len(args) == 2 and not kwargs and _is_stack(*args):
                return torch.stack([_times(x, weight.T) for x, weight in zip(*args, strict=True)])
            if (
                getattr(func, "__name__", "") in GROUPED
                and len(args) == 2
                and args[0].dim() == 2
                and args[1].dim() == 3
            ):
                offs, others = kwargs.get("offs"), [kwargs.get(name) for name in ("bias", "out_dtype")]
                if offs is not None and others == [None, None]:
                    return _grouped(args[0], args[1], offs)
            output = func(*args, **kwargs)
            places = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Whole)}
            if type(output) in (tuple, list):
                return type(output)(_view(x, places) for x in output)
            return _view(output, places)


def _view(output: Any, places: set[int]) -> Any:
    """What lies in the memory of a whole tensor is one again."""
    try:
        inside = isinstance(output, Tensor) and output.untyped_storage().data_ptr() in places
    except NotImplementedError:  # sparse ones, and those of vmap, have no place
        inside = False
    return output.as_subclass(Whole) if inside else output


def _is_matrix(args: Any) -> bool:
    return len(args) == 1 and isinstance(args[0], Whole) and args[0].dim() == 2


def _is_stack(x: Any, weight: Any) -> bool:
    return (
        isinstance(weight, Whole) and weight.dim() == 3 and isinstance(x, Tensor) and x.shape[:-2] == weight.shape[:1]
    )


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias. A row alone has a kernel of its own only where the inputs of an output lie side by side."""
    if weight.stride(-1) == 1:
        return product(x, weight, bias)
    return of_few_shapes(lambda x: F.linear(x, weight, bias), x)


def _grouped(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """x [rows, K] with weight [E, K, N] -> [rows, N], where the rows of expert i end before offs[i]."""
    output, start = x.new_zeros(len(x), weight.shape[-1]), 0
    for i, stop in enumerate(offs.tolist()):
        if start < stop:
            output[start:stop] = _times(x[start:stop], weight[i].T)
        start = stop
    return output
