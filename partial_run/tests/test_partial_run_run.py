"""The engine on a real file: whatever the budget, the same bits; whatever happens, no hang and nothing left behind."""

from __future__ import annotations

import itertools
import os
import random
import threading
from typing import Any

import pytest
import torch

from llm_partial_run import BudgetError, PartialRun, SpilledCaches, plan

BUDGET: dict[str, Any] = dict(
    rows=3, context=40, tokens=48, runtime=0
)  # the model's own memory, without Python and torch


def smallest(toy, **changes):
    with pytest.raises(BudgetError) as refused:
        plan(toy.parts(), toy.store, memory=1, **(BUDGET | changes))
    return refused.value.smallest


def run_of(toy, memory, **changes):
    return PartialRun(toy.parts(), toy.store, memory=memory, **(BUDGET | changes))


def last(run, prompts, n=1):
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    return run.forward.last_logits(ids, torch.tensor([len(prompt) for prompt in prompts]), n)


PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]


def test_every_budget_from_the_smallest_to_everything_gives_the_same_bits(toy):
    least = smallest(toy)
    with run_of(toy, "1GiB") as run:
        assert run.plan.streamed == 0
        expected = [last(run, PROMPTS), last(run, [[*prompt, 7] for prompt in PROMPTS])]
    streamed = set()
    for memory in range(least, least + 600_000, 30_000):
        with run_of(toy, memory) as run:
            assert run.plan.used <= memory
            streamed.add(run.plan.streamed)
            assert torch.equal(last(run, PROMPTS), expected[0])
            assert torch.equal(last(run, [[*prompt, 7] for prompt in PROMPTS]), expected[1])
    assert len(streamed) > 8
    assert 0 in streamed


def test_logits_are_those_of_the_plain_modules(toy):
    with run_of(toy, smallest(toy)) as run:
        for prompt, logits in zip(PROMPTS, last(run, PROMPTS), strict=True):
            torch.testing.assert_close(logits[0], toy.resident_logits(prompt)[-1], atol=2e-5, rtol=0)
        everything = run.forward(torch.tensor([PROMPTS[2]]))[0]
        torch.testing.assert_close(everything, toy.resident_logits(PROMPTS[2]), atol=2e-5, rtol=0)


def test_less_than_the_smallest_budget_is_refused_before_anything_is_read(toy):
    least = smallest(toy)
    toy.store.reads = 0
    with pytest.raises(BudgetError, match=f"smallest that works is {least} bytes"):
        run_of(toy, least - 1)
    assert toy.store.reads == 0


def test_rows_that_grow_shrink_change_places_and_fan_out_equal_each_row_alone(toy):
    dice = random.Random(0)
    with run_of(toy, smallest(toy)) as run:
        pool = [[dice.randrange(96) for _ in range(dice.randrange(1, 12))] for _ in range(4)]
        for _ in range(40):
            prompts = []
            for prompt in dice.choices(pool, k=dice.randrange(1, 6)):  # more rows than the caches have, too
                kept = prompt[: dice.randrange(1, len(prompt) + 1)]
                prompts.append((kept + [dice.randrange(96) for _ in range(dice.randrange(4))])[:40])
            pool = (pool + prompts)[-6:]
            n = min(map(len, prompts)) if dice.random() < 0.3 else 1
            for prompt, logits in zip(prompts, last(run, prompts, n), strict=True):
                torch.testing.assert_close(logits, toy.resident_logits(prompt)[-n:], atol=2e-5, rtol=0)


def test_a_known_prefix_is_not_computed_again(toy):
    with run_of(toy, "1GiB") as run:
        last(run, [list(range(20))])
        assert run.stats.tokens == 20
        last(run, [list(range(21))])
        assert run.stats.tokens == 21
        last(run, [[*range(10), 50], [*range(10), 51], [*range(10), 52]])  # one row goes on, two get copies
        assert run.stats.tokens == 24


def test_a_long_prefix_shared_by_new_rows_is_computed_once(toy):
    with run_of(toy, "1GiB", context=400, tokens=400) as run:
        shared = [i % 96 for i in range(300)]
        logits = last(run, [[*shared, 1], [*shared, 2], [*shared, 3]])
        assert run.stats.tokens == 303
        torch.testing.assert_close(logits[2, 0], toy.resident_logits([*shared, 3])[-1], atol=2e-5, rtol=0)


