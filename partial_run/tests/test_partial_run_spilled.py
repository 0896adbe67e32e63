"""Keys and values that do not fit in memory, on disk: the same bits."""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import Any

import pytest
import torch

from llm_partial_run import PartialRun, SpilledCaches, _budget, plan

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]


def test_caches_that_do_not_fit_go_to_disk_with_the_same_bits(toy, tmp_path):
    grown = [[*prompt, 7] for prompt in PROMPTS]
    with toy.run("1GiB") as run:
        expected = [toy.last(run, PROMPTS), toy.last(run, grown), toy.last(run, [grown[0] + [1], grown[0] + [2]])]
    with toy.run(toy.smallest(), spill=tmp_path) as run:
        assert run.plan.spilled
        assert isinstance(run.new_caches(), SpilledCaches)
        assert torch.equal(toy.last(run, PROMPTS), expected[0])
        assert torch.equal(toy.last(run, grown), expected[1])
        assert torch.equal(toy.last(run, [grown[0] + [1], grown[0] + [2]]), expected[2])


def test_caches_that_would_fit_go_to_a_directory_that_is_given_where_that_takes_less_time(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(_budget, "WAIT", 0)  # this small, waiting for the disk would cost more than any weights
    budget: dict[str, Any] = toy.BUDGET | dict(context=30)
    least = next(
        memory
        for memory in itertools.count(toy.smallest(**budget), 10_000)
        if not plan(toy.parts(), toy.store, memory=memory, **budget).spilled
    )
    outputs, read = [], []
    for spill in (None, tmp_path):
        with toy.run(least, spill=spill, **budget) as run:
            assert (run.plan.spilled > 0) == (spill is not None)
            outputs += [toy.last(run, PROMPTS), toy.last(run, [[*prompt, 7] for prompt in PROMPTS])]
            read.append(run.plan.read_per_pass)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert read[1] < 0.95 * read[0]

    def spilled(**changes: Any) -> bool:
        return plan(toy.parts(), toy.store, **dict(memory=least, spill=tmp_path) | budget | changes).spilled > 0

    assert not spilled(spill="/dev/shm")
    assert not spilled(memory="1GiB")  # nothing is streamed
    monkeypatch.setattr(_budget, "WAIT", 1 << 20)
    assert not spilled()


def test_a_range_of_layers_has_its_caches_where_the_plan_has_them(toy, tmp_path):
    layers = {part: module for part, module in toy.parts().items() if part.startswith("mid")}
    x, outputs = torch.randn(3, 4, 32), []
    for memory in ("1GiB", toy.smallest()):
        with PartialRun(layers, toy.store, memory=memory, spill=tmp_path, **toy.BUDGET) as run:
            caches = run.new_caches()
            assert isinstance(caches, SpilledCaches) == (run.plan.spilled > 0) == (memory != "1GiB")
            run(x, None, caches)
            outputs.append(run(x[:, :1], torch.full((3, 1), 4), caches))
            assert not isinstance(run.new_caches(1, 8), SpilledCaches)  # of a size that the plan knows nothing of
    assert torch.equal(*outputs)


def test_caches_on_disk_go_when_nobody_has_them_any_more_or_when_they_or_the_run_are_closed(toy, tmp_path):
    with toy.run(toy.smallest(), spill=tmp_path) as run:
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            caches = run.new_caches()
            run(torch.tensor([[5, 6, 7]] * 3), None, caches)
            assert len(os.listdir("/proc/self/fd")) == files + 1
            del caches
        assert len(os.listdir("/proc/self/fd")) == files
        closed, left = run.new_caches(), run.new_caches()
        closed.close()
        assert len(os.listdir("/proc/self/fd")) == files + 1
    closed.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        left.read("mid.00000", range(1), 1, fresh=False)


def test_a_row_that_idles_between_others_keeps_its_caches_on_disk(toy, tmp_path):
    a, b, c = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]
    budget: dict[str, Any] = dict(
        context=16
    )  # so short that the spare slot, written by padding, shares a page with the rest
    with toy.run(toy.smallest(**budget), spill=tmp_path, **budget) as run:
        toy.last(run, [a, b, c])
        toy.last(run, [[*b, 1]])
        toy.last(run, [[20, 21], [22, 23]])  # in the rows around that of b
        logits = toy.last(run, [[*b, 1, 2]])
        assert run.plan.spilled
    torch.testing.assert_close(logits[0, 0], toy.resident_logits([*b, 1, 2])[-1], atol=2e-5, rtol=0)


