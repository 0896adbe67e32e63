"""Routed experts under a budget: the same bits, and read only where they are wanted and absent."""

from __future__ import annotations

import functools
import random
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_partial_run import BudgetError, PartialRun, plan
from llm_partial_run._experts import Experts
from llm_partial_run._units import Unit

BUDGET: dict[str, Any] = dict(rows=2, context=24, runtime=0)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]]


def smallest(toy) -> int:
    with pytest.raises(BudgetError) as refused:
        plan(toy.parts(), toy.store, memory=1, **BUDGET)
    return refused.value.smallest


def decode(run: PartialRun, steps: int = 6) -> list[Tensor]:
    ids, logits = torch.tensor(PROMPTS), []
    for _ in range(steps):
        logits.append(run.forward.last_logits(ids, torch.full((2,), ids.shape[1])))
        ids = torch.cat([ids, logits[-1].argmax(-1)], dim=1)
    return logits


def announced(run: PartialRun) -> list[list[int]]:
    """What the layers announce from now on, one entry for each call of a layer."""
    log: list[list[int]] = []

    def logged(own: Any, chosen: list[int]) -> None:
        log.append(chosen)
        own(chosen)

    part: Any
    for part in run.parts.values():
        if hasattr(part, "routed"):
            part.experts.announce = functools.partial(logged, part.experts.announce)
    return log


