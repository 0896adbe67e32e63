"""The stream of slices, and the prefixes."""

from __future__ import annotations

import itertools
import linecache
import random
import sys
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_partial_run import _experts, _stream
from llm_partial_run._experts import Experts
from llm_partial_run._prefixes import Prefixes
from llm_partial_run._stream import Stream
from llm_partial_run._units import Unit

UNITS = [Unit("mid.00000", "weight", i, i + 1, 8, 8) for i in range(7)]


def fill(unit, slot):
    time.sleep(0.001 * (unit.start % 3))  # reads end in another order than they began
    return slot.fill_(unit.start)


def stream_of(fill, slots=3):
    return Stream(UNITS, [torch.zeros(8) for _ in range(slots)], fill, threads=2)


def test_a_stream_gives_the_units_in_order_pass_after_pass():
    stream = stream_of(fill)
    for _ in range(5):
        for unit in UNITS:
            assert stream.take(unit).tolist() == [unit.start] * 8
            stream.release()
    stream.close()


def test_a_slot_is_not_written_before_it_is_released():
    stream = stream_of(fill)
    taken = [stream.take(unit) for unit in UNITS[:3]]
    time.sleep(0.05)
    assert [int(tensor[0]) for tensor in taken] == [0, 1, 2]
    stream.close()


def test_a_stream_reads_ahead_over_the_end_of_a_pass():
    filled = threading.Event()
    passes = []

    def count(unit, slot):
        passes.append(unit)
        if len(passes) > len(UNITS):
            filled.set()
        return fill(unit, slot)

    stream = stream_of(count)
    for unit in UNITS:
        stream.take(unit)
        stream.release()
    assert filled.wait(timeout=5)
    stream.close()


def test_a_pass_left_in_the_middle_is_started_over():
    stream = stream_of(fill)
    stream.take(UNITS[0])
    stream.release()
    stream.take(UNITS[1])
    stream.rewind()
    assert [int(stream.take(unit)[0]) for unit in UNITS[:3]] == [0, 1, 2]
    stream.close()


@pytest.mark.parametrize("slots", [2, 3, 7, 8, 20])
def test_a_pass_leaves_out_what_is_not_wanted_of_it_and_the_next_has_all(slots):
    seen = []

    def count(unit, slot):
        seen.append(unit)
        return fill(unit, slot)

    stream, dice = stream_of(count, slots), random.Random(slots)
    for number in range(60):
        wanted = dice.choice([7, 5, 3, 0])
        left_out = stream.rewind(frozenset(UNITS[wanted:]))
        if number % 7 == 3:  # a pass that fails before, or while, it takes anything
            for unit in UNITS[: dice.choice([0, min(2, wanted)])]:
                stream.take(unit)
                stream.release()
            continue
        for unit in UNITS:
            if unit not in left_out:
                assert stream.take(unit).tolist() == [unit.start] * 8
                stream.release()
    stream.close()
    assert slots > 7 or len(seen) < 60 * 7  # less than whole passes


def interrupted(at, function):
    """Whether Ctrl-C came at that step, of the steps that `function` takes in the stream, its experts and their locks."""
    steps, files = itertools.count(), {_stream.__file__, _experts.__file__, threading.__file__}

    def step(frame, event, _):
        here = frame.f_code.co_filename in files and event in ("line", "return")
        leaving = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with ")  # in one step
        if here and not leaving and next(steps) == at:
            raise KeyboardInterrupt
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        function()
    except KeyboardInterrupt:
        return True
    except RuntimeError as error:  # it came while a condition had given up the lock
        if "un-acquired lock" not in str(error):
            raise
        return True
    finally:
        sys.settrace(before)
    return False


def ends_soon(function):
    """Run it in this thread's place: another may wait for ever, and is given up."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(timeout=10)
    return not thread.is_alive()


def test_an_interrupt_at_any_step_of_a_pass_hangs_neither_the_next_one_nor_closing():
    stream, got = stream_of(fill), []

    def one_pass(unwanted=frozenset()):
        got.clear()
        left_out = stream.rewind(unwanted)
        for unit in UNITS:
            if unit not in left_out:
                got.append(stream.take(unit)[0].item())
                stream.release()

    for at in itertools.count():
        if not interrupted(at, lambda at=at: one_pass(frozenset(UNITS[5:] if at % 2 else ()))):
            break
        assert ends_soon(one_pass), at
        assert got == [unit.start for unit in UNITS]
    assert at > 100
    assert ends_soon(stream.close)


def test_an_interrupt_at_any_step_of_routed_experts_hangs_neither_the_next_pass_nor_closing():
    units = [Unit(f"mid.00000/experts.{i:05d}", name, 0, 1, 8, 8) for i in range(5) for name in ("up", "down")]
    experts, got = Experts([torch.zeros(8) for _ in range(6)], fill_expert, threads=2), []

    def one_pass(chosen):
        got.clear()
        experts.rewind()
        announced = [unit for unit in units if units.index(unit) // 2 in chosen]
        experts.announce("mid.00000", announced)
        for unit in announced:
            got.append(experts.take(unit)[0].item())
            experts.release(unit)

    dice = random.Random(0)
    for at in itertools.count():
        chosen = dice.sample(range(5), 4)
        if not interrupted(at, lambda chosen=chosen: one_pass(chosen)):
            break
        chosen = sorted(dice.sample(range(5), 4))
        assert ends_soon(lambda chosen=chosen: one_pass(chosen)), at
        assert got == [i for i in chosen for _ in range(2)]
    assert at > 100
    assert ends_soon(experts.close)


def fill_expert(unit, slot):
    return slot.fill_(int(unit.part[-5:]))


def test_the_wrong_unit_is_refused():
    stream = stream_of(fill)
    with pytest.raises(RuntimeError, match="is next"):
        stream.take(UNITS[1])
    stream.close()


def test_an_error_is_raised_where_its_unit_is_taken():
    def fail(unit, slot):
        if unit.start == 2:
            raise OSError("gone")
        return fill(unit, slot)

    stream = stream_of(fail)
    for unit in UNITS[:2]:
        stream.take(unit)
        stream.release()
    with pytest.raises(OSError, match="gone"):
        stream.take(UNITS[2])
    stream.close()
    assert not [thread for thread in threading.enumerate() if "reader" in thread.name]


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=20), st.lists(st.integers(0, 2), max_size=6)
)
def test_the_longest_prefix_is_the_one_that_comparing_every_row_finds(writes, prompt):
    prefixes = Prefixes(3)
    rows: list[list[int]] = [[], [], []]
    for i, ids in enumerate(writes):
        prefixes[i % 3] = ids
        rows[i % 3] = ids

    def common(row):
        return next(
            (i for i, (a, b) in enumerate(zip(row, prompt, strict=False)) if a != b), min(len(row), len(prompt))
        )

    longest = max(map(common, rows))
    assert prefixes.longest(prompt) == (
        longest,
        {i for i in range(3) if common(rows[i]) == longest} if longest else set(),
    )
