"""What a Linear computes, by the kernel that reads its weight fastest."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

one_pass_at_a_time = threading.RLock()  # in a process: what `product` switches would change another pass's bits
_switch = threading.Lock()


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias: x [..., K], weight [N, K] -> [..., N].

    One row on a CPU is as fast as the weight can be read. In bf16 torch gives it to oneDNN, which reads at half the
    speed of ATen's own kernel, with the same rounding (sums in fp32). torch has one switch for the process, and none for
    a call: so oneDNN is off for all threads during this one product. Where the switch is frozen, it stays on.

    For several rows oneDNN makes code for each new number of them, and keeps 0.7 MiB of it for good. So rows of zeros are
    added up to one of a few numbers.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16) or weight.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows = x.numel() // x.shape[-1]
    if rows > 1:
        flat, more = x.reshape(rows, -1), _few(rows) - rows
        output = F.linear(F.pad(flat, (0, 0, 0, more)) if more else flat, weight, bias)
        return output[:rows].view(*x.shape[:-1], -1)
    if rows == 0 or weight.dtype != torch.bfloat16 or torch.backends.flags_frozen():
        return F.linear(x, weight, bias)
    with _switch:
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False
        try:
            return F.linear(x.reshape(1, -1), weight, bias).view(*x.shape[:-1], -1)
        finally:
            torch.backends.mkldnn.enabled = before


def _few(rows: int) -> int:
    """The next of 2, 4, ... 64, 128, 192, ... 512, 576, ... 1024, 1152, ...: an eighth more than needed at most, of many."""
    power = 1 << (rows - 1).bit_length()
    return power if power <= 64 else -(-rows // (step := max(64, power // 16))) * step
