"""The steps for servers: nothing blocks the event loop, nothing runs twice at once, nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampler import generate, sample_async

FOLLOW = torch.eye(5).roll(1, dims=1) * 50  # 0 -> 1 -> 2 -> 3 -> 4 -> 0


class Slow:
    """A forward that takes a while, and notes when it runs and in which thread."""

    def __init__(self, seconds: float = 0.03) -> None:
        self.seconds = seconds
        self.running = self.most = self.calls = 0
        self.threads: set[int] = set()
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.running += 1
        self.most = max(self.most, self.running)
        time.sleep(self.seconds)
        self.threads.add(threading.get_ident())
        self.shapes.append(tuple(ids.shape))
        self.running -= 1
        self.calls += 1
        return FOLLOW[ids]


@pytest.fixture
def forward() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    assert slow.running == 0
    assert slow.most <= 1


def test_async_steps_equal_those_of_sample_while_the_loop_goes_on(forward: Slow) -> None:
    async def main() -> tuple[list[int], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        tokens = [step.tokens[0] async for step in sample_async(forward, [[0]], max_new_tokens=6, temperature=0)]
        ticking.cancel()
        return tokens, ticks

    tokens, ticks = asyncio.run(main())
    assert tuple(tokens) == generate(forward, [[0]], max_new_tokens=6, temperature=0)[0].tokens
    assert ticks > 12


def test_a_task_that_is_cancelled_lets_the_forward_end_and_no_other_begin(forward: Slow) -> None:
    async def main() -> None:
        steps = sample_async(forward, [[0]], max_new_tokens=50, temperature=0)
        task = asyncio.ensure_future(anext(steps))
        while not forward.running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert forward.running == 0
        assert [step async for step in steps] == []

    asyncio.run(main())
    assert forward.calls == 1


def test_a_task_cancelled_again_and_again_still_waits_for_the_forward(forward: Slow) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(anext(sample_async(forward, [[0]], max_new_tokens=50, temperature=0)))
        while not forward.running:
            await asyncio.sleep(0.001)
        for _ in range(4):
            task.cancel()
            await asyncio.sleep(0.003)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert forward.running == 0

    asyncio.run(main())
    assert forward.calls == 1


def test_a_time_limit_ends_it(forward: Slow) -> None:
    async def main() -> int:
        count = 0

        async def run() -> None:
            nonlocal count
            async with sample_async(forward, [[0]], max_new_tokens=1000, temperature=0) as steps:
                async for _ in steps:
                    count += 1

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(run(), 0.1)
        calls = forward.calls
        await asyncio.sleep(0.05)
        assert forward.calls == calls
        return count

    assert 1 <= asyncio.run(main()) <= 6


def test_leaving_early_closes_the_steps(forward: Slow) -> None:
    async def main() -> None:
        async with sample_async(forward, [[0]], max_new_tokens=50, temperature=0) as steps:
            async for step in steps:
                if step.tokens == (2,):
                    break
        assert [step async for step in steps] == []

    asyncio.run(main())
    assert forward.calls == 2


@pytest.fixture
def single() -> Iterator[tuple[ThreadPoolExecutor, threading.Event]]:
    """An executor of one thread, and what other work in it waits for."""
    over = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        try:
            yield executor, over
        finally:
            over.set()


def test_a_task_that_is_cancelled_before_its_forward_has_a_thread_returns_at_once_and_none_begins(
    forward: Slow, single: tuple[ThreadPoolExecutor, threading.Event]
) -> None:
    executor, over = single

    async def main() -> None:
        other = executor.submit(over.wait, 5)
        steps = sample_async(forward, [[0]], max_new_tokens=50, temperature=0, executor=executor)
        task = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [step async for step in steps] == []
        assert not other.done()

    asyncio.run(main())
    over.set()
    executor.submit(int).result(5)  # behind what is left in the queue
    assert forward.calls == 0


@pytest.mark.parametrize("last", [(1,), (3,)], ids=["early", "after the last step"])
def test_leaving_the_steps_waits_for_no_other_work(
    forward: Slow, single: tuple[ThreadPoolExecutor, threading.Event], last: tuple[int]
) -> None:
    executor, over = single
    options: dict[str, Any] = {"max_new_tokens": [1, 3], "temperature": 0, "executor": executor}

    async def main() -> None:
        async with sample_async(forward, [[2], [0]], **options) as steps:
            async for step in steps:
                if step.tokens[-1:] == last:
                    other = executor.submit(over.wait, 5)
                    if last == (1,):
                        break
        assert [step async for step in steps] == []
        assert not other.done()

    asyncio.run(main())
    assert forward.calls == last[0]


def test_two_that_ask_at_once_take_turns(forward: Slow) -> None:
    async def main() -> list:
        steps = sample_async(forward, [[0]], max_new_tokens=4, temperature=0)
        return await asyncio.gather(*(anext(steps) for _ in range(4)))

    assert [step.tokens for step in asyncio.run(main())] == [(1,), (2,), (3,), (4,)]


def test_a_row_can_be_cancelled_while_the_others_go_on(forward: Slow) -> None:
    async def main() -> list[tuple[int, ...]]:
        seen = []
        steps = sample_async(forward, [[0], [1], [2]], max_new_tokens=3, temperature=0)
        async for step in steps:
            seen.append(step.rows)
            steps.cancel(1)
        return seen

    assert asyncio.run(main()) == [(0, 1, 2), (0, 2), (0, 2)]
    assert forward.shapes == [(3, 1), (2, 2), (2, 3)]


def test_many_streams_share_the_loops_threads_and_errors_come_through() -> None:
    def broken(ids: Tensor) -> Tensor:
        raise OSError("disk gone")

    async def main() -> None:
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            sample_async(broken, [[0]], max_new_tokens=0)
        with pytest.raises(OSError, match="disk gone"):
            await anext(sample_async(broken, [[0]], max_new_tokens=1))

        async def tokens(start: int) -> list[int]:
            steps = sample_async(Slow(0.002), [[start]], max_new_tokens=5, temperature=0)
            return [step.tokens[0] async for step in steps]

        results = await asyncio.gather(*(tokens(start) for start in range(5)))
        assert results == [[(start + n) % 5 for n in range(1, 6)] for start in range(5)]

    before = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == before
