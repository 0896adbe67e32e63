"""The slices of a model's matrices: those that stay, and those that come by a stream when they are needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._experts import Experts
from ._plan import READERS, Plan
from ._products import product
from ._stores import page_aligned, slot_for
from ._stream import Stream
from ._units import Model, Unit, linears_of, place_of, weight_of

Progress = Callable[[str, int, int], object]  # (what is being done, done, of how many)
Compute = Callable[[Unit, Tensor, Tensor | None], Tensor]  # (slice, x, its bias) -> its part of the output


class Weights:
    """Lets each Linear of the parts compute slice by slice, from where the plan has put its slices.

    With device memory there are three places: the device; pinned host memory, copied to slots on the device on a stream
    beside the computation; and the disk, read into pinned slots and copied from there.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        store: Any,
        model: Model,
        plan: Plan,
        device: torch.device,
        progress: Progress | None,
    ):
        self._parts, self._store, self._model, self._plan, self._device = parts, store, model, plan, device
        self._pinned = device.type == "cuda"
        self._local = plan.device_units if plan.device_memory else plan.resident_units  # where the computation is
        self._kept: dict[Unit, Tensor] = {}
        self._held: dict[Unit, Tensor] | None = None
        self._left_out: frozenset[Unit] = frozenset()  # of the pass
        self._disk: Stream | None = None
        self._stream: Stream | None = None  # what the Linears take from: the disk's, or the device's
        self._experts: Experts | None = None
        self._opened = ExitStack()
        for part, module in parts.items():
            if taken := [name for name, linear in linears_of(module).items() if _serves(linear)]:
                raise ValueError(f"{part}: {taken[0]} belongs to another run: close that one, or make the parts anew")
        try:
            self._load(progress)
            self._start()
            self._bind()
        except BaseException:
            self.close()
            raise

    @property
    def waited(self) -> float:
        """Seconds that the computation has waited for slices."""
        return sum(source.waited for source in (self._stream, self._experts) if source is not None)

    @property
    def expert_bytes_read(self) -> int:
        """Bytes of routed experts that were absent when they were wanted."""
        return 0 if self._experts is None else self._experts.bytes_read

    def rewind(self, *, without: str | None = None) -> int:
        """Be ready for a pass, also where the last one was left in the middle; bytes of the part `without` that it does not read."""
        self._held = None
        unwanted = frozenset(unit for unit in self._model.units if unit.part == without and unit not in self._local)
        self._left_out = frozenset() if self._stream is None else self._stream.rewind(unwanted)
        if self._experts is not None:
            self._experts.rewind()
        return sum(unit.nbytes for unit in self._left_out)

    def hold(self) -> None:
        """Keep streamed slices until `let_go`: several micro-batches will use them."""
        self._held = {}

    def let_go(self) -> None:
        for _ in range(len(self._held or ())):
            self._release()
        self._held = None

    def pass_over(self, part: str) -> None:
        """Keep the streams in step where a part is not computed, and was being read already."""
        for unit in self._model.units:
            if unit.part == part and unit not in self._local | self._left_out:
                self._take(unit)
                self._release()

    def stop(self) -> None:
        """Let whoever waits for a slice know that it will not come."""
        for source in (self._stream, self._disk, self._experts):
            if source is not None:
                source.stop()

    def close(self) -> None:
        """Give the modules their own `forward` back, end the threads, drop the weights."""
        self._unbind()
        self._opened.close()
        self._disk = self._stream = self._experts = self._held = None
        self._kept.clear()

    # Loading

    def _load(self, progress: Progress | None) -> None:
        for part, name in self._model.kept:
            place = place_of(part, self._parts[part], name)
            info = self._store.tensors(place[0])[place[1]]
            tensor = self._store.read(*place, 0, info.shape[0], page_aligned(info.nbytes + 2 * 4096))
            dtype = self._dtype_of(part, name) if tensor.is_floating_point() else tensor.dtype
            self._stay(part, name, tensor.to(self._device, dtype, copy=True))

        wanted = self._plan.resident_units | self._plan.device_units
        loading = [unit for unit in self._model.units + self._model.experts if unit in wanted]
        total, done = sum(unit.nbytes for unit in loading), 0
        with ThreadPoolExecutor(READERS, "llm_partial_run loader") as pool:
            try:
                for unit, tensor in zip(loading, pool.map(self._keep, loading), strict=True):
                    self._kept[unit] = tensor
                    done += unit.nbytes
                    if progress is not None:
                        progress("loading", done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _stay(self, part: str, name: str, tensor: Tensor) -> None:
        """Bind a tensor that is no slice's."""
        self._opened.enter_context(bound(self._parts[part], name, tensor))

    def _keep(self, unit: Unit) -> Tensor:
        """A slice that stays: at the same place in its page as when it is streamed, so that it gives the same bits."""
        on_device = unit in self._plan.device_units
        tensor = self._read(unit, slot_for(unit, pinned=self._pinned and not on_device))
        if on_device:
            return tensor.to(self._device, self._dtype_of(unit.part, unit.name), copy=True)
        if self._plan.device_memory:  # pinned ones convert on the device
            return tensor
        return tensor.to(self._dtype_of(unit.part, unit.name))

    def _dtype_of(self, part: str, name: str) -> torch.dtype:
        """What a weight computes in."""
        return self._plan.dtype

    def _start(self) -> None:
        plan = self._plan
        off_device = [unit for unit in self._model.units if unit not in plan.device_units]
        from_disk = [unit for unit in off_device if unit not in plan.resident_units]
        if from_disk:
            slots = [page_aligned(plan.slot_nbytes, pinned=self._pinned) for _ in range(plan.slots)]
            self._disk = self._stream = Stream(from_disk, slots, self._read, threads=READERS)
            self._opened.callback(self._disk.close)
        if plan.expert_slots:
            slots = [page_aligned(plan.expert_slot_nbytes) for _ in range(plan.expert_slots)]
            self._experts = Experts(slots, self._read, threads=READERS)
            self._opened.callback(self._experts.close)
        if plan.device_memory and off_device:
            slots = [
                torch.empty(plan.slot_nbytes, dtype=torch.uint8, device=self._device) for _ in range(plan.device_slots)
            ]
            self._side = torch.cuda.Stream(self._device) if self._pinned else None
            self._stream = Stream(off_device, slots, self._upload, threads=1, source=self._disk)
            self._opened.callback(self._stream.close)

    def _read(self, unit: Unit, slot: Tensor) -> Tensor:
        return self._store.read(unit.part, unit.name, unit.start, unit.stop, slot)

    def _upload(self, unit: Unit, slot: Tensor) -> Tensor:
        """Copy a slice to the device, on a stream of its own beside the computation."""
        kept = self._kept.get(unit)
        source = self._disk.take(unit) if kept is None else kept  # pyright: ignore[reportOptionalMemberAccess]
        target = slot[: source.nbytes].view(source.dtype).view(source.shape)
        if self._side is None:
            target.copy_(source)
        else:
            with torch.cuda.stream(self._side):
                target.copy_(source, non_blocking=True)
            self._side.synchronize()
        if kept is None:
            self._disk.release()  # pyright: ignore[reportOptionalMemberAccess]
        return target

    def _bind(self) -> None:
        by_matrix: dict[tuple[str, str], list[Unit]] = {}
        for unit in self._model.units + self._model.experts:
            by_matrix.setdefault((unit.part, unit.name), []).append(unit)
        for part, module in self._parts.items():
            experts: dict[str, list[Unit]] = {}
            linear: Any  # its forward is replaced
            for name, linear in linears_of(module).items():
                place = place_of(part, module, weight_of(name))
                units = by_matrix[place]
                if self._experts is not None and place[0] != part:
                    experts.setdefault(place[0], []).extend(units)
                    linear.forward = functools.partial(
                        self._linear, linear, units, functools.partial(_expert_slice, self._experts)
                    )
                else:
                    linear.forward = functools.partial(self._linear, linear, units, self._slice)
            if self._experts is not None and experts:
                announced: Any = module.get_submodule(module.routed)  # pyright: ignore
                announced.announce = functools.partial(_announce, self._experts, part, list(experts.values()))

    def _unbind(self) -> None:
        for module in self._parts.values():
            for linear in linears_of(module).values():
                linear.__dict__.pop("forward", None)
            if routed := getattr(module, "routed", None):
                module.get_submodule(routed).__dict__.pop("announce", None)

    # Computing

    def _linear(self, linear: nn.Linear, units: list[Unit], compute: Compute, x: Tensor) -> Tensor:
        bias = linear._parameters["bias"]
        if len(units) == 1:
            return compute(units[0], x, bias)
        output = x.new_empty(*x.shape[:-1], linear.out_features)
        for unit in units:
            rows = slice(unit.start, unit.stop)
            output[..., rows] = compute(unit, x, None if bias is None else bias[rows])
        return output

    def _slice(self, unit: Unit, x: Tensor, bias: Tensor | None) -> Tensor:
        if unit in self._local:
            return product(x, self._kept[unit], bias)
        if self._held is None:
            output = product(x, self._take(unit), bias)
            self._release()
            return output
        if unit not in self._held:
            self._held[unit] = self._stream.take(unit)  # pyright: ignore[reportOptionalMemberAccess]
        return product(x, self._held[unit].to(self._plan.dtype), bias)

    def _take(self, unit: Unit) -> Tensor:
        return self._stream.take(unit).to(self._dtype_of(unit.part, unit.name))  # pyright: ignore[reportOptionalMemberAccess]

    def _release(self) -> None:
        until = torch.cuda.current_stream(self._device).record_event() if self._pinned else None
        self._stream.release(until)  # pyright: ignore[reportOptionalMemberAccess]


def _serves(linear: nn.Linear) -> bool:
    """Whether a Linear computes with the slices of a run that is open."""
    function = getattr(vars(linear).get("forward"), "func", None)
    return getattr(function, "__func__", None) is Weights._linear


def _announce(experts: Experts, part: str, units: list[list[Unit]], chosen: list[int]) -> None:
    experts.announce(part, [unit for expert in chosen for unit in units[expert]])


def _expert_slice(experts: Experts, unit: Unit, x: Tensor, bias: Tensor | None) -> Tensor:
    output = product(x, experts.take(unit).to(x.dtype), bias)
    experts.release(unit)
    return output


@contextmanager
def bound(module: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    """The tensor as a parameter or buffer meanwhile; at no cost, unlike setattr or load_state_dict."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    names: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    before, names[leaf] = names[leaf], tensor
    try:
        yield
    finally:
        names[leaf] = before
