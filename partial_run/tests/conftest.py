"""A tiny model that follows the contract of parts, its weights in a real file, and what can be done with both."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foreign import Case
from llm_partial_run import BudgetError, PartialRun, _kinds, _units, plan

torch.set_num_threads(1)  # the matrices are too small for more
VOCAB, HIDDEN, LAYERS = 96, 32, 20


class Begin(nn.Module):
    gathered: ClassVar = {"embed.weight": "input_ids"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.embed(input_ids)


class Layer(nn.Module):
    """One attention head, positions added to the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def new_cache(self, rows: int, slots: int, *, dtype: torch.dtype, device: object) -> tuple[Tensor, Tensor]:
        shape = (rows, slots, HIDDEN)
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)  # pyright: ignore

    def forward(self, x, positions, cache=None, *, slots=None, kv_len=None, mask=None):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        k = k + torch.sin(positions[..., None] * torch.arange(1, HIDDEN + 1) / HIDDEN).to(k.dtype)
        seen_at = positions[:, None, :]
        if cache is not None:
            rows = torch.arange(x.shape[0])[:, None]
            for kept, new in zip(cache, (k, v), strict=True):
                kept[rows, positions if slots is None else slots] = new
            k, v = (kept[:, :kv_len] for kept in cache)
            seen_at = torch.arange(k.shape[1])[None, None, :]
        visible = seen_at <= positions[:, :, None] if mask is None else mask
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=visible))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Experts(nn.ModuleList):
    num_experts_per_tok = 2

    def announce(self, chosen: list[int]) -> None:
        """What this call will use, before the first is called."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        chosen = indices[indices >= 0].unique().tolist()
        self.announce(chosen)
        for i in chosen:
            token, place = torch.where(indices == i)
            output.index_add_(0, token, self[i](x[token]) * weights[token, place, None])
        return output


class RoutedLayer(Layer):
    """Each token goes to two of eight experts after the attention, padding to none."""

    routed = "experts"

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 8)
        self.experts = Experts(Expert() for _ in range(8))

    def forward(self, x, positions, cache=None, *, slots=None, kv_len=None, mask=None):
        x = super().forward(x, positions, cache, slots=slots, kv_len=kv_len, mask=mask)
        weights, indices = self.gate(x).softmax(-1).topk(2)
        if slots is not None and mask is None:
            indices = indices.masked_fill((slots > positions)[..., None], -1)
        return x + self.experts(x.flatten(0, 1), indices.flatten(0, 1), weights.flatten(0, 1)).view_as(x)


class End(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Info:
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class FileStore:
    """Tensors one after the other in one file, read as llm_sepweight's store does."""

    def __init__(self, path: Path, weights: dict[str, dict[str, Tensor]]):
        self.reads = 0
        self.fail_after: int | None = None
        self._at: dict[tuple[str, str], tuple[int, Info]] = {}
        with open(path, "wb") as file:
            for part, tensors in weights.items():
                for name, tensor in tensors.items():
                    self._at[part, name] = file.tell(), Info(tensor.dtype, tuple(tensor.shape), tensor.nbytes)
                    file.write(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()))
        self._file = os.open(path, os.O_RDONLY)

    def tensors(self, part: str) -> dict[str, Info]:
        return {name: info for (owner, name), (_, info) in self._at.items() if owner == part}

    def read(self, part: str, name: str, start: int, stop: int, into: Tensor) -> Tensor:
        self.reads += 1
        if self.fail_after is not None and self.reads > self.fail_after:
            raise OSError(f"{part}: {name} could not be read: the disk is gone")
        at, info = self._at[part, name]
        row = info.nbytes // info.shape[0]
        data = os.pread(self._file, (stop - start) * row, at + start * row)
        view = into[: len(data)].view(info.dtype).view(stop - start, *info.shape[1:])
        return view.copy_(torch.frombuffer(bytearray(data), dtype=info.dtype).view(view.shape))

    def rows(self, part: str, name: str, ids: Tensor) -> Tensor:
        into = torch.empty(self._at[part, name][1].nbytes, dtype=torch.uint8)
        return self.read(part, name, 0, VOCAB, into)[ids]

    def close(self) -> None:
        os.close(self._file)


class Toy:
    def __init__(self, path: Path):
        generator = torch.Generator().manual_seed(0)
        self.weights = {
            part: {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in module.state_dict().items()}
            for part, module in self.parts().items()
        }
        self.store = FileStore(path, self.stored())

    def stored(self) -> dict[str, dict[str, Tensor]]:
        """The weights by the store's parts: an expert is one of its own."""
        stored: dict[str, dict[str, Tensor]] = {}
        for part, tensors in self.weights.items():
            for name, tensor in tensors.items():
                found = re.fullmatch(r"experts\.(\d+)\.(.*)", name)
                place = (f"{part}/experts.{int(found[1]):05d}", found[2]) if found else (part, name)
                stored.setdefault(place[0], {})[place[1]] = tensor
        return stored

    layer = Layer

    def parts(self) -> dict[str, nn.Module]:
        """All parts, on meta."""
        with torch.device("meta"):
            return {"begin": Begin(), **{f"mid.{i:05d}": self.layer() for i in range(LAYERS)}, "end": End()}

    BUDGET: ClassVar[dict[str, Any]] = dict(rows=3, context=40, tokens=48, runtime=0)  # without Python and torch

    def run(self, memory: int | str, **changes: Any) -> PartialRun:
        return PartialRun(self.parts(), self.store, memory=memory, **(self.BUDGET | changes))

    def smallest(self, **changes: Any) -> int:
        with pytest.raises(BudgetError) as refused:
            plan(self.parts(), self.store, memory=1, **(self.BUDGET | changes))
        return refused.value.smallest

    @staticmethod
    def last(run: PartialRun, prompts: list[list[int]], n: int = 1) -> Tensor:
        """Logits [B, n, V] of the last positions of rows of different length."""
        width = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
        return run.forward.last_logits(ids, torch.tensor([len(prompt) for prompt in prompts]), n)

    def resident_logits(self, ids: list[int]) -> Tensor:
        """The model as plain modules: logits [T, V] of one row, each layer in full, with no engine."""
        x, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
        for part, module in self.parts().items():
            module.load_state_dict(self.weights[part], assign=True)
            x = module(x) if part == "end" else module(x, positions)
        return x[0].detach()


@pytest.fixture
def toy(tmp_path: Path):
    model = Toy(tmp_path / "weights")
    yield model
    model.store.close()


class RoutedToy(Toy):
    layer = RoutedLayer


@pytest.fixture
def routed_toy(tmp_path: Path):
    model = RoutedToy(tmp_path / "routed weights")
    yield model
    model.store.close()


@pytest.fixture
def file_store():
    """Weights in a real file, for tests that make their own: `file_store(path, weights)`."""
    return FileStore


@pytest.fixture
def case(tmp_path, file_store, monkeypatch):
    monkeypatch.setattr(_units, "SLICE", 2048)  # several slices a matrix
    monkeypatch.setattr(_kinds, "SMALL", 0)
    monkeypatch.setattr(_kinds, "TABLE", 0)
    found = Case(tmp_path / "weights", file_store)
    yield found
    found.store.close()


class RowsMultiplied(TorchDispatchMode):
    """Notes how many rows each product has, as torch computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.met.add(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rows_multiplied():
    return RowsMultiplied()