def test_prompts_longer_than_a_pass_go_in_several(toy):
    prompt = [i * 7 % 96 for i in range(40)]
    with run_of(toy, smallest(toy, tokens=5), tokens=5) as run:
        logits = last(run, [prompt], 8)
        assert run.stats.passes == 8
    torch.testing.assert_close(logits[0], toy.resident_logits(prompt)[-8:], atol=2e-5, rtol=0)


def test_passes_whose_logits_nobody_wants_do_not_read_the_end(toy, monkeypatch):
    prompt, seen, read = [i * 7 % 96 for i in range(40)], [], toy.store.read
    again = [*prompt[:20], 1, 2, 3, 4, 5, 6, 7]
    budget: dict[str, Any] = dict(tokens=5, rows=1)
    with run_of(toy, smallest(toy, **budget) + 200_000, **budget) as run:
        monkeypatch.setattr(toy.store, "read", lambda part, *rest: seen.append(part) or read(part, *rest))
        logits = [last(run, [prompt]), last(run, [again])]
        assert (run.stats.passes, run.plan.spilled) == (8 + 2, 0)
        embedded = 4 * 32 * sum(len(set(ids)) for ids in (*torch.tensor(prompt).split(5), again[20:25], again[25:]))
        head = 4 * 32 * 96
        assert run.stats.bytes_read == 10 * run.plan.streamed - 8 * head + embedded
    assert seen.count("end") == 2
    for found, ids in zip(logits, (prompt, again), strict=True):
        torch.testing.assert_close(found[0, 0], toy.resident_logits(ids)[-1], atol=2e-5, rtol=0)


