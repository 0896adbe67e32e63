"""The weights of a module that somebody else wrote: bound where it looks for them, in the order in which it asks."""

from __future__ import annotations

import functools
import math
import mmap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._absent import Absent
from ._kinds import Survey, kind_of
from ._plan import Plan
from ._stores import page_aligned
from ._units import Unit
from ._weights import Progress, Weights, bound

PAGE = mmap.PAGESIZE


class BlockWeights(Weights):
    """As `Weights`, for parts that do not keep its contract.

    Matrices may be called in any order. The first complete pass is read in the order of registration, and the order in
    which it asked is the one of all later passes. What is asked for when it is not its turn is read by itself.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        store: Any,
        survey: Survey,
        plan: Plan,
        device: torch.device,
        progress: Progress | None,
    ):
        self.bytes_read = 0
        self._survey = survey
        self._by_tensor: dict[tuple[str, str], list[Unit]] = {}
        for unit in survey.model.units:
            self._by_tensor.setdefault((unit.part, unit.name), []).append(unit)
        self._order: list[Unit] = []  # of the streamed units, in a pass
        self._at = 0  # how many of them this pass has taken or left out
        self._asked: list[Unit] = []
        self._settled = False
        self._alone = False  # the last slice came by a read of its own
        self._warned = False
        super().__init__(parts, store, survey.model, plan, device, progress)

    def begin_pass(self) -> None:
        """Be ready for a pass, also where the last one was left early."""
        if self._at < len(self._order):
            self.rewind()
        self._at = 0
        self._asked = []

    def end_pass(self) -> None:
        """After a complete pass: from the first one on, its order is known."""
        if self._settled or self._stream is None:
            return
        self._settled = True
        if self._asked != self._order:
            self._model = replace(self._model, units=tuple(self._asked))
            for stream in (self._stream, self._disk):
                if stream is not None:
                    stream.close()
            self._start()

    def bind_block(self, part: str) -> ExitStack:
        """Give a block its whole tensors, until the stack that this returns is closed."""
        at, binding = 0, ExitStack()
        for owner, name in self._survey.whole:
            if owner == part and (part, name) not in self._complete:
                tensor, at = self._assemble((part, name), self._room, at)
                binding.enter_context(bound(self._parts[part], name, tensor))
        return binding

    # Loading

    def _load(self, progress: Progress | None) -> None:
        super()._load(progress)
        self._complete: set[tuple[str, str]] = set()  # whole tensors of which every slice stays
        for (part, name), _ in self._survey.whole.items():
            units = self._by_tensor[part, name]
            if all(unit in self._local for unit in units):
                memory = page_aligned(sum(unit.kept_nbytes for unit in units) + PAGE)
                tensor, _ = self._assemble((part, name), memory, 0)
                for unit in units:
                    del self._kept[unit]
                self._opened.enter_context(bound(self._parts[part], name, tensor))
                self._complete.add((part, name))
        if self._survey.whole.keys() - self._complete:
            largest = max(sum(part == owner for owner, _ in self._survey.whole) for part in self._parts)
            nbytes = self._survey.whole_nbytes + largest * 2 * PAGE
            on_cpu = self._device.type == "cpu"
            self._room = page_aligned(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _start(self) -> None:
        super()._start()
        self._order = [unit for unit in self._model.units if unit not in self._local]
        self._at = 0
        if self._order:
            self._own_slot = page_aligned(self._plan.slot_nbytes)

    def _bind(self) -> None:
        for (part, name), module in self._survey.sliced.items():
            compute = {"linear": self._linear, "falcon": self._falcon, "conv1d": self._conv1d}[kind_of(module) or ""]
            self._opened.callback(_restore_forward(module))
            module.forward = functools.partial(compute, module, self._by_tensor[part, name])
            self._stand_in(part, name, None)
        for part, name in self._survey.gathered:
            self._stand_in(part, name, functools.partial(self._rows, part, name))
        for part, name in self._survey.whole.keys() - self._complete:
            self._stand_in(part, name, None)

    def _stand_in(self, part: str, name: str, rows: Callable[[Tensor], Tensor] | None) -> None:
        shape = torch.Size(self._survey.whole.get((part, name)) or self._store.tensors(part)[name].shape)
        absent = Absent.like(f"{part}: {name}", shape, self._plan.dtype, self._device, rows)
        self._opened.enter_context(bound(self._parts[part], name, absent))

    def _rows(self, part: str, name: str, ids: Tensor) -> Tensor:
        rows = self._store.rows(part, name, ids.cpu())
        self.bytes_read += rows.nbytes
        return rows.to(self._device, self._plan.dtype)

    # Computing

    def _falcon(self, module: nn.Linear, units: list[Unit], x: Tensor) -> Tensor:
        outputs = []  # each [..., rows of the slice]
        for unit in units:
            with self._slice_of(unit) as rows:
                outputs.append(x @ rows.T)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        bias = module._parameters["bias"]
        return output if bias is None else output + bias

    def _conv1d(self, module: nn.Module, units: list[Unit], x: Tensor) -> Tensor:
        """A slice is rows of the input here: the products of several are added up in fp32."""
        bias: Any = module._parameters["bias"]
        flat = x.reshape(-1, x.shape[-1])
        if len(units) == 1:
            with self._slice_of(units[0]) as rows:
                output = torch.addmm(bias, flat, rows)
        else:
            total = bias.float().expand(len(flat), -1).clone()
            for unit in units:
                with self._slice_of(unit) as rows:
                    total += flat[:, unit.start : unit.stop] @ rows
            output = total.to(x.dtype)
        return output.view(*x.shape[:-1], -1)

    def _assemble(self, tensor: tuple[str, str], memory: Tensor, at: int) -> tuple[Tensor, int]:
        """A whole tensor in `memory` from about `at` on, and where it ends.

        It lies in its page as in the file, so that a streamed one gives the bits of one that stays.
        """
        stored = self._store.tensors(tensor[0])[tensor[1]].shape
        target = torch.empty(0)
        for unit in self._by_tensor[tensor]:
            with self._slice_of(unit) as rows:
                if unit.start == 0:
                    at += rows.data_ptr() % PAGE
                    end = at + rows.dtype.itemsize * math.prod(stored)
                    target = memory[at:end].view(rows.dtype).view(stored)
                    at = -(-end // PAGE) * PAGE
                target[unit.start : unit.stop].copy_(rows)
        return target.view(self._survey.whole[tensor]), at

    @contextmanager
    def _slice_of(self, unit: Unit) -> Iterator[Tensor]:
        if unit in self._local:
            yield self._kept[unit]
        else:
            yield self._take(unit)
            self._release()

    def _take(self, unit: Unit) -> Tensor:
        self._asked.append(unit)
        self._count(unit)
        ahead = self._turns_until(unit)
        self._alone = ahead is None
        if ahead is None:
            if self._settled and not self._warned:
                self._warned = True
                warnings.warn(
                    f"{unit} was asked for when it was not its turn: reading it by itself is slow", stacklevel=2
                )
            return self._read(unit, self._own_slot).to(self._device, self._plan.dtype)
        for left_out in self._order[self._at : self._at + ahead]:
            super()._take(left_out)
            super()._release()
            self._count(left_out)
        self._at += ahead + 1
        return super()._take(unit)

    def _count(self, unit: Unit) -> None:
        if unit not in self._plan.resident_units:  # with a device those are in host memory
            self.bytes_read += unit.nbytes

    def _release(self) -> None:
        if not self._alone:
            super()._release()

    def _turns_until(self, unit: Unit) -> int | None:
        """How many units come before this one in the stream; None where that would leave out a block, or it has passed."""
        here = self._order[self._at - 1].part if self._at else ""
        for ahead, other in enumerate(self._order[self._at :]):
            if other == unit:
                return ahead
            if other.part.startswith("mid") and other.part not in (here, unit.part):
                return None
        return None


def _restore_forward(module: nn.Module) -> Callable[[], None]:
    """What gives a module the `forward` back that it has now."""
    own = module.__dict__.get("forward")

    def restore() -> None:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.__dict__["forward"] = own

    return restore
