"""What stays in memory, what is streamed, and what both cost: decided before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch

from ._memory import format_bytes
from ._products import AT_ONCE
from ._units import Model, Unit

READERS = 4  # reads in flight: what disks need to be busy while one of them has just ended
LEAST = READERS + 1  # slots of the ring: those being read, and the one being computed
AHEAD = READERS + 5  # where memory allows: so many more that reading goes on while the computation stands still
PAGE_TABLES = 512  # bytes of memory to one of page tables: 8 for each 4 KiB
ENDS = 2 * 4096  # of a slice that stays: it is read in whole pages, and its tensor is an object
MICRO_BATCH = 128  # tokens that go through a layer at once: nearly enough for matrix kernels, little beside the weights


class BudgetError(ValueError):
    """The memory is too small. `smallest` is the number of bytes that would do."""

    def __init__(self, message: str, smallest: int):
        super().__init__(message)
        self.smallest = smallest


@dataclass(frozen=True)
class Plan:
    """Where every byte goes. Sizes in bytes; `print(plan)` shows it as a table."""

    memory: int  # what the whole process may use
    runtime: int  # Python, torch and its kernels, and a margin
    kept: int  # weights that always stay: norms, biases
    resident: int  # slices of matrices that stay
    experts: int  # slots for slices of routed experts: those used most stay in them
    wanted: int  # bytes of routed experts that one token is sent to: at most so many are read for it
    ring: int  # slots that the streamed slices are read into, and the ends of the pages of those that stay
    caches: int  # keys and values in memory
    spilled: int  # keys and values on disk, read for each pass
    activations: int
    stored: int  # all weights, as stored
    streamed: int  # bytes of weights read from disk in each pass; of routed experts what is absent comes to that
    host: int  # with a device: slices in pinned host memory, copied in each pass
    device: int  # with a device: slices that stay there
    device_memory: int
    smallest: int  # the least `memory` that works
    rows: int
    context: int
    tokens: int  # tokens that one pass over the weights computes at most
    micro_batch: int  # tokens that go through a layer at once
    slots: int
    slot_nbytes: int
    expert_slots: int
    expert_slot_nbytes: int
    device_slots: int
    dtype: torch.dtype
    read_rate: float | None  # bytes per second, measured
    resident_units: frozenset[Unit] = field(repr=False)
    device_units: frozenset[Unit] = field(repr=False)

    @property
    def used(self) -> int:
        """Bytes of host memory that the plan counts on."""
        weights = self.kept + self.resident + self.host + self.ring + self.experts
        return self.runtime + weights + self.caches + self.activations

    @property
    def read_per_pass(self) -> int:
        """Bytes read from disk in a pass, with caches on disk half full, as they are on average while rows grow."""
        return self.streamed + self.spilled // 2

    @property
    def seconds_per_pass(self) -> float | None:
        """What reading costs: the least time of a pass, at the measured rate."""
        return (self.read_per_pass / self.read_rate) if self.read_rate else None

    def as_dict(self) -> dict[str, int | float | str | None]:
        """The plan for a script: bytes, counts, the dtype's name."""
        skipped = ("resident_units", "device_units", "dtype")
        plain = {name: value for name, value in vars(self).items() if name not in skipped}
        return plain | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "used": self.used,
            "read_per_pass": self.read_per_pass,
            "seconds_per_pass": self.seconds_per_pass,
        }

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            (
                "memory",
                self.memory,
                "for the whole process" if self.runtime else "for the model, beside Python and torch",
            ),
            ("runtime", self.runtime, "Python, torch, its kernels and a margin"),
            ("weights resident", self.kept + self.resident, f"of {format_bytes(self.stored)}, computing in {dtype}"),
            ("buffers", self.ring, _slots(self)),
            ("caches", self.caches, f"keys and values, {self.rows} rows of {self.context} tokens"),
            ("activations", self.activations, f"{self.tokens} tokens a pass, {self.micro_batch} at once"),
        ]
        if self.experts:
            note = f"{self.expert_slots} slots of {format_bytes(self.expert_slot_nbytes)} for those used most"
            lines.insert(3, ("experts", self.experts, note))
        if self.device_memory:
            lines.append(("weights on device", self.device, f"of {format_bytes(self.device_memory)} device memory"))
            lines.append(("weights pinned", self.host, "in host memory, copied in each pass"))
        if self.spilled:
            lines.append(("caches on disk", self.spilled, "what is in use is read in each pass; half of it, below"))
        lines.append(("read per pass", self.read_per_pass, _pace(self)))
        return "\n".join(f"{name:<18}{format_bytes(size):>11}   {note}" for name, size, note in lines)