def test_a_pass_without_the_end_that_fails_leaves_the_next_one_whole(toy, monkeypatch):
    rows = toy.store.rows
    with run_of(toy, smallest(toy, tokens=5), tokens=5) as run:
        expected = last(run, [[5]])
        monkeypatch.setattr(toy.store, "rows", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            last(run, [list(range(20))])  # begins without the end, and takes nothing
        monkeypatch.setattr(toy.store, "rows", rows)
        assert torch.equal(run(torch.tensor([[5]]), caches=run.new_caches()), expected)
        logits = last(run, [list(range(20))])
    torch.testing.assert_close(logits[0, 0], toy.resident_logits(list(range(20)))[-1], atol=2e-5, rtol=0)


def test_micro_batches_share_one_read_of_each_layer(toy):
    rows = [[i * j % 96 for i in range(13)] for j in (3, 5, 7)]
    least = smallest(toy, micro_batch=5)
    results = []
    for memory in (least, least + 50_000, "1GiB"):
        with run_of(toy, memory, micro_batch=5) as run:
            results.append(last(run, rows))
            assert run.stats.passes == 1
            assert memory == "1GiB" or run.plan.streamed > 0
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for row, logits in zip(rows, results[0], strict=True):
        torch.testing.assert_close(logits[0], toy.resident_logits(row)[-1], atol=2e-5, rtol=0)


def test_caches_that_do_not_fit_go_to_disk_with_the_same_bits(toy, tmp_path):
    grown = [[*prompt, 7] for prompt in PROMPTS]
    with run_of(toy, "1GiB") as run:
        expected = [last(run, PROMPTS), last(run, grown), last(run, [grown[0] + [1], grown[0] + [2]])]
    with run_of(toy, smallest(toy), spill=tmp_path) as run:
        assert run.plan.spilled
        assert isinstance(run.planned_caches(), SpilledCaches)
        assert torch.equal(last(run, PROMPTS), expected[0])
        assert torch.equal(last(run, grown), expected[1])
        assert torch.equal(last(run, [grown[0] + [1], grown[0] + [2]]), expected[2])


def test_parts_run_in_two_runs_equal_the_whole(toy):
    parts = list(toy.parts().items())
    positions = torch.arange(7)[None]
    with run_of(toy, "1GiB") as whole:
        expected = whole(torch.tensor([PROMPTS[0]]))
    first, second = dict(parts[:4]), dict(parts[4:])
    with (
        PartialRun(first, toy.store, memory="1GiB", **BUDGET) as run,
        PartialRun(second, toy.store, memory="1GiB", **BUDGET) as rest,
    ):
        hidden = run(torch.tensor([PROMPTS[0]]), positions, run.new_caches())
        assert torch.equal(rest(hidden, positions, rest.new_caches()), expected)


def test_device_tier_with_copies_ahead_gives_the_same_bits(toy):
    grown = [[*prompt, 7] for prompt in PROMPTS]
    with run_of(toy, "1GiB") as run:
        expected = [last(run, PROMPTS), last(run, grown)]
    for device_memory in (900_000, 950_000):
        with run_of(toy, 260_000, device_memory=device_memory) as run:
            assert run.plan.device > 0
            assert run.plan.host > 0
            assert run.plan.streamed > 0
            assert torch.equal(last(run, PROMPTS), expected[0])
            assert torch.equal(last(run, grown), expected[1])


def test_a_plain_load_callable_is_enough(toy):
    with run_of(toy, "1GiB") as run:
        expected = last(run, PROMPTS)
    with PartialRun(toy.parts(), toy.weights.__getitem__, memory="1GiB", **BUDGET) as run:
        assert torch.equal(last(run, PROMPTS), expected)
        least = run.plan.smallest
    with PartialRun(toy.parts(), toy.weights.__getitem__, memory=least, **BUDGET) as run:
        assert torch.equal(last(run, PROMPTS), expected)


def test_another_computing_dtype_streams_the_same_bits_as_it_keeps(toy):
    with run_of(toy, "1GiB", dtype=torch.bfloat16) as run:
        expected = last(run, PROMPTS)
        assert expected.dtype == torch.bfloat16
    with run_of(toy, smallest(toy, dtype=torch.bfloat16), dtype=torch.bfloat16) as run:
        assert run.plan.streamed
        assert torch.equal(last(run, PROMPTS), expected)


def test_a_read_error_in_a_pass_surfaces_as_itself_and_the_next_pass_is_right(toy):
    with run_of(toy, smallest(toy)) as run:
        toy.store.fail_after = toy.store.reads + 1
        with pytest.raises(OSError, match="the disk is gone"):
            last(run, [[1, 2, 3]])
        toy.store.fail_after = None
        for prompt, logits in zip(PROMPTS, last(run, PROMPTS), strict=True):
            torch.testing.assert_close(logits[0], toy.resident_logits(prompt)[-1], atol=2e-5, rtol=0)


def test_a_read_error_while_loading_leaves_no_thread(toy):
    before = threading.active_count()
    toy.store.fail_after = 30
    with pytest.raises(OSError, match="the disk is gone"):
        run_of(toy, "1GiB")
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_closing_leaves_no_thread_no_file_and_the_modules_as_they_were(toy, tmp_path, error):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    parts = toy.parts()

    def work():
        with PartialRun(parts, toy.store, memory=smallest(toy), spill=tmp_path, **BUDGET) as run:
            last(run, PROMPTS)
            assert threading.active_count() > threads
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    assert "forward" not in vars(parts["mid.00000"].qkv)


def test_a_row_that_overflowed_is_cleared_before_its_cache_is_used_again(toy):
    toy.weights["begin"]["embed.weight"][13] = float("inf")
    with PartialRun(toy.parts(), toy.weights.__getitem__, memory="1GiB", **(BUDGET | {"rows": 1})) as run:
        assert not last(run, [[5, 6, 13]]).isfinite().all()
        logits = last(run, [[5, 6]])
    torch.testing.assert_close(logits[0, 0], toy.resident_logits([5, 6])[-1], atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([[1, 96]], [2], "the id 96; the vocabulary has 0 to 95"),
        ([[-1, 5]], [2], "the id -1"),
        ([[1, 2]], [0], r"lengths=\[0\]"),
        ([[1, 2]], [3], r"lengths=\[3\]"),
        ([[1, 2]], [2, 2], r"give one for each row"),
        ([[1] * 41], [41], "at most context=40"),
        ([[]], [0], "at least one"),
    ],
)
def test_wrong_ids_are_named(toy, ids, lengths, message):
    with run_of(toy, "1GiB") as run, pytest.raises(ValueError, match=message):
        run.forward.last_logits(torch.tensor(ids, dtype=torch.long), torch.tensor(lengths), 1)


def test_a_pass_larger_than_planned_is_refused(toy):
    with run_of(toy, "1GiB") as run, pytest.raises(ValueError, match="more than the 48 that a pass is planned for"):
        run(torch.zeros(7, 7, dtype=torch.long))


