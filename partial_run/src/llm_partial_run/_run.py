"""Runs the parts of a model in order, within a memory budget."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ._budget import plan
from ._caches import Caches, SpilledCaches, check_caches, check_directory, directory_for
from ._checks import check_hidden_states, check_ids, check_length, check_logits, check_shapes
from ._forward import Forward
from ._products import one_pass_at_a_time
from ._stores import as_store
from ._units import in_order, survey
from ._weights import Progress, Weights, bound


@dataclass
class Stats:
    """What the passes so far have cost."""

    passes: int = 0
    tokens: int = 0
    bytes_read: int = 0  # in passes: weights, and keys and values on disk; loading what stays is not counted
    seconds_total: float = 0.0
    seconds_waiting: float = 0.0  # for streamed weights
    seconds_computing: float = 0.0

    @property
    def seconds_else(self) -> float:
        """Rows of the embedding, caches on disk, and Python between the parts."""
        return self.seconds_total - self.seconds_waiting - self.seconds_computing


class PartialRun:
    """Parts of a model, run in order, with what fits resident and the rest streamed from `weights` in each pass.

    :param parts: name -> module, on the meta device. Names sort the pass: "begin", "mid.00000", ..., "end".
    :param weights: a store (see llm_sepweight), or any `load(part) -> mapping of tensors`.
    :param memory: bytes, or "4GiB", that the whole process may use. Default: nine tenths of what is free here.
    :param rows: sequences that the caches of `forward` hold. :param context: tokens that each of them may have.
    :param tokens: tokens that a pass over the weights computes at most. Default: `micro_batch`, or 128.
    :param micro_batch: tokens that go through a layer at once. Default: `tokens`, up to 256.
    :param dtype: to compute in. Default: the one that most bytes are stored in.
    :param device: where to compute. With "cuda" weights stay in `device_memory` first, then in pinned host memory.
    :param runtime: bytes to count for Python and torch. Default: measured; 0 lets `memory` count the model alone.
    :param spill: directory, on a disk, for caches that do not fit in memory (default: /var/tmp), and where it is given
        also for those that take memory better used for weights (see `plan`).
    :param progress: called with ("loading", bytes, of bytes) and, in each pass, with ("pass", parts, of parts).
    :raises BudgetError: before anything is loaded, where `memory` is too small.

    Closing it, also by an exception, ends its threads and files. The modules can then be used in another run.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        weights: Any,
        *,
        memory: int | str | None = None,
        rows: int = 1,
        context: int = 2048,
        tokens: int | None = None,
        micro_batch: int | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        device_memory: int | str | None = None,
        runtime: int | str | None = None,
        spill: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ):
        self.parts = parts = in_order(parts)
        self.device = torch.device(device)
        self.stats = Stats()
        self._store = as_store(weights, parts)
        self._spill = directory_for(spill)
        self.plan = plan(
            parts, self._store, memory=memory, rows=rows, context=context, tokens=tokens, micro_batch=micro_batch,
            dtype=dtype, device=device, device_memory=device_memory, runtime=runtime, spill=spill,
        )  # fmt: skip
        self._model = survey(parts, self._store, dtype)
        self._progress = progress
        if self.plan.spilled:
            check_directory(self._spill, self.plan.spilled)
        self._cache_like: Caches = {
            part: module.new_cache(1, 1, dtype=self.plan.dtype, device="meta")  # pyright: ignore
            for part, module in self.parts.items()
            if hasattr(module, "new_cache")
        }
        self.lock = threading.RLock()  # of a pass, and of what its caller knows of the caches
        self._forward: Forward | None = None
        self._passing: threading.Thread | None = None  # in which a pass is under way
        self._closed = False
        self._on_disk: WeakSet[SpilledCaches] = WeakSet()
        self._opened = ExitStack()
        self._weights = Weights(self.parts, self._store, self._model, self.plan, self.device, progress)
        self._opened.callback(self._weights.close)

    def __call__(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        caches: Caches | SpilledCaches | None = None,
        *,
        slots: Tensor | None = None,
        kv_len: int | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """One pass through all parts.

        :param x: input_ids [B, T] where the parts have a begin, else hidden states [B, T, D].
        :param positions: [B, T]. Default: 0 to T - 1. :param slots: [B, T], cache slots to write. Default: positions.
        :param caches: from `new_caches`, row b for row b of x. Without, the pass attends to x alone.
        :param kv_len: a bound on the cache slots in use. :param mask: [B, T, kv_len], for draft trees.
        :returns: logits [B, T, V] where the parts have an end, else hidden states [B, T, D].
        """
        return self.run_pass(x, positions, caches, slots=slots, kv_len=kv_len, mask=mask)

    def run_pass(
        self,
        x: Tensor,
        positions: Tensor | None,
        caches: Caches | SpilledCaches | None,
        *,
        slots: Tensor | None = None,
        kv_len: int | None = None,
        mask: Tensor | None = None,
        first_row: int = 0,
        before_end: Callable[[Tensor], Tensor] | None = None,
        with_end: bool = True,
    ) -> Tensor:
        """As calling the run, with the caches' rows from `first_row` on.

        `before_end` picks what of the hidden states goes into the end. Without the end, it is neither read nor computed.
        """
        self.check_open()
        if "begin" in self.parts:
            self.check_ids(x)
        else:
            check_hidden_states(x)
        check_shapes(x, positions, slots, mask)
        rows, length = x.shape[:2]
        check_length(self.plan, rows, length, at_once=caches is None or mask is not None)
        if positions is None:
            positions = torch.arange(length).expand(rows, length)
        if mask is not None:
            kv_len = mask.shape[-1]
        elif caches is not None:
            kv_len = _bound(positions, kv_len)
        if caches is not None:
            check_caches(caches, self._cache_like, first_row + rows, positions if slots is None else slots, kv_len or 0)
        if "end" in self.parts and before_end is None:
            self.check_logits(rows * length, rows * length)
        with self.lock, one_pass_at_a_time, self._in_pass(), torch.inference_mode():
            start = time.perf_counter()
            waited, experts_read = self._weights.waited, self._weights.expert_bytes_read
            left_out = self._weights.rewind(without=None if with_end else "end")
            x, positions = x.to(self.device), positions.to(self.device)
            slots, mask = (None if given is None else given.to(self.device) for given in (slots, mask))
            for done, (part, module) in enumerate(self.parts.items()):
                if self._progress is not None:
                    self._progress("pass", done, len(self.parts))
                if part == "end" and before_end is not None:
                    wanted = before_end(x)
                    if not with_end:
                        self._weights.pass_over(part)
                        break
                    x, positions = wanted, positions[:, :1]
                x = self._run_part(part, module, x, positions, caches, first_row, slots, kv_len, mask)
            if self._progress is not None:
                self._progress("pass", len(self.parts), len(self.parts))
            self.stats.passes += 1
            self.stats.tokens += rows * length
            self.stats.bytes_read += self.plan.streamed - left_out + self._weights.expert_bytes_read - experts_read
            self.stats.seconds_total += time.perf_counter() - start
            self.stats.seconds_waiting += self._weights.waited - waited
        return x

    @property
    def forward(self) -> Forward:
        """The whole model as a `forward_func` with its prefix cache: ids in, logits out."""
        if not ({"begin", "end"} <= self.parts.keys()):
            raise ValueError(f"forward needs a whole model; the parts are {list(self.parts)}. Call the run itself")
        with self.lock:
            self.check_open()
            if self._forward is None:
                self._forward = Forward(self)
            return self._forward

    @property
    def vocab_size(self) -> int:
        """Logits per position; 0 where the parts have no end."""
        return self._model.vocab_size

    def check_ids(self, input_ids: Tensor) -> None:
        """Raises ValueError where `input_ids` are no integers [B, T], or name a row that the embedding does not have."""
        gathered = getattr(self.parts["begin"], "gathered", ())
        rows = [self._store.tensors("begin")[name].shape[0] for name in gathered]
        check_ids(input_ids, min(rows, default=None))

    def check_logits(self, positions: int, at_once: int) -> None:
        """Raises ValueError where the plan has no memory for the logits of so many positions, so many of them at once."""
        check_logits(self.plan, self._model, positions, at_once)

    def new_caches(self, rows: int | None = None, slots: int | None = None) -> Caches | SpilledCaches:
        """Keys and values for each layer, zeroed and written in place.

        For the planned rows and context, in memory or on disk as the plan says, which counts them once. Of other sizes,
        which it does not count, always in memory: part -> tensors [rows, slots, ...].
        """
        layers: dict[str, Any] = {part: module for part, module in self.parts.items() if hasattr(module, "new_cache")}
        if rows is None and slots is None and self.plan.spilled:
            caches = SpilledCaches(layers, self.plan.rows, self.plan.context + 1, self.plan.dtype, self._spill)
            self._on_disk.add(caches)
            return caches
        rows, slots = rows or self.plan.rows, slots or self.plan.context + 1
        return {
            part: module.new_cache(rows, slots, dtype=self.plan.dtype, device=self.device)
            for part, module in layers.items()
        }

    def close(self) -> None:
        """End the threads, close the files and give the memory back. A second time it does nothing.

        A pass in another thread ends first, with an error where it needs more weights. Raises RuntimeError within a pass.
        """
        if self._passing is threading.current_thread():
            raise RuntimeError("a pass of this run is under way in this very thread: close it after the pass")
        self._closed = True
        self._weights.stop()  # so that a pass in another thread, which has the lock, does not wait for slices
        with self.lock:
            self._opened.close()
            for caches in list(self._on_disk):
                caches.close()
            self._forward = None

    @contextmanager
    def _in_pass(self) -> Iterator[None]:
        self.check_open()
        self._passing = threading.current_thread()
        try:
            yield
        finally:
            self._passing = None

    def __enter__(self) -> PartialRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_part(
        self,
        part: str,
        module: nn.Module,
        x: Tensor,
        positions: Tensor,
        caches: Caches | SpilledCaches | None,
        first_row: int,
        slots: Tensor | None,
        kv_len: int | None,
        mask: Tensor | None,
    ) -> Tensor:
        """One part for all rows: in micro-batches, with its streamed slices held until the last one has passed."""
        if part == "begin":
            return self._begin(module, x, positions)
        if part == "end":  # all rows at once: their logits are there at once anyway
            return self._timed(module, x)
        batches = list(self._micro_batches(x, caches is not None and mask is None))
        if len(batches) > 1:
            self._weights.hold()
        rows = range(first_row, first_row + x.shape[0])
        cache = None
        if isinstance(caches, SpilledCaches):
            before = caches.bytes_read
            cache = caches.read(part, rows, kv_len or 0, fresh=mask is None and kv_len == x.shape[1])
            self.stats.bytes_read += caches.bytes_read - before
        elif caches is not None:
            cache = caches[part]
        output = torch.empty_like(x) if len(batches) > 1 else None
        for r, t in batches:
            at = positions[r, t]
            bound = kv_len if kv_len is None or t == slice(None) else _bound(at, kv_len)
            result = self._timed(
                module,
                x[r, t],
                at,
                None if cache is None else tuple(tensor[rows.start : rows.stop][r] for tensor in cache),
                slots=None if slots is None else slots[r, t],
                kv_len=bound,
                mask=None if mask is None else mask[r],
            )
            if output is None:
                output = result
            else:
                output[r, t] = result
        self._weights.let_go()
        if isinstance(caches, SpilledCaches):
            caches.write(part, rows, positions if slots is None else slots)
        return output  # pyright: ignore[reportReturnType]

    def _micro_batches(self, x: Tensor, in_chunks: bool) -> Iterator[tuple[slice, slice]]:
        """Whole rows together where they are short; one row, in chunks where a cache joins them, where it is long."""
        rows, length = x.shape[:2]
        at_once = max(1, self.plan.micro_batch // max(1, length))
        chunk = self.plan.micro_batch if in_chunks and length > self.plan.micro_batch else length
        for r in range(0, rows, at_once):
            for t in range(0, length, chunk):
                yield slice(r, r + at_once), slice(t, t + chunk) if chunk < length else slice(None)

    def _timed(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        start, waited = time.perf_counter(), self._weights.waited
        output = module(*args, **kwargs)
        self.stats.seconds_computing += time.perf_counter() - start - (self._weights.waited - waited)
        return output

    def _begin(self, module: nn.Module, input_ids: Tensor, positions: Tensor) -> Tensor:
        """The begin with a matrix of only the rows that are looked up."""
        if not (gathered := getattr(module, "gathered", ())):
            return self._timed(module, input_ids, positions)
        ids, within = input_ids.unique(return_inverse=True)
        with ExitStack() as stack:
            for name in gathered:
                rows = self._store.rows("begin", name, ids.cpu())
                self.stats.bytes_read += rows.nbytes
                stack.enter_context(bound(module, name, rows.to(self.device, self.plan.dtype)))
            return self._timed(module, within.view_as(input_ids), positions)

    def check_open(self) -> None:
        """Raises RuntimeError where the run is closed."""
        if self._closed:
            raise RuntimeError("this run is closed: use it within its `with` block")


def _bound(positions: Tensor, kv_len: int | None) -> int:
    """The slots in use; one more where it would look like a prefill from nothing (`kv_len == T`) and is none."""
    seen = int(positions.max()) + 1
    bound = seen if kv_len is None else min(seen, kv_len)
    return bound + 1 if bound == positions.shape[1] and positions[:, 0].any() else bound
