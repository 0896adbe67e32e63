"""Feed-forward networks: one for all tokens, or experts of which a router chooses a few for each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._config import Config, Routing

NOWHERE = -1  # in place of an expert's number


class MLP(nn.Module):
    """Feed-forward network gated by SiLU."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """x [N, hidden_size] -> indices [N, k] of the experts that each token goes to, and their weights [N, k]."""

    def __init__(self, config: Config, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.gate = nn.Linear(config.hidden_size, routing.num_experts, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.gate(x).softmax(-1, dtype=torch.float32)
        weights, indices = probabilities.topk(self.routing.num_experts_per_tok, dim=-1)
        if self.routing.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return indices, weights if self.routing.fp32_weights else weights.to(x.dtype)


class Experts(nn.ModuleList):
    """Experts by number; those to which no token goes are not touched, so their weights need not be there."""

    def __init__(self, config: Config, routing: Routing) -> None:
        super().__init__(MLP(config.hidden_size, routing.intermediate_size) for _ in range(routing.num_experts))
        self.num_experts_per_tok = routing.num_experts_per_tok

    def announce(self, chosen: list[int]) -> None:
        """Called with the experts that are about to be called, in that order: for a runner to replace, and to fetch them."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the experts' outputs: x [N, hidden_size], indices and weights [N, k] -> [N, hidden_size].

        Each expert is called at most once, in the order of their numbers, with all its tokens. Those that go `NOWHERE` get 0.
        """
        self.announce(chosen := [number for number in indices.unique().tolist() if number != NOWHERE])
        out = torch.zeros_like(x)
        for number in chosen:
            token, choice = (indices == number).nonzero(as_tuple=True)
            weighted = self[number](x[token]) * weights[token, choice, None]
            out.index_add_(0, token, weighted.to(out.dtype))
        return out
