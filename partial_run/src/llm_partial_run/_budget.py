"""The memory that there is, measured, and the plan for it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ._caches import may_hold
from ._memory import available, measured_runtime, parse_bytes
from ._plan import MICRO_BATCH, Plan, decide
from ._products import kernels_nbytes
from ._stores import as_store, read_rate
from ._units import Model, in_order, survey

DEFAULT_SHARE = 0.9  # of what is free, where no `memory` is given
INDEX = 400  # bytes for each token whose prefix is known
OBJECTS = 320  # bytes for each slice: what Python has to say of it
MARGIN = 16 << 20  # what no formula counts: holes in the heap, the kernels' scratch memory
WORTH = 0.95  # of what is read with the caches in memory: caches may go to disk where less is read with them there
WAIT = 1 << 20  # bytes that the disk could give while a pass waits for one row of keys or values to be read or written
SLACK = 8 << 20  # between the runtimes of two processes that do the same


def plan(
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
) -> Plan:
    """What `PartialRun` with the same arguments would do; reads no more than to measure the disk for a moment.

    Keys and values are on disk where they do not fit in memory. Where `spill` is given, they go there also where that
    takes less time: the memory that they would fill holds weights then, and of what is on disk only the slots in use are
    read. It is reckoned with half of them in use.

    :raises BudgetError: where `memory` is too small; its `smallest` is the number of bytes that works.
    """
    for name, count in (("rows", rows), ("context", context), ("tokens", tokens), ("micro_batch", micro_batch)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{name}={count!r} has to be 1 or more, a whole number")
    parts = in_order(parts)
    store, device = as_store(weights, parts), torch.device(device)
    model = survey(parts, store, dtype)
    if device_memory is None and device.type == "cuda":
        device_memory = int(torch.cuda.mem_get_info(device)[0] * DEFAULT_SHARE)
    allowed = int(available() * DEFAULT_SHARE) if memory is None else parse_bytes(memory, "memory")
    if runtime is None:
        counted = measured_runtime(allowed, model.dtype) + MARGIN + rows * context * INDEX
        counted += beside_weights(model, max(rows, min(tokens or micro_batch or MICRO_BATCH, rows * context)), device)
    else:
        counted = parse_bytes(runtime, "runtime")
    by_layer = [
        module.new_cache(rows, context + 1, dtype=model.dtype, device="meta")  # pyright: ignore
        for module in parts.values()
        if hasattr(module, "new_cache")
    ]
    per_layer = [sum(tensor.nbytes for tensor in layer) for layer in by_layer]
    sizes: dict[str, Any] = dict(
        memory=allowed,
        runtime=counted,
        slack=SLACK if runtime is None else 0,
        page_tables=runtime is None,
        rows=rows,
        context=context,
        tokens=tokens,
        micro_batch=micro_batch,
        cache_nbytes=sum(per_layer),
        cache_part_nbytes=max(per_layer, default=0) + rows * mmap.PAGESIZE * 4,
        transient=getattr(store, "transient_nbytes", 0),
        device_memory=0 if device_memory is None else parse_bytes(device_memory, "device_memory"),
    )
    decided = decide(model, **sizes)
    alike = len(set(per_layer)) == 1  # as caches on disk have to be
    if spill is not None and decided.streamed and alike and may_hold(spill, decided.caches):
        on_disk = decide(model, **sizes, spill=True)
        waits = 2 * rows * sum(map(len, by_layer))
        if on_disk.read_per_pass + waits * WAIT < WORTH * decided.read_per_pass:
            decided = on_disk
    streamed = [
        unit for unit in model.units + model.experts if unit not in decided.resident_units | decided.device_units
    ]
    return replace(decided, read_rate=read_rate(store, streamed)) if streamed else decided


def beside_weights(model: Model, rows: int, device: torch.device) -> int:
    """Bytes that a model's slices take beside themselves: as objects, and by products of up to so many rows with them."""
    units = model.units + model.experts
    shapes = {(unit.stop - unit.start, unit.kept_nbytes) for unit in units} if device.type == "cpu" else ()
    return OBJECTS * len(units) + kernels_nbytes(len(shapes), rows, model.dtype)
