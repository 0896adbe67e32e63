"""A module that knows nothing of parts, its weights in a real file, and what can be done with both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_partial_run import BudgetError, layout_from_module, offload

VOCAB, HIDDEN, LAYERS = 96, 32, 12
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Block(nn.Module):
    """Registers its matrices in another order than it calls them in, and has one that is no Linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.experts = nn.Parameter(torch.empty(3, HIDDEN, HIDDEN))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return x + torch.einsum("btd,eod->bto", x, self.experts) / 8


class Scaled(nn.Embedding):
    """An embedding with a forward, and a buffer, of its own."""

    def __init__(self) -> None:
        super().__init__(VOCAB, HIDDEN)
        self.scale = nn.Buffer(torch.empty(()), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "scale"):
            self.scale.fill_(HIDDEN**0.5)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Model(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = Scaled()
        self.after = nn.Linear(HIDDEN, HIDDEN, bias=False)  # registered before the blocks, called after them
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.after(x))


class Backwards(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in reversed(self.blocks):
            x = block(x)
        return x


def on_meta(kind: Any = Model) -> Any:
    with torch.device("meta"):
        return kind().eval()


def weights_of(model: nn.Module, *, without: tuple[str, ...] = ("head.weight",)) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint of the model holds, by part: each tensor once, where it is tied."""
    layout = layout_from_module(model)
    weights: dict[str, dict[str, Tensor]] = {}
    for key, tensor in model.state_dict().items():
        for part, name in layout(key, {}) if key not in without else ():
            weights.setdefault(part, {})[name] = tensor
    return weights


class Case:
    def __init__(self, path, store_of, kind: Any = Model) -> None:
        torch.manual_seed(0)
        self.path, self.store_of = path.parent, store_of
        self.kind, self.resident = kind, kind().eval().requires_grad_(False)
        for parameter in self.resident.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.weights = weights_of(self.resident)
        self.store = store_of(path, self.weights)

    def offload(self, memory: Any = "1GiB", module=None, **changes):
        budget: dict[str, Any] = dict(rows=2, context=8, runtime=0) | changes
        return offload(on_meta(self.kind) if module is None else module, self.store, memory=memory, **budget)

    def smallest(self, **changes) -> int:
        with pytest.raises(BudgetError) as refused:
            self.offload(1, **changes)
        return refused.value.smallest
