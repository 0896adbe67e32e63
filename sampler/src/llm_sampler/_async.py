"""The steps for a server: computed in a thread, one at a time, while the event loop goes on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from typing import Any

from ._forward import ForwardFunc, Rows
from ._sample import Steps, sample
from ._step import Step


def sample_async(
    forward_func: ForwardFunc, input_ids: Rows, *, executor: Executor | None = None, **options: Any
) -> AsyncSteps:
    """As `sample`, with its arguments, for `async for`. A forward never blocks the event loop.

    executor: where the forwards run; by default the event loop's own threads. Steps are computed when they are asked
    for, never two at once. When the task that waits for a step is cancelled, the forward in flight ends first, one that
    still waits for a thread never begins, and nothing is left running; `async with`, or `aclose()`, ends it where an
    `async for` is left early.

    Example:
        >>> import asyncio, torch
        >>> after = torch.tensor([[0., 9., 0.], [0., 0., 9.], [9., 0., 0.]])
        >>> async def main():
        ...     async with sample_async(lambda ids: after[ids], [[0]], max_new_tokens=3, temperature=0) as steps:
        ...         return [step.tokens async for step in steps]
        >>> asyncio.run(main())
        [(1,), (2,), (0,)]
    """
    return AsyncSteps(sample(forward_func, input_ids, **options), executor)


class AsyncSteps(AsyncIterator[Step]):
    """The steps of `sample_async`."""

    def __init__(self, steps: Steps, executor: Executor | None):
        self.steps = steps
        self._executor = executor
        self._turn = asyncio.Lock()
        self._unfinished = set(range(len(steps.stats.rows)))

    async def __anext__(self) -> Step:
        async with self._turn:
            step = await self._computed() if self._unfinished else next(self.steps, None)
        if step is None:
            raise StopAsyncIteration
        self._unfinished -= {row for row, why in zip(step.rows, step.finished, strict=True) if why is not None}
        return step

    def cancel(self, row: int) -> None:
        """Leave a row out of all further steps and forwards."""
        self.steps.cancel(row)

    async def aclose(self) -> None:
        """End it here, after the forward in flight if there is one."""
        async with self._turn:
            self._close()

    async def __aenter__(self) -> AsyncSteps:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _computed(self) -> Step | None:
        """The next step, from a thread; where this task is cancelled meanwhile, no other begins, and one that has is
        waited for.
        """
        begun = threading.Lock()  # whoever takes it decides: the thread that computes, or the task that is cancelled

        def compute() -> Step | None:
            return next(self.steps, None) if begun.acquire(blocking=False) else None

        running = asyncio.get_running_loop().run_in_executor(self._executor, compute)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if begun.acquire(blocking=False):
                running.cancel()  # the executor's queue lets go of it
            else:
                await _ended(running)
            self._close()
            raise

    def _close(self) -> None:
        self.steps.close()
        self._unfinished.clear()


async def _ended(running: asyncio.Future[Step | None]) -> None:
    """Wait for it, however often this task is cancelled meanwhile."""
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            continue
    running.exception()  # nobody is there to hear of it
