"""The stream of slices, and the prefixes."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
