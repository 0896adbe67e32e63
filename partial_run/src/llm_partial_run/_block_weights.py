"""The weights of a module that somebody else wrote: bound where it looks for them, in the order in which it asks."""

from __future__ import annotations

import functools
import math
import mmap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._absent import Absent
from ._kinds import Survey
from ._plan import Plan
from ._products import of_few_shapes, product
from ._stores import page_aligned
from ._units import Unit
from ._weights import Compute, Progress, Weights, bound
from ._whole import whole

PAGE = mmap.PAGESIZE


class BlockWeights(Weights):
    """As `Weights`, for parts that do not keep its contract.

    Matrices may be called in any order. The first complete pass is read in the order of registration, and the order in
    which it asked is the one of all later passes, until one asks for all of that and more. What is asked for when it is
    not its turn is read by itself.
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
        self._one_at_a_time = threading.Lock()  # for who calls a module beside the blocks in another thread
        self._one_called = threading.Lock()  # of the matrices that are put together for a call: they share their memory
        self._running: str | None = None  # the block that is
        self._alone = False  # the last slice came by a read of its own
        self._untimely: Unit | None = None  # the first slice of this pass that did, though the order was known
        self._warned = False
        super().__init__(parts, store, survey.model, plan, device, progress)

    def begin_pass(self) -> None:
        """Be ready for a pass, also where the last one was left early."""
        self._warn()
        with self._one_at_a_time:
            self.rewind()
            self._at = 0
            self._asked = []

    def end_pass(self, *, complete: bool) -> None:
        """From the first complete pass on the order is known. A later one may know more: the first was of an inner module."""
        if complete and self._stream is not None and (not self._settled or {*self._asked} > {*self._order}):
            self._settled, self._untimely = True, None
            with self._one_at_a_time:
                self._follow()
        self._warn()

    def _follow(self) -> None:
        """Read in the order of this pass from now on."""
        if self._asked != self._order:
            self._model = replace(self._model, units=tuple(self._asked))
            for stream in (self._stream, self._disk):
                if stream is not None:
                    stream.close()
            self._start()

    def _warn(self) -> None:
        if self._untimely is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._untimely} was asked for when it was not its turn: reading it by itself is slow", stacklevel=2
            )
        self._untimely = None

    def bind_block(self, part: str) -> ExitStack:
        """Give a block its whole tensors, until the stack that this returns is closed."""
        used = 0  # bytes of the room
        with ExitStack() as binding:
            self._running = part
            binding.callback(setattr, self, "_running", None)
            for owner, name in self._survey.whole:
                if owner == part and (part, name) not in self._complete:
                    tensor = self._assemble((part, name), self._room[used:])
                    used += -(-tensor.nbytes // PAGE) * PAGE
                    binding.enter_context(bound(self._parts[part], name, tensor))
            return binding.pop_all()

    # Loading

    def _load(self, progress: Progress | None) -> None:
        super()._load(progress)
        self._complete: set[tuple[str, str]] = set()  # tensors bound as one of which every slice stays
        in_one_piece = [*self._survey.called, *self._survey.whole]
        for part, name in in_one_piece:
            units = self._by_tensor[part, name]
            if all(unit in self._local for unit in units):
                tensor = self._assemble((part, name), self._memory(sum(unit.kept_nbytes for unit in units)))
                for unit in units:
                    del self._kept[unit]
                self._opened.enter_context(bound(self._parts[part], name, tensor))
                self._complete.add((part, name))
        if self._survey.whole.keys() - self._complete:
            most = max(sum(part == owner for owner, _ in self._survey.whole) for part in self._parts)
            self._room = self._memory(self._survey.whole_nbytes + most * PAGE)
        if self._survey.called.keys() - self._complete:
            self._room_for_a_call = self._memory(self._survey.called_nbytes)

    def _stay(self, part: str, name: str, tensor: Tensor) -> None:
        """A small matrix, such as a router's, may be multiplied with as those in one piece are."""
        super()._stay(part, name, whole(tensor) if tensor.dim() > 1 else tensor)

    def _memory(self, nbytes: int) -> Tensor:
        on_cpu = self._device.type == "cpu"
        return page_aligned(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _dtype_of(self, part: str, name: str) -> torch.dtype:
        return self._survey.dtypes[part, name]

    def _start(self) -> None:
        super()._start()
        self._order = [unit for unit in self._model.units if unit not in self._local]
        self._at = 0
        if self._order:
            self._own_slot = page_aligned(self._plan.slot_nbytes)

    def _bind(self) -> None:
        for (part, name), module in self._survey.sliced.items():
            units = self._by_tensor[part, name]
            if type(module) is nn.Linear:
                self._replace_forward(module, functools.partial(self._linear, module, units, self._slice))
            else:
                self._replace_forward(module, functools.partial(self._falcon, module, units))
        for (part, name), module in self._survey.called.items():
            self._replace_forward(module, functools.partial(self._call, module, (part, name)))
        for part, name in {*self._survey.sliced, *self._survey.called, *self._survey.whole} - self._complete:
            self._stand_in(part, name, None)
        for part, name in self._survey.gathered:
            self._stand_in(part, name, functools.partial(self._rows, part, name))

    def _replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._opened.enter_context(replaced_forward(module, forward))

    def _unbind(self) -> None:
        """What `_replace_forward` set goes with the rest: a `forward` of somebody else's stays."""

    def _stand_in(self, part: str, name: str, rows: Callable[[Tensor], Tensor] | None) -> None:
        shape = self._survey.whole.get((part, name)) or self._store.tensors(part)[name].shape
        dtype = self._dtype_of(part, name)
        in_its_block = functools.partial(self._lacks, part, name)
        absent = Absent.like(f"{part}: {name}", torch.Size(shape), dtype, self._device, rows, in_its_block)
        self._opened.enter_context(bound(self._parts[part], name, absent))

    def _lacks(self, part: str, name: str) -> bool:
        """Whether a block is running without a tensor that it could have as a whole."""
        return self._running == part and (part, name) not in self._survey.whole

    def _rows(self, part: str, name: str, ids: Tensor) -> Tensor:
        rows = self._store.rows(part, name, ids.cpu())
        self.bytes_read += rows.nbytes
        return rows.to(self._device, self._dtype_of(part, name))

    # Computing

    def _linear(self, linear: nn.Linear, units: list[Unit], compute: Compute, x: Tensor) -> Tensor:
        refuse_gradients(f"{units[0].part}: {units[0].name}", x)
        return super()._linear(linear, units, compute, x.contiguous())  # else torch copies the matrix for each row of x

    def _slice(self, unit: Unit, x: Tensor, bias: Tensor | None) -> Tensor:
        with self._slice_of(unit) as rows:
            return product(x, rows, bias)

    def _falcon(self, module: nn.Linear, units: list[Unit], x: Tensor) -> Tensor:
        refuse_gradients(f"{units[0].part}: {units[0].name}", x)
        x = x.contiguous()
        outputs = []  # each [..., rows of the slice]
        for unit in units:
            with self._slice_of(unit) as rows:
                outputs.append(product(x, rows, None))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        bias = module._parameters["bias"]
        return output if bias is None else output + bias

    def _call(self, module: nn.Module, tensor: tuple[str, str], x: Tensor) -> Tensor:
        """The module's own forward, with its matrix in one piece."""
        refuse_gradients(": ".join(tensor), x)
        forward = functools.partial(type(module).forward, module)
        if tensor in self._complete:
            return of_few_shapes(forward, x)
        with self._one_called, bound(module, "weight", self._assemble(tensor, self._room_for_a_call)):
            return of_few_shapes(forward, x)

    def _assemble(self, tensor: tuple[str, str], memory: Tensor) -> Tensor:
        """A tensor from its slices: from a page's start on, whether they stay or are streamed, so that the bits are the same."""
        part, name = tensor
        stored = self._store.tensors(part)[name].shape
        target = torch.empty(0)
        for unit in self._by_tensor[tensor]:
            with self._slice_of(unit) as rows:
                if unit.start == 0:
                    target = memory[: rows.dtype.itemsize * math.prod(stored)].view(rows.dtype).view(stored)
                target[unit.start : unit.stop].copy_(rows)
        return whole(target.view(self._survey.whole[tensor])) if tensor in self._survey.whole else target

    @contextmanager
    def _slice_of(self, unit: Unit) -> Iterator[Tensor]:
        if unit in self._local:
            yield self._kept[unit]
            return
        with self._one_at_a_time:
            yield self._take(unit)
            self._release()

    def _take(self, unit: Unit) -> Tensor:
        self._asked.append(unit)
        self._count(unit)
        ahead = self._turns_until(unit)
        self._alone = ahead is None
        if ahead is None:
            if self._settled and self._untimely is None:
                self._untimely = unit
            return self._read(unit, self._own_slot).to(self._device, self._dtype_of(unit.part, unit.name))
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


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward meanwhile; then its class's again, or the one that the instance had."""
    own = {"forward": module.__dict__["forward"]} if "forward" in module.__dict__ else {}
    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        module.__dict__.update(own)


def refuse_gradients(name: str, *tensors: Tensor, of: str = "input") -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{name} is offloaded, and its {of} requires gradients, which would be wrong once its weights are gone: "
            "call it under torch.no_grad()"
        )