def test_weights_that_do_not_fit_the_modules_are_named(toy):
    weights = {part: dict(tensors) for part, tensors in toy.weights.items()}
    weights["mid.00003"]["out.weight"] = torch.zeros(5, 5)
    with pytest.raises(
        ValueError, match=r"mid.00003: out.weight is \[5, 5\] in the weights and \[32, 32\] in the model"
    ):
        PartialRun(toy.parts(), weights.__getitem__, memory="1GiB", **BUDGET)
    del weights["mid.00003"]["out.weight"]
    with pytest.raises(ValueError, match=r"mid.00003: the weights have no 'out.weight'"):
        PartialRun(toy.parts(), weights.__getitem__, memory="1GiB", **BUDGET)
    weights["mid.00003"]["out.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"mid.00003: out.weight is stored as torch.int8"):
        PartialRun(toy.parts(), weights.__getitem__, memory="1GiB", **BUDGET)


def test_a_module_that_calls_its_linears_in_another_order_is_refused_not_computed_wrongly(toy):
    parts = toy.parts()
    layer = parts["mid.00002"]
    layer.forward = lambda x, *_, **__: layer.qkv(layer.out(x))[..., :32]
    with (
        PartialRun(parts, toy.store, memory=smallest(toy), **BUDGET) as run,
        pytest.raises(RuntimeError, match="order"),
    ):
        last(run, PROMPTS)


def test_progress_is_told_while_loading_and_in_each_pass(toy):
    told = []
    with run_of(toy, smallest(toy) + 100_000, progress=lambda *report: told.append(report)) as run:
        last(run, PROMPTS)
    loading = [report for report in told if report[0] == "loading"]
    assert loading[-1][1] == loading[-1][2] == run.plan.resident
    assert told[-1] == ("pass", len(run.parts), len(run.parts))


def test_more_logits_than_the_plan_has_memory_for_are_refused(toy):
    long = torch.zeros(9, 2000, dtype=torch.long)
    with (
        run_of(toy, "5MiB", context=2000, tokens=10) as run,
        pytest.raises(ValueError, match="ask for fewer at a time"),
    ):
        run.forward(long)


def test_a_row_that_starts_beside_one_that_fills_its_context_is_no_prefill_from_nothing(toy):
    full = [i * 5 % 96 for i in range(40)]
    with run_of(toy, smallest(toy, tokens=120), tokens=120) as run:
        last(run, [PROMPTS[0]])
        logits = last(run, [[*PROMPTS[0], 8], full])
    torch.testing.assert_close(logits[0, 0], toy.resident_logits([*PROMPTS[0], 8])[-1], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[1, 0], toy.resident_logits(full)[-1], atol=2e-5, rtol=0)


def test_a_row_that_idles_between_others_keeps_its_caches_on_disk(toy, tmp_path):
    a, b, c = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]
    budget: dict[str, Any] = dict(
        context=16
    )  # so short that the spare slot, written by padding, shares a page with the rest
    with run_of(toy, smallest(toy, **budget), spill=tmp_path, **budget) as run:
        last(run, [a, b, c])
        last(run, [[*b, 1]])
        last(run, [[20, 21], [22, 23]])  # in the rows around that of b
        logits = last(run, [[*b, 1, 2]])
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
        with run_of(toy, smallest(toy), spill=tmp_path) as run:
            last(run, PROMPTS)
            before = run.stats.bytes_read
            results.append(last(run, [[*prompt, 7] for prompt in PROMPTS]))
            read.append(run.stats.bytes_read - before - run.plan.streamed)
    assert torch.equal(*results)
    assert set(dropped) == {os.POSIX_FADV_DONTNEED}  # what lay in the page cache
    assert read[0] == read[1] > 20 * 3 * 2 * 4096  # layers, rows, keys and values, a page at least


@pytest.mark.parametrize(
    ("spill", "message"),
    [
        ("/dev/shm", "/dev/shm is memory, not disk: give spill="),
        ("/there/is/nothing", "spill='/there/is/nothing' is no directory"),
        ("/proc/self", r"no file can be made in /proc/self .*give spill="),
    ],
)
def test_a_directory_that_cannot_have_the_caches_is_refused_before_anything_is_loaded(toy, spill, message):
    least = smallest(toy)
    plan(toy.parts(), toy.store, memory=least, **BUDGET)
    measured = toy.store.reads  # of the disk's speed
    with pytest.raises((ValueError, OSError), match=message):
        run_of(toy, least, spill=spill)
    assert toy.store.reads == 2 * measured


