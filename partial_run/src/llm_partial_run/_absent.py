"""What stands in a module for a matrix that is not in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_T: Any = Tensor
FACTS = {
    *(getattr(_T, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "nbytes", "requires_grad")),
    *(getattr(_T, name).__get__ for name in ("grad", "is_meta", "is_cuda")),
    *(_T.size, _T.dim, _T.numel, _T.nelement, _T.element_size, _T.is_floating_point, _T.is_complex),
    *(_T.__hash__, _T.__len__),
}

Rows = Callable[[Tensor], Tensor]  # row numbers [n] -> those rows of the matrix [n, ...]


class Absent(torch.Tensor):
    """Has the dtype, device and shape of a matrix, and no memory. Only what knows where its values are computes with it.

    Looking up rows (nn.Embedding, and whatever else calls F.embedding) reads those rows.
    """

    _name: str
    _rows: Rows | None
    _in_its_block: Callable[[], bool]  # whether it is asked for where whole_blocks=True would have it

    @classmethod
    def like(
        cls,
        name: str,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        rows: Rows | None,
        in_its_block: Callable[[], bool],
    ) -> Absent:
        one = torch.zeros((), dtype=dtype, device=device)
        absent = torch.Tensor._make_subclass(cls, one.expand(shape))
        absent._name, absent._rows, absent._in_its_block = name, rows, in_its_block
        return absent

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.embedding:
            ids, weight, *rest = args
            if isinstance(weight, Absent) and weight._rows is not None:
                return _look_up(weight._rows, ids, *rest, **kwargs)
        absent = next(a for a in (*args, *kwargs.values()) if isinstance(a, Absent))
        asked = func.__self__ if func.__name__ == "__get__" else func  # of x.T, say "T"
        elsewhere = (
            "To save, copy or convert a module, close the offload first; one whose forward does so cannot be offloaded"
        )
        raise RuntimeError(
            f"{absent._name} is offloaded, and {asked.__name__} needs it in memory as a whole: only the forward of the "
            "module that it belongs to can do without. "
            + ("Give whole_blocks=True" if absent._in_its_block() else elsewhere)
        )


def _look_up(
    rows: Rows, ids: Tensor, padding_idx: Any = None, max_norm: Any = None, norm_type: float = 2.0, *_: Any, **more: Any
) -> Tensor:
    """F.embedding with the rows that it needs alone; `padding_idx` matters to gradients only."""
    unique, within = ids.unique(return_inverse=True)
    return F.embedding(within, rows(unique), None, more.get("max_norm", max_norm), more.get("norm_type", norm_type))
