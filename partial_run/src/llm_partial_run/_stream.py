"""Threads that read ahead, round and round, into a small ring of slots."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ._units import Unit


class Stream:
    """Fills slots with the same units in the same order, pass after pass, ahead of whoever takes them.

    `fill(unit, slot)` returns the unit's tensor, as a rule a view of the slot. Up to `threads` fills run at once. A slot
    is filled again when the unit in it has been released; units are taken and released in order. After the last unit
    of a pass comes the first of the next, so the disk does not wait for what happens between passes. An error in
    `fill` is raised by the `take` that asks for that unit. `source` is the stream that `fill` itself takes from, if any.

    Ctrl-C may raise between any two steps of the thread that takes. So that thread moves one number at a time, all that is
    claimed and filled is the readers', and `rewind` believes nothing that was left in the middle.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        slots: Sequence[Tensor],
        fill: Callable[[Unit, Tensor], Tensor],
        *,
        threads: int,
        source: Stream | None = None,
    ):
        self.waited = 0.0  # seconds that `take` has waited, over all passes
        self._units, self._slots, self._fill, self._source = units, slots, fill, source
        self._lock = (
            threading.RLock()
        )  # entered itself: an interrupt within the condition's own `__enter__` would keep it
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._claimed = self._taken = self._released = 0  # units so far, over all passes
        self._reading = 0
        self._ahead: deque[Unit] = deque()  # to claim in the pass that is being read; the next one follows
        self._due: dict[int, Unit] = {}  # claimed, until the slot is claimed again
        self._filled: dict[int, Tensor | BaseException] = {}  # the same, once they are there
        self._short_at = -1  # units taken when a pass last began without some of its units
        self._torn = False  # within a rewind that has work to do
        self._in_use: dict[int, Any] = {}  # slot -> an event that has yet to happen before the slot is written again
        self._threads = [
            threading.Thread(target=self._work, name=f"llm_partial_run reader {i}", daemon=True)
            for i in range(min(threads, len(slots)))
        ]
        for thread in self._threads:
            thread.start()

    def take(self, unit: Unit) -> Tensor:
        """The tensor of the next unit, which has to be `unit`; waits until it is there."""
        with self._lock:
            expected = self._next()
        if unit != expected:
            raise RuntimeError(
                f"{unit} was called where {expected} is next: a streamed module has to call its Linears once each, "
                "in the order in which they are registered"
            )
        start = time.perf_counter()
        with self._lock:
            self._changed.wait_for(lambda: self._closed or self._taken in self._filled)
            self.waited += time.perf_counter() - start
            if self._closed:
                raise RuntimeError(f"the run was closed while {unit} was being read")
            result = self._filled[self._taken]
            self._taken += 1
        if isinstance(result, BaseException):
            raise result
        return result

    def release(self, until: Any = None) -> None:
        """Give back the slot of the oldest unit taken; with `until` (a device event) once that has happened."""
        with self._lock:
            self._in_use[self._released % len(self._slots)] = until
            self._released += 1
            self._changed.notify_all()

    def rewind(self, unwanted: frozenset[Unit] = frozenset()) -> frozenset[Unit]:
        """Be at the start of a pass, also where the last one was left in the middle, or reading ahead has failed.

        The pass leaves out those of the unwanted units whose reading has not begun, and returns them.
        """
        with self._lock:
            self._changed.notify_all()  # an interrupt may have come before the one of `release`
            failed = any(isinstance(result, BaseException) for i, result in self._filled.items() if i >= self._taken)
            whole = self._next() == self._units[0] and self._released == self._taken != self._short_at
            if failed or not whole or self._torn:
                self._torn = True
                self._changed.wait_for(lambda: not self._reading)
                if self._source is not None:
                    self._source.rewind()
                self._taken = self._released = self._claimed
                self._filled.clear()
                self._due.clear()
                self._ahead.clear()
                self._changed.notify_all()
                self._torn = False
            if not unwanted or self._source is not None or self._claimed - self._taken >= len(self._units):
                return frozenset()
            ahead = self._ahead or self._units
            left_out = unwanted.intersection(ahead)
            self._short_at = self._taken
            self._ahead = deque(unit for unit in ahead if unit not in left_out)
            return left_out

    def stop(self) -> None:
        """Read no more; whoever waits for a unit gets an error."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads, after the reads that they are in."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self._filled.clear()
        self._slots = ()

    def _next(self) -> Unit:
        return self._due.get(self._taken) or (self._ahead or self._units)[0]

    def _work(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._closed or self._claimed < self._released + len(self._slots))
                if self._closed:
                    return
                ticket = self._claimed
                self._claimed += 1
                self._reading += 1
                if not self._ahead:
                    self._ahead.extend(self._units)
                self._due[ticket] = unit = self._ahead.popleft()
                slot = ticket % len(self._slots)
                for known in (self._due, self._filled):
                    known.pop(ticket - len(self._slots), None)  # pyright: ignore
                until = self._in_use.pop(slot, None)
            try:
                if until is not None:
                    until.synchronize()
                result = self._fill(unit, self._slots[slot])
            except BaseException as error:  # raised where the unit is taken
                result = error
            with self._lock:
                self._filled[ticket] = result
                self._reading -= 1
                self._changed.notify_all()
