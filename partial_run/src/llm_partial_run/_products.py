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
    """
    one_row = x.numel() == x.shape[-1] and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    if not one_row or torch.backends.flags_frozen():
        return F.linear(x, weight, bias)
    with _switch:
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False
        try:
            return F.linear(x.reshape(1, -1), weight, bias).view(*x.shape[:-1], -1)
        finally:
            torch.backends.mkldnn.enabled = before
