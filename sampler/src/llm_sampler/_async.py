"""The steps for a server: computed in a thread, one at a time, while the event loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
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
    for, never two at once. When the task that waits for a step is cancelled, the forward in flight ends first, and
    nothing is left running; `async with`, or `aclose()`, ends it where an `async for` is left early.

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

    async def __anext__(self) -> Step:
        async with self._turn:
            step = await self._finished(lambda: next(self.steps, None))
        if step is None:
            raise StopAsyncIteration
        return step

    def cancel(self, row: int) -> None:
        """Leave a row out of all further steps and forwards."""
        self.steps.cancel(row)

    async def aclose(self) -> None:
        """End it here, after the forward in flight if there is one."""
        async with self._turn:
            await self._finished(self.steps.close)

    async def __aenter__(self) -> AsyncSteps:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def _finished(self, work: Callable[[], Any]) -> Any:
        """Do `work` in a thread; where this task is cancelled meanwhile, wait for it, end the steps, and pass it on."""
        running = asyncio.get_running_loop().run_in_executor(self._executor, work)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            while not running.done():
                try:
                    await asyncio.wait([running])
                except asyncio.CancelledError:
                    continue
            running.exception()  # nobody is there to hear of it
            self.steps.close()
            raise
