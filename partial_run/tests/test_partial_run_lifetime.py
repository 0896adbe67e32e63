"""Errors, closing and threads: whatever happens, no hang and nothing left behind."""

from __future__ import annotations

import itertools
import os
import threading

import pytest
import torch

from llm_partial_run import PartialRun

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]


def test_a_read_error_in_a_pass_surfaces_as_itself_and_the_next_pass_is_right(toy):
    with toy.run(toy.smallest()) as run:
        toy.store.fail_after = toy.store.reads + 1
        with pytest.raises(OSError, match="the disk is gone"):
            toy.last(run, [[1, 2, 3]])
        toy.store.fail_after = None
        for prompt, logits in zip(PROMPTS, toy.last(run, PROMPTS), strict=True):
            torch.testing.assert_close(logits[0], toy.resident_logits(prompt)[-1], atol=2e-5, rtol=0)


def test_a_read_error_while_loading_leaves_no_thread(toy):
    before = threading.active_count()
    toy.store.fail_after = 30
    with pytest.raises(OSError, match="the disk is gone"):
        toy.run("1GiB")
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_closing_leaves_no_thread_no_file_and_the_modules_as_they_were(toy, tmp_path, error):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    parts = toy.parts()

    def work():
        with PartialRun(parts, toy.store, memory=toy.smallest(), spill=tmp_path, **toy.BUDGET) as run:
            toy.last(run, PROMPTS)
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


def test_progress_is_told_while_loading_and_in_each_pass(toy):
    told = []
    with toy.run(toy.smallest() + 100_000, progress=lambda *report: told.append(report)) as run:
        toy.last(run, PROMPTS)
    loading = [report for report in told if report[0] == "loading"]
    assert loading[-1][1] == loading[-1][2] == run.plan.resident
    assert told[-1] == ("pass", len(run.parts), len(run.parts))


def test_closing_within_a_pass_is_refused_and_harms_nothing(toy):
    def close(what, done, of):
        if what == "pass" and done == 3:
            run.close()

    with toy.run(toy.smallest(), progress=close) as run:
        with pytest.raises(RuntimeError, match="close it after the pass"):
            toy.last(run, [[1, 2, 3]])
        run._progress = None
        torch.testing.assert_close(
            toy.last(run, [[1, 2, 3]])[0, -1], toy.resident_logits([1, 2, 3])[-1], atol=2e-5, rtol=0
        )


def test_modules_serve_again_in_another_run_and_a_closed_run_says_so(toy):
    parts = toy.parts()
    results = []
    for _ in range(2):
        with PartialRun(parts, toy.store, memory="1GiB", **toy.BUDGET) as run:
            results.append(toy.last(run, PROMPTS))
        assert all(parameter.is_meta for part in parts.values() for parameter in part.parameters())
    assert torch.equal(*results)
    with pytest.raises(RuntimeError, match="this run is closed"):
        toy.last(run, PROMPTS)


def test_parts_of_a_run_that_is_open_are_refused_by_another(toy):
    parts = toy.parts()
    with PartialRun(parts, toy.store, memory="1GiB", **toy.BUDGET) as run:
        expected = toy.last(run, PROMPTS)
        with pytest.raises(ValueError, match=r"mid.00000: qkv belongs to another run"):
            PartialRun(parts, toy.store, memory="1GiB", **toy.BUDGET)
        torch.testing.assert_close(toy.last(run, PROMPTS), expected)


def test_closing_from_another_thread_lets_a_pass_end_or_raise(toy):
    ids = torch.tensor([PROMPTS[0]])
    with toy.run("1GiB") as run:
        expected = run(ids)
    for memory in (toy.smallest(), "1GiB"):
        for delay in (0, 1, 2, 4, 8):
            run = toy.run(memory)
            closer = threading.Timer(delay / 1000, run.close)
            closer.start()
            with pytest.raises(RuntimeError, match="closed"):
                assert all(torch.equal(run(ids), expected) for _ in itertools.count())
            closer.join()
    assert not [t for t in threading.enumerate() if t.name.startswith("llm_partial_run reader")]


def test_passes_of_runs_in_two_threads_take_turns(toy):
    seen: list[tuple[str, int]] = []

    def repeat(name: str) -> None:
        with toy.run("1GiB", progress=lambda what, done, _: what == "pass" and seen.append((name, done))) as run:
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


def test_threads_that_share_a_forward_each_get_the_logits_of_their_ids(toy):
    found: dict[int, list[torch.Tensor]] = {3: [], 5: []}

    def ask(step: int) -> None:
        for length in range(1, 21):
            found[step].append(toy.last(run, [[i * step % 96 for i in range(length)]])[0, 0])

    with toy.run("1GiB", rows=1) as run:  # both take the one cache row from each other
        threads = [threading.Thread(target=ask, args=(step,)) for step in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for step, logits in found.items():
        expected = toy.resident_logits([i * step % 96 for i in range(20)])
        torch.testing.assert_close(torch.stack(logits), expected, atol=2e-5, rtol=0)


def test_threads_get_the_same_forward(toy):
    with toy.run("1GiB") as run:
        barrier, found = threading.Barrier(4), []

        def ask() -> None:
            barrier.wait()
            found.append(run.forward)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({id(forward) for forward in found}) == 1


def test_a_forward_whose_run_is_closed_touches_no_file(toy, tmp_path):
    with toy.run(toy.smallest(rows=2), rows=2, spill=tmp_path) as run:
        assert run.plan.spilled
        forward = run.forward
        toy.last(run, [[1, 2, 3, 4], [50, 51]])
    mine = tmp_path / "mine"
    mine.write_bytes(b"\xab" * 1_000_000)
    with mine.open("r+b"):  # has the number that the caches' file had
        with pytest.raises(RuntimeError, match="this run is closed"):
            forward.last_logits(torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]), torch.tensor([5, 5]))
        assert mine.read_bytes() == b"\xab" * 1_000_000


def test_an_error_in_reading_ahead_is_forgotten_with_the_pass_that_failed(toy):
    with toy.run(toy.smallest()) as run:
        expected = toy.last(run, PROMPTS)
        toy.store.fail_after = toy.store.reads
        for _ in range(3):
            with pytest.raises(OSError, match="the disk is gone"):
                toy.last(run, [[*prompt, 8] for prompt in PROMPTS])
        toy.store.fail_after = None
        torch.testing.assert_close(toy.last(run, PROMPTS), expected)