def test_caches_on_a_disk_without_direct_access_give_the_same_bits_and_are_counted(toy, tmp_path, monkeypatch):
    results, read, dropped = [], [], []
    advise = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: dropped.append(args[-1]) or advise(*args))
    for direct in (True, False):
        if not direct:
            assert dropped == []
            monkeypatch.delattr(os, "O_DIRECT")
        with toy.run(toy.smallest(), spill=tmp_path) as run:
            toy.last(run, PROMPTS)
            before = run.stats.bytes_read
            results.append(toy.last(run, [[*prompt, 7] for prompt in PROMPTS]))
            read.append(run.stats.bytes_read - before - run.plan.streamed)
    assert torch.equal(*results)
    assert set(dropped) == {os.POSIX_FADV_DONTNEED}  # what lay in the page cache
    assert read[0] == read[1] > 20 * 3 * 2 * 4096  # layers, rows, keys and values, a page at least


def test_rows_that_continue_beside_one_that_begins_see_their_caches_by_a_mask(toy, tmp_path):
    positions = torch.tensor([[0, 1, 2, 3], [3, 0, 0, 0], [3, 0, 0, 0]])
    spare = torch.tensor([[0, 1, 2, 3], [3, 40, 40, 40], [3, 40, 40, 40]])
    mask = torch.arange(4) <= positions[:, :, None]
    results = []
    for memory in ("1GiB", toy.smallest()):
        with toy.run(memory, spill=tmp_path) as run:
            caches = run.new_caches()
            run(torch.tensor([[5, 6, 7]] * 3), None, caches)
            ids = torch.tensor([[1, 2, 3, 4], [9, 0, 0, 0], [8, 0, 0, 0]])
            first = run(ids, positions, caches, slots=spare, mask=mask)[:, 0]
            results.append((first, run(torch.tensor([[1]] * 3), torch.full((3, 1), 4), caches)))
    for in_memory, on_disk in zip(*results, strict=True):
        torch.testing.assert_close(on_disk, in_memory)


def test_a_prefix_that_could_not_be_copied_is_not_taken_for_one_that_is_there(toy, tmp_path, monkeypatch):
    other, write = [40, 41, 42, 43], os.pwritev
    with toy.run(toy.smallest(rows=2), rows=2, spill=tmp_path) as run:
        toy.last(run, [PROMPTS[2], other])
        written = iter(range(5))  # a part of the layers' keys and values
        monkeypatch.setattr(os, "pwritev", lambda *args: write(*args) if next(written, None) is not None else 0)
        with pytest.raises(OSError, match="keys and values could be written"):
            toy.last(run, [[*PROMPTS[2], 1], [*PROMPTS[2], 2]])  # one in the place of the other
        monkeypatch.setattr(os, "pwritev", write)
        logits = toy.last(run, [[*other, 9]])
    torch.testing.assert_close(logits[0, 0], toy.resident_logits([*other, 9])[-1], atol=2e-5, rtol=0)


def test_what_overflowed_in_a_row_on_disk_does_not_reach_its_next_user(toy, tmp_path, file_store):
    toy.weights["begin"]["embed.weight"][13] = float("inf")
    long = [1, 2, 3, 4, 5, 6, 7, 8]
    budget: dict[str, Any] = toy.BUDGET | dict(rows=2, memory=toy.smallest(rows=2), spill=tmp_path)
    with (
        contextlib.closing(file_store(tmp_path / "weights that overflow", toy.weights)) as store,
        PartialRun(toy.parts(), store, **budget) as run,
    ):
        assert run.plan.spilled
        assert not toy.last(run, [[5, 6, 13], long])[0].isfinite().all()
        toy.last(run, [[5, 6]])
        logits = toy.last(run, [[5, 6], [*long, 9]])  # sees as many slots of both rows, by a mask
    torch.testing.assert_close(logits[0, 0], toy.resident_logits([5, 6])[-1], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("spill", "message"),
    [
        ("/dev/shm", "/dev/shm is memory, not disk: give spill="),
        ("/there/is/nothing", "spill='/there/is/nothing' is no directory"),
        ("/proc/self", r"no file can be made in /proc/self .*give spill="),
    ],
)
def test_a_directory_that_cannot_have_the_caches_is_refused_before_anything_is_loaded(toy, spill, message):
    least = toy.smallest()
    plan(toy.parts(), toy.store, memory=least, **toy.BUDGET)
    measured = toy.store.reads  # of the disk's speed
    with pytest.raises((ValueError, OSError), match=message):
        toy.run(least, spill=spill)
    assert toy.store.reads <= 2 * measured
