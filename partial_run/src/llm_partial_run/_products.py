"""What a Linear computes, by the kernel that reads its weight fastest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 256  # rows of one product: more at once are hardly faster, and their number would be one more for oneDNN
SHAPE = 768 << 10  # bytes of code that oneDNN keeps for good for each number of rows and shape of a weight

one_pass_at_a_time = threading.RLock()  # in a process: what is switched here would change another pass's bits
_CODED = (torch.bfloat16, torch.float16)  # what oneDNN computes with code made for the shape
_switch = threading.Lock()
_without = False  # whether `without_onednn` has switched it off, and not the program


@contextmanager
def onednn(enabled: bool) -> Iterator[None]:
    """torch's switch for oneDNN during one product. It has one for the process, and none for a call: other threads wait.

    It is not switched on where the program has it off. Where torch's flags are frozen, it stays as it is.
    """
    if torch.backends.flags_frozen():
        yield
        return
    with _switch:
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = enabled and (before or _without)
        try:
            yield
        finally:
            torch.backends.mkldnn.enabled = before


@contextmanager
def without_onednn() -> Iterator[None]:
    """No oneDNN for somebody else's code, one such code at a time, but for products within that switch it on.

    Meanwhile products of other threads go on: a lock held for so long could be waited for by whom this code waits for.
    """
    global _without
    if torch.backends.flags_frozen():
        yield
        return
    with one_pass_at_a_time:
        with _switch:
            before, outside = torch.backends.mkldnn.enabled, _without
            torch.backends.mkldnn.enabled, _without = False, before or outside
        try:
            yield
        finally:
            with _switch:
                torch.backends.mkldnn.enabled, _without = before, outside


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias: x [..., K], weight [N, K] -> [..., N].

    One row on a CPU is as fast as the weight can be read. In bf16 torch gives it to oneDNN, which reads at half the
    speed of ATen's own kernel, with the same rounding (sums in fp32): so oneDNN is off during this one product.
    """
    one_row = x.numel() == x.shape[-1]
    if not one_row or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return of_few_shapes(lambda x: F.linear(x, weight, bias), x)
    with onednn(False):
        return F.linear(x.reshape(1, -1), weight, bias).view(*x.shape[:-1], -1)


def of_few_shapes(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """compute(x), where that gives a row for each row of x [..., K]: with oneDNN, also in a block that runs without it.

    In 16 bits on a CPU oneDNN makes code for each new number of rows, and keeps it for good. So several rows go in blocks,
    the last of them filled up with rows of zeros to one of a few numbers.
    """
    rows = x.numel() // x.shape[-1]
    if rows < 2 or not makes_code(x):
        return _with_onednn(compute, x)
    blocks = [_padded(compute, block) for block in x.reshape(rows, -1).split(AT_ONCE)]
    return (torch.cat(blocks) if len(blocks) > 1 else blocks[0]).view(*x.shape[:-1], -1)


def makes_code(x: Tensor) -> bool:
    """Whether oneDNN makes code for each shape of a product with it: in 16 bits on a CPU."""
    return x.dtype in _CODED and x.device.type == "cpu"


def kernels_nbytes(shapes: int, rows: int, dtype: torch.dtype) -> int:
    """Bytes that oneDNN keeps for products of up to so many rows with weights of so many shapes."""
    numbers = {_few(n) for n in range(2, min(rows, AT_ONCE) + 1)} if dtype in _CODED else ()
    return len(numbers) * shapes * SHAPE


def _padded(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    more = _few(len(x)) - len(x)
    return _with_onednn(compute, F.pad(x, (0, 0, 0, more)) if more else x)[: len(x)]


def _with_onednn(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not _without:
        return compute(x)
    with onednn(True):
        return compute(x)


def _few(rows: int) -> int:
    """The next of 2, 4, ... 64, 128, 192, 256."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64
