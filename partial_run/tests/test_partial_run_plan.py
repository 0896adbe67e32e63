"""The plan is a pure function: it never exceeds the memory, names the smallest, and spreads what stays evenly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from llm_partial_run import BudgetError, PartialRun, plan
from llm_partial_run._plan import LEAST, decide
from llm_partial_run._units import SLICE, Model, Unit, _slices

MIB = 1 << 20
UNITS = tuple(Unit(f"mid.{i:05d}", "weight", j, j + 1, 16 * MIB, 16 * MIB) for i in range(20) for j in range(10))
MODEL = Model(
    units=UNITS, experts=(), kept=(), kept_nbytes=MIB, gathered_nbytes=100 * MIB, stored_nbytes=3301 * MIB, dtype=torch.bfloat16,
    converted=False, vocab_size=1000, hidden_size=64, widths=1000,
)  # fmt: skip


def test_no_budget_is_exceeded_and_more_memory_never_streams_more():
    streamed = None
    for memory in range(400 * MIB, 4000 * MIB, 50 * MIB):
        plan = decide(MODEL, memory=memory, runtime=300 * MIB)
        assert plan.used <= memory
        assert streamed is None or plan.streamed <= streamed
        streamed = plan.streamed
    assert streamed == 0


def test_less_than_a_slice_and_a_page_of_the_budget_stays_unused():
    plan = decide(MODEL, memory=2000 * MIB, runtime=300 * MIB)
    assert 2000 * MIB - plan.used < 16 * MIB


def test_what_stays_is_spread_evenly_between_what_is_streamed():
    plan = decide(MODEL, memory=2000 * MIB, runtime=300 * MIB)
    stays = [unit in plan.resident_units for unit in UNITS]
    share = sum(stays) / len(stays)
    for start in range(0, 190, 10):
        assert abs(sum(stays[start : start + 10]) - 10 * share) <= 1


def test_the_smallest_budget_works_and_one_byte_less_does_not():
    with pytest.raises(BudgetError) as refused:
        decide(MODEL, memory=0, runtime=300 * MIB)
    smallest = refused.value.smallest
    assert decide(MODEL, memory=smallest, runtime=300 * MIB).smallest == smallest
    with pytest.raises(BudgetError, match="too small"):
        decide(MODEL, memory=smallest - 1, runtime=300 * MIB)


@pytest.mark.parametrize("runtime", [300 * MIB, 300 * MIB + 17, 200_000 * MIB + 511])
def test_the_smallest_budget_does_not_depend_on_the_one_that_was_asked_for(runtime):
    with pytest.raises(BudgetError) as refused:
        decide(MODEL, memory=0, runtime=runtime, page_tables=True)
    smallest = refused.value.smallest
    for memory in (smallest, smallest + 1, 4 * smallest):
        plan = decide(MODEL, memory=memory, runtime=runtime, page_tables=True)
        assert plan.smallest == smallest
        assert plan.runtime == runtime + memory // 512
    with pytest.raises(BudgetError, match="too small"):
        decide(MODEL, memory=smallest - 1, runtime=runtime, page_tables=True)


def test_what_each_slice_that_stays_takes_beside_its_bytes_is_counted():
    plain, real = (decide(MODEL, memory=2000 * MIB, runtime=300 * MIB, page_tables=known) for known in (False, True))
    assert real.ring == plain.ring + 8192 * len(real.resident_units)  # pages at both ends
    for decided in (plain, real):
        assert decided.resident == 16 * MIB * len(decided.resident_units)
        assert decided.used <= 2000 * MIB


def test_the_smallest_budget_of_the_default_works_and_is_the_one_that_an_error_names(toy):
    smallest = plan(toy.parts(), toy.store).smallest
    with pytest.raises(BudgetError) as refused:
        plan(toy.parts(), toy.store, memory=1)
    assert abs(smallest - refused.value.smallest) <= 2 * MIB  # what the process has in use moves a little
    with PartialRun(toy.parts(), toy.store, memory=smallest) as run:
        assert run.plan.memory == smallest
        assert run.forward(torch.tensor([[1, 2, 3]])).shape == (1, 3, 96)
    with pytest.raises(BudgetError):
        plan(toy.parts(), toy.store, memory=smallest - 16 * MIB)


def test_the_computing_dtype_is_that_of_most_bytes_in_every_range(toy):
    weights = {
        part: {name: tensor.bfloat16() if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
        for part, tensors in toy.weights.items()
    }
    parts = toy.parts()
    for chosen in (list(parts), list(parts)[:4], list(parts)[4:], ["end"]):
        decided = plan({part: parts[part] for part in chosen}, weights.__getitem__, memory="1GiB", **toy.BUDGET)
        assert decided.dtype == torch.bfloat16
    weights = toy.weights | {"begin": {"embed.weight": toy.weights["begin"]["embed.weight"].half()}}
    assert plan(parts, weights.__getitem__, memory="1GiB", **toy.BUDGET).dtype == torch.float32


def test_caches_count_and_go_to_disk_where_they_do_not_fit_or_are_sent():
    kwargs: dict[str, Any] = dict(memory=2000 * MIB, runtime=300 * MIB, rows=8, cache_part_nbytes=100 * MIB)
    beside = decide(MODEL, cache_nbytes=500 * MIB, **kwargs)
    assert (beside.caches, beside.spilled) == (500 * MIB, 0)
    spilled = decide(MODEL, cache_nbytes=2000 * MIB, **kwargs)
    assert (spilled.caches, spilled.spilled) == (100 * MIB, 2000 * MIB)
    assert spilled.used <= 2000 * MIB
    chosen = decide(MODEL, cache_nbytes=500 * MIB, spill=True, **kwargs)
    assert (chosen.caches, chosen.spilled) == (100 * MIB, 500 * MIB)
    assert chosen.streamed < beside.streamed


@pytest.mark.parametrize("converted", [False, True])
def test_routed_experts_have_slots_in_every_budget_that_does_not_hold_them_all(converted):
    experts = tuple(Unit(f"mid.00000/experts.{i:05d}", "up.weight", 0, 1, MIB, MIB) for i in range(64))
    model = replace(MODEL, units=UNITS[:20], experts=experts, converted=converted, wanted_nbytes=2 * MIB)
    least = decide(model, memory=10_000 * MIB, runtime=0).smallest
    for memory in range(least, least + 400 * MIB, MIB // 2):
        plan = decide(model, memory=memory, runtime=0)
        assert plan.used <= memory
        assert plan.expert_slots >= LEAST or not plan.streamed + plan.wanted


def test_passes_of_more_tokens_than_a_micro_batch_hold_a_layer_in_the_ring():
    assert decide(MODEL, memory=2000 * MIB, runtime=300 * MIB, tokens=10_000).ring >= 160 * MIB


def test_as_many_tokens_as_a_pass_may_have_go_through_a_layer_at_once_up_to_256():
    for tokens, at_once in ((None, 128), (5, 5), (200, 200), (10_000, 256)):
        assert decide(MODEL, memory=4000 * MIB, runtime=300 * MIB, tokens=tokens).micro_batch == at_once
    routed = replace(MODEL, experts=(Unit("mid.00000/experts.00000", "up.weight", 0, 1, MIB, MIB),))
    assert decide(routed, memory=4000 * MIB, runtime=300 * MIB, tokens=1000).micro_batch == 1000


@pytest.mark.parametrize(
    ("width", "rows"),
    [(100, 4096), (1600, 4096), (3200, 8640), (8640, 3200), (14336, 14336), (53248, 16384), (3 << 20, 7)],
)
def test_slices_have_numbers_of_rows_that_matrix_kernels_are_made_for(width, rows):
    nbytes = width * rows * 2
    slices = _slices("mid.00000", "up.weight", rows, nbytes, 2 * nbytes)
    assert [unit.start for unit in slices[1:]] == [unit.stop for unit in slices[:-1]]
    assert (slices[0].start, slices[-1].stop) == (0, rows)
    assert sum(unit.nbytes for unit in slices) == nbytes == sum(unit.kept_nbytes for unit in slices) // 2
    step = slices[0].stop
    if len(slices) > 1 and step > 1:
        assert 0.66 * SLICE < slices[0].nbytes < 1.34 * SLICE
        assert step % (128 if step > 127 else 64 if step > 63 else 16) == 0


def test_a_large_vocabulary_is_not_held_in_the_ring():
    head = tuple(Unit("end", "lm_head.weight", j, j + 1, 16 * MIB, 16 * MIB) for j in range(60))
    sizes = [
        decide(replace(MODEL, units=units), memory=2000 * MIB, runtime=300 * MIB, tokens=10_000).ring
        for units in (UNITS, UNITS + head)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", ["rows", "context", "tokens", "micro_batch"])
@pytest.mark.parametrize("count", [0, -3, 1.5, "x"])
def test_a_count_that_is_none_is_refused_by_name(toy, name, count):
    wrong: dict[str, Any] = {name: count}
    with pytest.raises(ValueError, match=f"{name}={count!r} has to be 1 or more, a whole number"):
        plan(toy.parts(), toy.store, **wrong)


@pytest.mark.parametrize("name", ["memory", "runtime", "device_memory"])
@pytest.mark.parametrize("size", [-1, "4 gigs", "-1GiB", 1.5, True, float("nan")])
def test_a_size_that_is_none_is_refused_by_name(toy, name, size):
    wrong: dict[str, Any] = {"memory": "1GiB"} | {name: size}
    with pytest.raises(ValueError, match=f"{name}={size!r} is no size: write it like '4GiB'"):
        plan(toy.parts(), toy.store, **wrong)


def test_device_memory_is_filled_first_then_pinned_memory_then_disk():
    plan = decide(MODEL, memory=1500 * MIB, runtime=300 * MIB, device_memory=1000 * MIB)
    assert 800 * MIB < plan.device <= 1000 * MIB
    assert plan.host > 1000 * MIB
    assert plan.device + plan.host + plan.streamed == 3200 * MIB
    assert plan.device_units.isdisjoint(plan.resident_units)


def test_caches_on_disk_are_reckoned_half_full_in_what_a_pass_reads():
    chosen = decide(
        MODEL, memory=2000 * MIB, runtime=300 * MIB, cache_nbytes=500 * MIB, cache_part_nbytes=100 * MIB, spill=True,
        read_rate=100 * MIB,
    )  # fmt: skip
    assert chosen.read_per_pass == chosen.streamed + 250 * MIB == chosen.as_dict()["read_per_pass"]
    assert chosen.seconds_per_pass == chosen.read_per_pass / (100 * MIB)
    assert f"{chosen.seconds_per_pass:.2f} s at the" in str(chosen)


def test_the_table_names_every_use_of_the_memory():
    text = str(decide(MODEL, memory=2000 * MIB, runtime=300 * MIB, read_rate=1e9))
    for line in ("memory", "runtime", "weights resident", "buffers", "caches", "activations", "read per pass"):
        assert line in text
    assert "s at the 1.00 GB/s measured" in text
    text = str(
        decide(replace(MODEL, units=(), experts=UNITS, wanted_nbytes=48 * MIB), memory=2000 * MIB, runtime=300 * MIB)
    )
    assert "ends of pages" in text  # there are no slots but those of experts
    assert "and up to 48.0 MiB of experts for each token" in text
