"""Runs a module that somebody else wrote within a memory budget: its blocks are streamed as it calls them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from ._absent import Absent
from ._attention import InFp32
from ._block_weights import BlockWeights, refuse_gradients, replaced_forward
from ._blocks import find_blocks, parts_of, places
from ._budget import DEFAULT_SHARE, MARGIN, SLACK, beside_weights
from ._buffers import computed_buffers
from ._checks import check_experts, check_labels
from ._kinds import Survey, attending, attends_itself, cache_nbytes, copied_nbytes, largest_kept_nbytes, survey_blocks
from ._memory import available, give_freed_memory_back, measured_runtime, parse_bytes
from ._plan import Plan, decide
from ._products import makes_code, without_onednn
from ._run import Stats
from ._stores import as_store, read_rate
from ._tied import Tied
from ._weights import Progress, bound

# What a module's own code imports and allocates when it is called for the first time. Measured as the growth of the
# resident set with models too small to count, 12 architectures of transformers 5.23: 6 to 9 MiB in a first call, 7 to 10
# in `generate`, 12 to 17 with beams. As much again is for the holes that its growing keys and values leave in the heap.
FOREIGN = 36 << 20

# What `generate` holds of each row and entry of the vocabulary, beside the logits that a pass gives and the plan counts:
# fp32 copies, a sort with its int64 indices, probabilities. 7 numbers of 4 bytes were seen at most with top_k and top_p;
# the heap does not give all of it back at once.
SAMPLING = 10 * 4


def offload(
    module: nn.Module,
    weights: Any,
    *,
    memory: int | str | None = None,
    rows: int = 1,
    context: int = 2048,
    tokens: int | None = None,
    blocks: str | Iterable[nn.Module] | None = None,
    whole_blocks: bool = False,
    dtype: torch.dtype | None = None,
    cache: int | str | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    device_memory: int | str | None = None,
    runtime: int | str | None = None,
    progress: Progress | None = None,
) -> Offload:
    """Give a module on the meta device its weights, within a memory budget, until the result is closed.

    The module is called as always, `model.generate(...)` of transformers included: what fits of its blocks stays, the
    rest is streamed in each pass. Only inference: in training mode, or where gradients are wanted, it raises.

    :param module: in eval mode, best on meta: what it has in memory already counts as well.
    :param weights: a store (see llm_sepweight) opened with `layout_from_module(module)`, or `load(part) -> tensors`.
    :param memory: bytes, or "4GiB", that the whole process may use. Default: nine tenths of what is free here.
    :param rows: sequences, and :param context: tokens of each, whose keys and values are counted.
    :param tokens: most tokens of all rows in one call; more are refused. Default: rows * context.
    :param blocks: the path of their list ("model.layers"), or the blocks in order. Default: the largest list of modules.
    :param whole_blocks: bind every matrix of a block before it runs, for blocks that compute with them in ways of their
        own. Costs the memory of a block.
    :param dtype: to compute in. Default: the one that most bytes are stored in.
    :param cache: bytes to count for keys and values. Default: by the module's config, where it has one. Needed for
        recurrent layers, whose states and scans it has to hold as well.
    :param buffers: values of buffers that are on meta, in no checkpoint, and not computed by their own module.
    :param device, device_memory, runtime, progress: as for `PartialRun`.
    :raises BudgetError: before anything is loaded, where `memory` is too small.
    :raises ValueError: naming what does not fit: module and weights, their blocks, the mode.
    """
    return Offload(
        module, weights, memory=memory, rows=rows, context=context, tokens=tokens, blocks=blocks, whole_blocks=whole_blocks,
        dtype=dtype, cache=cache, buffers=buffers, device=device, device_memory=device_memory, runtime=runtime,
        progress=progress,
    )  # fmt: skip


class Offload:
    """A module whose weights come and go; made by `offload`. Closing it gives the module its own state back."""

    def __init__(
        self,
        module: nn.Module,
        weights: Any,
        *,
        memory: int | str | None,
        rows: int,
        context: int,
        tokens: int | None,
        blocks: str | Iterable[nn.Module] | None,
        whole_blocks: bool,
        dtype: torch.dtype | None,
        cache: int | str | None,
        buffers: Mapping[str, Tensor] | None,
        device: str | torch.device,
        device_memory: int | str | None,
        runtime: int | str | None,
        progress: Progress | None,
    ):
        for name, count in (("rows", rows), ("context", context), ("tokens", tokens)):
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{name}={count!r} has to be 1 or more, a whole number")
        if any(isinstance(parameter, Absent) for parameter in module.parameters()):
            raise ValueError(f"this {type(module).__name__} is offloaded already: close that first")
        _check_mode(module)
        check_experts(module)
        self.module = module
        self.blocks = tuple(found := find_blocks(module, blocks))  # their paths, in order
        self.stats = Stats()
        self._modules = tuple(found.values())
        self._device, self._progress = torch.device(device), progress
        tokens = max(rows, min(tokens or rows * context, rows * context))
        parts = parts_of(module, found)
        self._parts = tuple(parts)[1:-1]  # of the blocks, in the order in which they are called
        named = places(module, found)
        used = dict.fromkeys(part for part, _ in named.values())
        store = Tied(as_store(weights, {part: parts[part] for part in used}), module, named)
        survey = survey_blocks(module, found, store, dtype=dtype, context=context, whole_blocks=whole_blocks)
        self._model, self._attending = survey.model, attending(module, survey)
        self._attends_itself = attends_itself(module)
        computed = computed_buffers(module, buffers)
        self.plan = self._decide(store, survey, memory, rows, context, tokens, cache, device_memory, runtime)
        if self.plan.memory - self.plan.used < self.plan.caches:  # no room for the holes that keys and values leave
            give_freed_memory_back(largest_kept_nbytes(module, rows, context, self.plan.dtype))
        self._lock = threading.RLock()  # entered itself, as a stream's
        self._turn = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None  # in which a pass, or a block called by hand, is running
        self._calls = 0  # of the module, those within it, and blocks, that it is in
        self._passing = False
        self._next = 0  # the block that has to be called next
        self._closed = False
        self._opened = ExitStack()
        try:
            for name, tensor in computed.items():
                self._opened.enter_context(bound(module, name, tensor.to(self._device)))
            self._weights = BlockWeights(parts, store, survey, self.plan, self._device, progress)
            self._opened.callback(self._weights.close)
            self._wrap_forwards()
        except BaseException:
            self._opened.close()
            raise

    def close(self) -> None:
        """Give the module its own state back, end the threads, drop the weights. A second time it does nothing.

        A pass in another thread ends first, with an error where it needs more weights. Raises RuntimeError within a pass.
        """
        if self._thread is threading.current_thread():
            raise RuntimeError(
                f"a pass of this {type(self.module).__name__} is running in this very thread: close it after the pass"
            )
        self._closed = True
        self._weights.stop()
        with self._lock:
            self._turn.wait_for(lambda: self._thread is None)
        self._opened.close()

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decide(
        self,
        store: Any,
        survey: Survey,
        memory: int | str | None,
        rows: int,
        context: int,
        tokens: int,
        cache: int | str | None,
        device_memory: int | str | None,
        runtime: int | str | None,
    ) -> Plan:
        model = survey.model
        if device_memory is None and self._device.type == "cuda":
            device_memory = int(torch.cuda.mem_get_info(self._device)[0] * DEFAULT_SHARE)
        allowed = int(available() * DEFAULT_SHARE) if memory is None else parse_bytes(memory, "memory")
        counted = (
            measured_runtime(allowed, model.dtype) + MARGIN + FOREIGN + beside_weights(model, tokens, self._device)
            if runtime is None
            else parse_bytes(runtime, "runtime")
        )
        caches = cache_nbytes(self.module, rows, context, model.dtype) if cache is None else parse_bytes(cache, "cache")
        caches += copied_nbytes(self.module, rows, context, model.dtype)
        alone = max((unit.nbytes for unit in model.units), default=0)  # a slice that is read out of turn
        decided = decide(
            model,
            memory=allowed,
            runtime=counted,
            slack=SLACK if runtime is None else 0,
            page_tables=runtime is None,
            rows=rows,
            context=context,
            tokens=tokens,
            micro_batch=tokens,
            cache_nbytes=caches,
            cache_part_nbytes=caches,  # they are the module's own: they cannot go to disk
            transient=survey.whole_nbytes
            + survey.called_nbytes
            + alone
            + getattr(store, "transient_nbytes", 0)
            + rows * model.vocab_size * SAMPLING,
            device_memory=0 if device_memory is None else parse_bytes(device_memory, "device_memory"),
        )
        streamed = [unit for unit in model.units if unit not in decided.resident_units | decided.device_units]
        return replace(decided, read_rate=read_rate(store, streamed)) if streamed else decided

    # Passes: a call of the module, or of one within it that has the blocks

    def _wrap_forwards(self) -> None:
        """Forwards and not hooks: those are left out where a call is interrupted."""
        around = [
            child
            for path, child in self.module.named_modules()
            if not path or any(block.startswith(path + ".") for block in self.blocks)
        ]
        calls: list[tuple[nn.Module, Callable[..., Any]]] = [(child, self._pass) for child in around]
        calls += [(block, partial(self._block, i)) for i, block in enumerate(self._modules)]
        if self._attends_itself:
            beside = {child for outer in around for child in outer.children()} - {*around, *self._modules}
            calls += [(child, self._beside) for child in beside if any(True for _ in child.children())]
        for module, call in calls:
            forward = wraps(module.forward)(partial(call, module.forward))
            self._opened.enter_context(replaced_forward(module, forward))

    @contextmanager
    def _claim(self) -> Iterator[None]:
        """Refuse a second thread: the weights are where one pass is, and the plan counts the keys and values of one call."""
        thread = threading.current_thread()
        with self._lock:
            if self._closed:
                raise RuntimeError(
                    f"this {type(self.module).__name__} is offloaded no more: it was closed while it was called"
                )
            if self._thread not in (None, thread):
                raise RuntimeError(
                    f"a pass of this {type(self.module).__name__} is running in thread {self._thread.name!r}: "
                    "an offloaded module serves one call at a time, so hold a lock of your own around each"
                )
            self._thread = thread
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._thread = None
                    self._turn.notify_all()

    def _pass(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._claim():
            if self._passing:
                return forward(*args, **kwargs)
            check_labels(self.plan, self._model, kwargs.get("labels"))
            self._begin()
            self._passing, complete = True, False
            try:
                output = forward(*args, **kwargs)
                complete = self._next == len(self._modules)
                return output
            finally:
                self._passing = False
                self._end(complete=complete)

    def _begin(self) -> None:
        _check_mode(self.module)
        if self._device.type == "cpu":  # elsewhere `generate` itself chooses such a way for single tokens
            check_experts(self.module)
        self._weights.begin_pass()
        self._next = 0
        self._start, self._waited, self._read = time.perf_counter(), self._weights.waited, self._weights.bytes_read

    def _end(self, *, complete: bool) -> None:
        stats, waited = self.stats, self._weights.waited - self._waited
        stats.seconds_total += time.perf_counter() - self._start
        stats.seconds_waiting += waited
        stats.bytes_read += self._weights.bytes_read - self._read
        stats.passes += complete
        self._weights.end_pass(complete=complete)

    # Blocks

    def _block(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._claim():
            self._check(i, tensors := [*_tensors(args), *_tensors(kwargs)])
            if self._progress is not None:
                self._progress("pass", i, len(self._modules))
            with self._weights.bind_block(self._parts[i]):
                start, waited = time.perf_counter(), self._weights.waited
                with self._kernels(self._parts[i], tensors):
                    output = forward(*args, **kwargs)
                self.stats.seconds_computing += time.perf_counter() - start - (self._weights.waited - waited)
            if self._progress is not None and i + 1 == len(self._modules):
                self._progress("pass", i + 1, len(self._modules))
            refuse_gradients(self.blocks[i], *_tensors(output), of="output")  # they have begun inside
            return output

    @contextmanager
    def _kernels(self, part: str, tensors: list[Tensor]) -> Iterator[None]:
        """Without oneDNN's products for attention where a block attends by itself, in 16 bits on a CPU.

        oneDNN keeps about 0.7 MiB for each shape of a product, for ever, and attention has a new one with each token. ATen's
        kernels for bf16 keep nothing; for a single query they take less time than reading the weights, for more they are
        100 times slower than those for fp32.
        """
        x = tensors[0] if tensors else torch.empty(0)  # [rows, tokens, width]
        if not self._attends_itself or not makes_code(x):
            yield
            return
        one_token = x.dim() > 2 and x.shape[-2] == 1 and x.dtype == torch.bfloat16
        with without_onednn() if one_token and part in self._attending else InFp32():
            yield

    def _beside(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What has no blocks in it, and may attend by itself as they do: an encoder, which `generate` calls alone."""
        with InFp32():
            return forward(*args, **kwargs)

    def _check(self, i: int, tensors: list[Tensor]) -> None:
        if i == 0 and not self._passing:  # somebody calls the blocks by hand
            self._begin()
        if i != self._next:
            problem = "a second time in one pass" if i == self._next - 1 else f"where {self._name(self._next)} is next"
            raise RuntimeError(
                f"{self.blocks[i]} was called {problem}: each block has to be called once in a pass, in order. "
                "Give blocks= in the order in which they are called; a block that is called twice cannot be streamed"
            )
        refuse_gradients(self.blocks[i], *tensors)
        if i == 0 and tensors:
            self._check_tokens(tensors[0])
        self._next = i + 1

    def _check_tokens(self, x: Tensor) -> None:
        """x: [rows, tokens, width], what goes into the first block."""
        tokens = x.numel() // x.shape[-1] if x.dim() > 1 else 1
        self.stats.tokens += tokens
        if tokens > self.plan.tokens:
            raise ValueError(
                f"{tokens} tokens in one call are more than the {self.plan.tokens} that are planned for: "
                "give offload a larger tokens=, rows= or context="
            )

    def _name(self, i: int) -> str:
        return self.blocks[i] if i < len(self.blocks) else "the end of the pass"


def _tensors(values: Any) -> list[Tensor]:
    """Those among a module's arguments or results, also where it gives several."""
    several = (
        values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple | list) else [values]
    )
    return [value for value in several if isinstance(value, Tensor)]


def _check_mode(module: nn.Module) -> None:
    training = next((child for child in module.modules() if child.training), None)
    if training is not None:
        raise ValueError(
            f"{type(training).__name__} is in training mode, and offloading is for inference: call its eval() first"
        )