def test_every_budget_from_the_smallest_to_everything_gives_the_same_bits(routed_toy):
    with PartialRun(routed_toy.parts(), routed_toy.store, memory="1GiB", **BUDGET) as run:
        assert run.plan.expert_slots == run.plan.streamed == 0
        expected = decode(run)
    least = smallest(routed_toy)
    everything = run.plan.used
    for memory in range(least, everything, (everything - least) // 5):
        with PartialRun(routed_toy.parts(), routed_toy.store, memory=memory, **BUDGET) as run:
            assert run.plan.used <= memory
            assert run.plan.expert_slots > 0
            for ours, theirs in zip(decode(run), expected, strict=True):
                assert torch.equal(ours, theirs)
    for prompt, logits in zip(PROMPTS, expected[0], strict=True):
        torch.testing.assert_close(logits[0], routed_toy.resident_logits(prompt)[-1], atol=2e-5, rtol=0)


def test_a_prefill_reads_each_expert_at_most_once(routed_toy):
    with PartialRun(routed_toy.parts(), routed_toy.store, memory=smallest(routed_toy), **BUDGET) as run:
        run.forward.last_logits(torch.arange(48).view(2, 24), torch.full((2,), 24))
        everything = sum(unit.nbytes for unit in run._model.experts)
        assert run.stats.passes == 1
        assert everything / 2 < run._weights.expert_bytes_read <= everything


def test_a_decode_reads_no_expert_that_nobody_is_sent_to(routed_toy):
    memory = smallest(routed_toy) + (250 << 10)  # and the caches
    with PartialRun(routed_toy.parts(), routed_toy.store, memory=memory, **BUDGET) as run:
        assert not run.plan.spilled
        decode(run, 1)
        before = run.stats.bytes_read
        run.forward.last_logits(torch.tensor([[*PROMPTS[0], 8]]), torch.tensor([8]))
        assert run.plan.wanted == 2 / 8 * sum(unit.nbytes for unit in run._model.experts)
        expert = sum(
            t.nbytes
            for n, t in routed_toy.weights["mid.00000"].items()
            if n.startswith("experts.0.") and "bias" not in n
        )
        read = run.stats.bytes_read - before - run.plan.streamed - 32 * 4  # a row of the embedding
        assert 0 < read <= 20 * 2 * expert


GROWN = {
    "rows between them idle": {0: 1, 7: 1},
    "short rows beside a long one": {row: 13 if row == 5 else 1 for row in range(8)},
}


@pytest.mark.parametrize("grown", GROWN.values(), ids=GROWN)
@pytest.mark.parametrize("on_disk", [True, False])
def test_nothing_is_read_for_idle_rows_and_padding(routed_toy, tmp_path, grown, on_disk):
    ids = torch.randint(96, (8, 40), generator=torch.Generator().manual_seed(1))
    before, after = torch.full((8,), 20), torch.tensor([20 + tokens for tokens in grown.values()])
    budget: dict[str, Any] = BUDGET | dict(rows=8, context=40, dtype=torch.float64, spill=tmp_path)  # fp64: no ties
    with pytest.raises(BudgetError) as refused:
        plan(routed_toy.parts(), routed_toy.store, memory=1, **budget)
    memory = refused.value.smallest + (0 if on_disk else 4 << 20)
    with PartialRun(routed_toy.parts(), routed_toy.store, memory=memory, **budget) as run:
        assert (run.plan.spilled > 0) == on_disk
        assert run.plan.expert_slots > 0
        run.forward.last_logits(ids[:, :20], before)
        wanted = announced(run)
        together = run.forward.last_logits(ids[list(grown)], after)
        read = [set(chosen) for chosen in wanted]

    needed: list[set[int]] = [set() for _ in read]
    with PartialRun(routed_toy.parts(), routed_toy.store, memory=memory, **budget) as run:
        for row, length, logits in zip(grown, after.tolist(), together, strict=True):
            run.forward.last_logits(ids[row : row + 1, :20], before[:1])
            wanted = announced(run)
            alone = run.forward.last_logits(ids[row : row + 1], torch.tensor([length]))
            needed = [known | set(chosen) for known, chosen in zip(needed, wanted, strict=True)]
            torch.testing.assert_close(logits, alone[0], atol=1e-8, rtol=0)
    assert read == needed


def test_experts_that_stay_are_not_read_again(routed_toy):
    with PartialRun(routed_toy.parts(), routed_toy.store, memory="1GiB", **BUDGET) as run:
        everything = run.plan.used
    with PartialRun(routed_toy.parts(), routed_toy.store, memory=int(everything * 0.97), **BUDGET) as run:
        ids = torch.tensor([[3]])
        run(ids)
        before = run.stats.bytes_read
        run(ids)
        assert run.stats.bytes_read - before == 32 * 4  # a row of the embedding


def test_a_missing_expert_is_named_before_anything_is_loaded(routed_toy):
    del routed_toy.store._at["mid.00003/experts.00005", "up.weight"]
    with pytest.raises(ValueError, match=r"mid\.00003/experts\.00005: the weights have no 'up.weight'"):
        PartialRun(routed_toy.parts(), routed_toy.store, memory="1GiB", **BUDGET)


def test_an_error_in_the_middle_reaches_the_caller_and_the_next_pass_is_right(routed_toy):
    with PartialRun(routed_toy.parts(), routed_toy.store, memory=smallest(routed_toy), **BUDGET) as run:
        expected = run(torch.tensor(PROMPTS))
        for reads in (3, 40, 120):
            routed_toy.store.fail_after = routed_toy.store.reads + reads
            with pytest.raises(OSError, match="the disk is gone"):
                run(torch.tensor(PROMPTS))
            routed_toy.store.fail_after = None
            assert torch.equal(run(torch.tensor(PROMPTS)), expected)
    assert not [t for t in threading.enumerate() if t.name.startswith("llm_partial_run")]


def test_modules_get_their_own_announcement_back(routed_toy):
    parts = routed_toy.parts()
    with PartialRun(parts, routed_toy.store, memory=smallest(routed_toy), **BUDGET):
        assert "announce" in vars(parts["mid.00000"].experts)
    assert "announce" not in vars(parts["mid.00000"].experts)


# The slots alone

UNITS = {
    f"mid.{layer}/experts.{expert}": [Unit(f"mid.{layer}/experts.{expert}", "weight", i, i + 1, 1, 1) for i in range(3)]
    for layer in range(2)
    for expert in range(4)
}


class Reader:
    def __init__(self) -> None:
        self.read: list[Unit] = []

    def __call__(self, unit: Unit, slot: Tensor) -> Tensor:
        self.read.append(unit)
        time.sleep(random.random() / 5000)
        return slot.fill_(hash(unit) % 251)


def use(experts: Experts, layer: str, chosen: list[int]) -> None:
    units = [unit for expert in chosen for unit in UNITS[f"{layer}/experts.{expert}"]]
    experts.announce(layer, units)
    for unit in units:
        assert experts.take(unit).item() == hash(unit) % 251
        experts.release(unit)


@pytest.mark.parametrize("slots", [3, 4, 7, 13, 24])
def test_any_number_of_slots_serves_any_choice_without_a_hang(slots):
    reader = Reader()
    experts = Experts([torch.zeros(1, dtype=torch.uint8) for _ in range(slots)], reader, threads=2)
    rng = random.Random(0)
    for _ in range(150):
        use(experts, f"mid.{rng.randrange(2)}", sorted(rng.sample(range(4), rng.randint(1, 4))))
    experts.close()
    assert len(reader.read) == experts.bytes_read
    assert slots < 24 or len(reader.read) == 24


def test_what_is_used_most_stays_also_through_a_sweep_over_all():
    reader = Reader()
    experts = Experts([torch.zeros(1, dtype=torch.uint8) for _ in range(7)], reader, threads=2)
    for _ in range(20):
        use(experts, "mid.0", [2])
    use(experts, "mid.0", [0, 1, 2, 3])
    use(experts, "mid.1", [0, 1, 2, 3])
    reader.read.clear()
    use(experts, "mid.0", [2])
    experts.close()
    assert reader.read == []


def test_an_expert_that_was_not_announced_is_refused():
    experts = Experts([torch.zeros(1, dtype=torch.uint8)] * 3, Reader(), threads=2)
    experts.announce("mid.0", UNITS["mid.0/experts.0"])
    with pytest.raises(RuntimeError, match="not announced"):
        experts.take(UNITS["mid.0/experts.1"][0])
    experts.close()


@pytest.mark.parametrize("slots", [3, 5, 9])
def test_experts_that_are_skipped_or_called_in_another_order_are_served_all_the_same(slots):
    experts = Experts([torch.zeros(1, dtype=torch.uint8) for _ in range(slots)], Reader(), threads=2)
    rng = random.Random(0)
    for turn in range(60):
        layer = f"mid.{turn % 2}"
        units = [unit for expert in range(4) for unit in UNITS[f"{layer}/experts.{expert}"]]
        experts.announce(layer, units)
        for unit in rng.sample(units, rng.randint(1, 12)):
            assert experts.take(unit).item() == hash(unit) % 251
            experts.release(unit)
    experts.close()