def test_a_layer_with_one_large_and_many_small_matrices_is_held_whole(toy, monkeypatch):
    from llm_partial_run import _units

    monkeypatch.setattr(_units, "SLICE", 1024)  # 12 slices for qkv and 4 for out
    with run_of(toy, smallest(toy, micro_batch=5), micro_batch=5) as run:
        for prompt, logits in zip(PROMPTS, last(run, PROMPTS), strict=True):
            torch.testing.assert_close(logits[0], toy.resident_logits(prompt)[-1], atol=2e-5, rtol=0)


def test_modules_serve_again_in_another_run_and_a_closed_run_says_so(toy):
    parts = toy.parts()
    results = []
    for _ in range(2):
        with PartialRun(parts, toy.store, memory="1GiB", **BUDGET) as run:
            results.append(last(run, PROMPTS))
        assert all(parameter.is_meta for part in parts.values() for parameter in part.parameters())
    assert torch.equal(*results)
    with pytest.raises(RuntimeError, match="this run is closed"):
        last(run, PROMPTS)


def test_what_is_given_to_a_run_stays_as_it_is(toy):
    layers = {part: module for part, module in toy.parts().items() if part.startswith("mid")}
    with PartialRun(layers, toy.store, memory="1GiB", **BUDGET) as run:
        x = torch.randn(1, 5, 32)
        before = x.clone()
        first = run(x)
        assert torch.equal(x, before)
        assert torch.equal(run(x), first)


def test_parts_of_a_run_that_is_open_are_refused_by_another(toy):
    parts = toy.parts()
    with PartialRun(parts, toy.store, memory="1GiB", **BUDGET) as run:
        expected = last(run, PROMPTS)
        with pytest.raises(ValueError, match=r"mid.00000: qkv belongs to another run"):
            PartialRun(parts, toy.store, memory="1GiB", **BUDGET)
        torch.testing.assert_close(last(run, PROMPTS), expected)


def test_closing_from_another_thread_lets_a_pass_end_or_raise(toy):
    ids = torch.tensor([PROMPTS[0]])
    with run_of(toy, "1GiB") as run:
        expected = run(ids)
    for memory in (smallest(toy), "1GiB"):
        for delay in (0, 1, 2, 4, 8):
            run = run_of(toy, memory)
            closer = threading.Timer(delay / 1000, run.close)
            closer.start()
            with pytest.raises(RuntimeError, match="closed"):
                assert all(torch.equal(run(ids), expected) for _ in itertools.count())
            closer.join()
    assert not [t for t in threading.enumerate() if t.name.startswith("llm_partial_run reader")]