def decide(
    model: Model,
    *,
    memory: int,
    runtime: int,
    rows: int = 1,
    context: int = 2048,
    tokens: int | None = None,
    micro_batch: int | None = None,
    cache_nbytes: int = 0,
    cache_part_nbytes: int = 0,
    spill: bool = False,
    transient: int = 0,
    device_memory: int = 0,
    slack: int = 0,
    page_tables: bool = False,
    read_rate: float | None = None,
) -> Plan:
    """The plan for a surveyed model: pure, the same answer for the same numbers.

    One pass after another reads the same units in the same order. For such a scan a least-recently-used cache hits
    nothing; the best is a fixed set that stays, spread evenly so that computing it hides the reading of the others.

    :param runtime: bytes in use before anything is loaded, and the margin for what no formula counts.
    :param page_tables: count what they take of `memory` beside that, whatever it is.
    :param slack: added to the smallest that is named, since another process's runtime differs by a little.
    :param tokens: tokens that one pass may compute, of the rows * context that there can be. More than go through a layer
        at once hold the layer's streamed slices in the ring until all have passed, so that each is read once. Default:
        `micro_batch`, or 128.
    :param micro_batch: tokens that go through a layer at once. Default: `tokens`, up to 256. With routed experts it is
        always `tokens`, as another micro-batch would read the experts again.
    :param cache_nbytes: keys and values of all layers, rows and slots; `cache_part_nbytes`: of the largest layer.
        They go to disk where they do not fit beside the rest; with `spill` wherever they would be.
    :param transient: bytes that loading a part takes for a while.
    :raises BudgetError: where `memory` is too small; it names the smallest that works.
    """
    micro_batch = micro_batch or min(tokens or MICRO_BATCH, AT_ONCE)
    tokens = max(min(tokens or micro_batch, rows * context), rows)
    micro_batch = tokens if model.experts else min(tokens, micro_batch)
    slot, expert_slot = _slot(model.units), _slot(model.experts)
    held = Counter(unit.part for unit in model.units if unit.part != "end") if tokens > micro_batch else Counter()
    slots = min(LEAST + max(held.values(), default=0), len(model.units))  # a slot holds one unit, however small
    expert_slots = min(LEAST, len(model.experts))
    units = model.units + model.experts
    convert = 2 * max((unit.kept_nbytes for unit in units), default=0) if model.converted else 0
    ring = slots * slot + convert
    least = ring + expert_slots * expert_slot
    activations = _activations(model, rows, context, tokens, micro_batch)
    ends = ENDS if page_tables else 0
    everything = _kept(units, ends)
    on_device: frozenset[Unit] = frozenset()
    if device_memory:
        beside = slots * slot + model.kept_nbytes + cache_nbytes + activations  # what it holds besides slices
        if beside > device_memory:
            raise ValueError(
                f"device_memory={format_bytes(device_memory)} is too small: {format_bytes(beside)} are needed beside the weights, "
                f"{format_bytes(cache_nbytes)} of them for caches of {rows} rows of {context} tokens"
            )
        on_device = _spread(units, device_memory - beside, ends)
        if not on_device.issuperset(model.experts):
            raise ValueError(
                f"device_memory={format_bytes(device_memory)} does not hold all {format_bytes(everything + beside)}: routed "
                "experts are streamed only where the computing is on the CPU; leave device= out, or give it more memory"
            )
        cache_nbytes = cache_part_nbytes = 0
    left = [unit for unit in units if unit not in on_device]

    least_runtime = runtime
    runtime += memory // PAGE_TABLES if page_tables else 0
    floor = runtime + model.kept_nbytes + activations + transient + min(least, everything)
    smallest = least_runtime + floor - runtime + min(cache_nbytes, cache_part_nbytes)
    if page_tables:  # the least m with m - m // PAGE_TABLES >= smallest
        smallest += (smallest - 1) // (PAGE_TABLES - 1)
    if slack:
        smallest = -(-(smallest + slack) // 2**20) * 2**20
    if memory < floor + min(cache_nbytes, cache_part_nbytes):
        raise BudgetError(
            f"memory={format_bytes(memory)} is too small: the smallest that works is {_exactly(smallest)} "
            f"({format_bytes(runtime)} runtime, {format_bytes(model.kept_nbytes)} weights that always stay, "
            f"{format_bytes(min(least, everything))} buffers, {format_bytes(min(cache_nbytes, cache_part_nbytes))} caches for "
            f"{rows} rows of {context} tokens, {format_bytes(activations)} activations)",
            smallest,
        )
    spill = cache_nbytes > 0 and (spill or memory < floor + cache_nbytes)
    caches = cache_part_nbytes if spill else cache_nbytes
    free = memory - (floor - min(least, everything)) - caches
    if _kept(left, ends) <= free:
        resident, expert_slots = frozenset(left), 0
    else:  # experts last: the others are needed in each pass
        left = [unit for unit in model.units if unit not in on_device]
        if slot and not device_memory:
            more = min(AHEAD - LEAST, len(model.units) - slots, (free - least) // slot)
            slots, ring, least = slots + more, ring + more * slot, least + more * slot
        fits = model.experts and _kept(left, ends) <= free - (least - ring) - convert
        resident = frozenset(left) if fits else _spread(left, free - least, ends)
    streamed = [unit for unit in left if unit not in resident]
    host, host_ends = _kept(resident, 0), ends * len(resident)
    ring = ring if streamed else convert if expert_slots else 0
    if expert_slots:
        expert_slots = min(len(model.experts), (free - host - host_ends - ring) // expert_slot)
    return Plan(
        memory=memory,
        runtime=runtime,
        kept=model.kept_nbytes,
        resident=0 if device_memory else host,
        experts=expert_slots * expert_slot,
        wanted=model.wanted_nbytes if expert_slots else 0,
        ring=ring + transient + host_ends,
        caches=caches,
        spilled=cache_nbytes if spill else 0,
        activations=activations,
        stored=model.stored_nbytes,
        streamed=sum(unit.nbytes for unit in streamed),
        host=host if device_memory else 0,
        device=_kept(on_device, ends),
        device_memory=device_memory,
        smallest=smallest,
        rows=rows,
        context=context,
        tokens=tokens,
        micro_batch=micro_batch,
        slots=slots if streamed else 0,
        slot_nbytes=slot,
        expert_slots=expert_slots,
        expert_slot_nbytes=expert_slot,
        device_slots=slots if device_memory and left else 0,
        dtype=model.dtype,
        read_rate=read_rate,
        resident_units=resident,
        device_units=on_device,
    )


def _slot(units: Iterable[Unit]) -> int:
    return max((unit.nbytes for unit in units), default=0) + 2 * 4096  # reads begin and end at page bounds


def _kept(units: Collection[Unit], ends: int) -> int:
    return sum(unit.kept_nbytes for unit in units) + ends * len(units)


def _exactly(size: int) -> str:
    return f"{size} bytes" if size % 2**20 else f"{size >> 20}MiB"


def _spread(units: tuple[Unit, ...] | list[Unit], budget: int, ends: int) -> frozenset[Unit]:
    """As many units as the budget holds, evenly between the others; then what still fits."""
    total = _kept(units, ends)
    share = min(1.0, max(0, budget) / total) if total else 0.0
    chosen: list[Unit] = []
    due = 0.0
    for unit in units:
        due += share * (unit.kept_nbytes + ends)
        if due >= unit.kept_nbytes + ends:
            due -= unit.kept_nbytes + ends
            chosen.append(unit)
    spare = budget - _kept(chosen, ends)
    kept = set(chosen)
    for unit in units:
        if unit not in kept and unit.kept_nbytes + ends <= spare:
            kept.add(unit)
            spare -= unit.kept_nbytes + ends
    return frozenset(kept)


def _activations(model: Model, rows: int, context: int, tokens: int, micro_batch: int) -> int:
    """An upper bound: all Linears' outputs of a layer at once, norms in fp32, a mask, and the logits that are read."""
    size = model.dtype.itemsize
    per_token = model.widths * 2 * size + model.hidden_size * (4 * size + 3 * 4) + 6 * context
    carried = 3 * tokens * model.hidden_size * size
    logits = 2 * rows * model.vocab_size * 4
    return micro_batch * per_token + carried + logits


def _slots(plan: Plan) -> str:
    return f"{plan.slots} slots of {format_bytes(plan.slot_nbytes)} to read into" if plan.slots else "ends of pages"


def _pace(plan: Plan) -> str:
    if not plan.streamed and not plan.wanted:
        return "everything is resident"
    seconds = plan.seconds_per_pass
    pace = f"{seconds:.2f} s at the {plan.read_rate / 1e9:.2f} GB/s measured" if seconds and plan.read_rate else ""
    experts = f"and up to {format_bytes(plan.wanted)} of experts for each token" if plan.wanted else ""
    return f"{pace}, {experts}" if pace and experts else pace or experts