def test_passes_of_runs_in_two_threads_take_turns(toy):
    seen: list[tuple[str, int]] = []

    def repeat(name: str) -> None:
        with run_of(toy, "1GiB", progress=lambda what, done, _: what == "pass" and seen.append((name, done))) as run:
            for _ in range(20):
                run(torch.tensor([[5]]))

    threads = [threading.Thread(target=repeat, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    starts = [i for i, (_, done) in enumerate(seen) if done == 0]
    assert {len({name for name, _ in seen[i : i + 23]}) for i in starts} == {1}  # 22 parts, and the end of the pass
    assert len(starts) == 40


def test_more_logits_than_there_is_memory_for_are_refused_before_the_pass(toy):
    with run_of(toy, smallest(toy, tokens=120, context=400), tokens=120, context=400) as run:
        caches = run.new_caches(3, 400)
        with pytest.raises(ValueError, match="logits of 1200 positions take"):
            run.forward(torch.ones(3, 400, dtype=torch.long))
        assert run(torch.ones(3, 1, dtype=torch.long), caches=caches).shape == (3, 1, 96)


def test_an_error_in_reading_ahead_is_forgotten_with_the_pass_that_failed(toy):
    with run_of(toy, smallest(toy)) as run:
        expected = last(run, PROMPTS)
        toy.store.fail_after = toy.store.reads
        for _ in range(3):
            with pytest.raises(OSError, match="the disk is gone"):
                last(run, [[*prompt, 8] for prompt in PROMPTS])
        toy.store.fail_after = None
        torch.testing.assert_close(last(run, PROMPTS), expected)


def test_a_draft_tree_sees_by_its_mask(toy):
    prompt, drafts = PROMPTS[0], [7, 8, 9]  # three continuations of one prompt, in one pass
    with run_of(toy, smallest(toy)) as run:
        caches = run.new_caches(1, 16)
        run(torch.tensor([prompt]), None, caches)
        mask = torch.zeros(1, 3, 10, dtype=torch.bool)
        mask[:, :, :7] = True
        mask[0, range(3), range(7, 10)] = True
        logits = run(torch.tensor([drafts]), torch.full((1, 3), 7), caches, slots=torch.arange(7, 10)[None], mask=mask)
    for draft, row in zip(drafts, logits[0], strict=True):
        torch.testing.assert_close(row, toy.resident_logits([*prompt, draft])[-1], atol=2e-5, rtol=0)


def test_a_device_converts_what_it_gets_from_pinned_memory(toy):
    changes: dict[str, Any] = dict(dtype=torch.float64)
    with run_of(toy, "1GiB", **changes) as run:
        expected = last(run, PROMPTS)
    with run_of(toy, "2MiB", device_memory=1_900_000, **changes) as run:
        assert run.plan.host > 0
        assert run.plan.device > 0
        assert torch.equal(last(run, PROMPTS), expected)


def test_a_long_row_without_a_cache_is_refused(toy):
    with run_of(toy, "1GiB", micro_batch=5) as run, pytest.raises(ValueError, match="give caches"):
        run(torch.zeros(1, 6, dtype=torch.long))


@pytest.mark.parametrize(
    ("x", "given", "message"),
    [
        (
            [[1, 2]],
            dict(positions=[[15, 16]]),
            r"mid.00000: caches of 2 rows and 16 slots are too few.*slot 16.*new_caches",
        ),
        ([[1, 2]], dict(positions=[[0, 1]], slots=[[0, 99]]), "slot 99"),
        ([[1, 2]], dict(positions=[[0, -1]]), "a position or slot is -1"),
        ([[1]] * 3, dict(positions=[[0]] * 3), "too few for 3 rows"),
        ([[1]], dict(positions=[[3]], mask=[[[True] * 17]]), "slot 16"),
        ([[1, 2]], dict(positions=[[0]]), r"positions= has the shape \[1, 1\], and has to have \[1, 2\]"),
        ([[1, 2]], dict(positions=[0, 1]), r"positions= has the shape \[2\]"),
        ([[1, 2]], dict(slots=[[0, 1, 2]]), r"slots= has the shape \[1, 3\]"),
        (
            [[1, 2]],
            dict(mask=[[True, True]]),
            r"mask= has the shape \[1, 2\], and has to have \[1, 2, 'slots in use'\]",
        ),
        ([1, 2], {}, r"input_ids have to be integers \[rows, tokens\]"),
    ],
)
def test_what_the_caches_have_no_place_for_is_refused_before_anything_is_read(toy, x, given, message):
    with run_of(toy, "1GiB") as run:
        caches, before = run.new_caches(2, 16), toy.store.reads
        tensors: dict[str, Any] = {name: torch.tensor(value) for name, value in given.items()}
        with pytest.raises(ValueError, match=message):
            run(torch.tensor(x), caches=caches, **tensors)
        assert (run.stats.passes, toy.store.reads) == (0, before)


def test_caches_of_another_model_are_refused(toy, tmp_path):
    with run_of(toy, smallest(toy), spill=tmp_path) as run:
        caches: dict[str, Any] = dict(run.new_caches())
        for wrong in ((), caches["mid.00003"][:1], tuple(t.double() for t in caches["mid.00003"])):
            with pytest.raises(
                ValueError, match=r"mid.00003: its caches are \[.*have to be \['\[rows, slots, 32\] float32'"
            ):
                run(torch.tensor([[1]]), caches=caches | {"mid.00003": wrong})
        with pytest.raises(ValueError, match="too few for 4 rows and slot 0"):
            run(torch.zeros(4, 1, dtype=torch.long), caches=run.planned_caches())


def test_hidden_states_are_what_parts_without_a_begin_take(toy):
    layers = {part: module for part, module in toy.parts().items() if part.startswith("mid")}
    with PartialRun(layers, toy.store, memory="1GiB", **BUDGET) as run:
        for wrong in (torch.tensor([[1, 2]]), torch.zeros(2, 32), torch.zeros(1, 0, 32)):
            with pytest.raises(ValueError, match="x has to be hidden states"):
                run(wrong)
