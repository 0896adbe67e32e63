"""Routed experts: read when a layer announces which it will use, and kept as long as others are wanted less."""

from __future__ import annotations

import math
import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from torch import Tensor

from ._units import Unit

FADING = 0.99  # what a use counts for, one use of the layer later: on traces as good as none, and tastes may change

NOW = -1  # the place of what is being used, or waited for: before all others


class Experts:
    """Slots for slices of experts, filled by threads as soon as a layer has announced what it needs, in that order.

    Which experts come next is not known as it is for the other weights, so what is kept is what was used most often,
    recent uses counting more (`FADING`). A pass that wants all experts reads those that are absent in one sweep, and
    does not change which are the favourites.
    """

    def __init__(self, slots: Sequence[Tensor], fill: Callable[[Unit, Tensor], Tensor], *, threads: int):
        self.waited = 0.0  # seconds that `take` has waited
        self.bytes_read = 0
        self._fill, self._slots = fill, list(slots)
        self._free = list(range(len(slots)))
        self._slot_of: dict[Unit, int] = {}  # from when its reading begins
        self._ready: dict[Unit, Tensor | BaseException] = {}
        self._announced: dict[Unit, int] = {}  # and not yet released -> place in the order
        self._missing: list[tuple[int, Unit]] = []  # announced and to be read, in that order
        self._times: Counter[str] = Counter()  # layer -> announcements
        self._score: dict[str, float] = {}  # expert -> log of its uses, each FADING ** -(announcements before it)
        self._idle: list[tuple[float, Unit]] = []  # heap by score; entries of the past are passed over
        self._reading = 0
        self._lock = threading.RLock()  # entered itself, as a stream's
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"llm_partial_run expert reader {i}", daemon=True)
            for i in range(min(threads, len(self._slots)))
        ]
        for thread in self._threads:
            thread.start()

    def announce(self, layer: str, units: Sequence[Unit]) -> None:
        """These slices of a layer's experts will be taken and released, one after the other."""
        with self._lock:
            now = -self._times[layer] * math.log(FADING)
            self._times[layer] += 1
            for expert in {unit.part for unit in units}:
                before = self._score.get(expert, -math.inf)
                self._score[expert] = now + math.log1p(math.exp(before - now))
            self._leave()
            self._announced = {unit: i for i, unit in enumerate(units)}
            self._missing = [(i, unit) for i, unit in enumerate(units) if unit not in self._slot_of]
            self._changed.notify_all()

    def take(self, unit: Unit) -> Tensor:
        """The tensor of an announced slice; waits until it is there."""
        start = time.perf_counter()
        with self._lock:
            if unit not in self._announced:
                raise RuntimeError(
                    f"{unit} was called and not announced: a layer announces its experts, then calls each of them once"
                )
            if unit not in self._slot_of:  # whatever was announced before it
                self._missing.remove((self._announced[unit], unit))
                self._missing.insert(0, (NOW, unit))
                self._changed.notify_all()
            self._announced[unit] = NOW
            self._changed.wait_for(lambda: self._closed or unit in self._ready)
            self.waited += time.perf_counter() - start
            if self._closed:
                raise RuntimeError(f"the run was closed while {unit} was being read")
            result = self._ready[unit]
        if isinstance(result, BaseException):
            raise result
        return result

    def release(self, unit: Unit) -> None:
        """The slice is used; it stays until its slot is wanted for another."""
        with self._lock:
            heappush(self._idle, self._entry(unit))
            del self._announced[unit]
            if len(self._idle) > 4 * len(self._slots):
                self._idle = [self._entry(unit) for unit in self._ready if unit not in self._announced]
                heapify(self._idle)
            self._changed.notify_all()

    def rewind(self) -> None:
        """Forget what was announced, where a pass was left in the middle; after an interrupt in any of the steps here."""
        with self._lock:
            self._missing.clear()
            self._changed.wait_for(lambda: not self._reading)
            self._announced.clear()
            for unit, result in list(self._ready.items()):
                if isinstance(result, BaseException) or unit not in self._slot_of:
                    del self._ready[unit]
            self._slot_of = {unit: slot for unit, slot in self._slot_of.items() if unit in self._ready}
            self._free = sorted({*range(len(self._slots))} - {*self._slot_of.values()})
            self._idle = sorted(self._entry(unit) for unit in self._ready)

    def stop(self) -> None:
        """Read no more; whoever waits for a slice gets an error."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads, after the reads that they are in."""
        self.stop()
        for thread in self._threads:
            thread.join()
        self._ready.clear()
        self._slots.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._closed or (self._missing and self._make_room()))
                if self._closed:
                    return
                _, unit = self._missing.pop(0)
                slot = self._slot_of[unit] = self._free.pop()
                self._reading += 1
            try:
                result = self._fill(unit, self._slots[slot])
            except BaseException as error:  # raised where the slice is taken
                result = error
            with self._lock:
                self._ready[unit] = result
                self._reading -= 1
                self.bytes_read += unit.nbytes
                if unit not in self._announced:
                    heappush(self._idle, self._entry(unit))
                self._changed.notify_all()

    def _make_room(self) -> bool:
        """Whether there is a slot for the first of what is missing. What is worth least goes for it.

        That is what nobody announced, of the expert used least; else what is needed last of all that was announced, where
        that is after the first of what is missing.
        """
        if self._free:
            return True
        while self._idle:
            score, unit = self._idle[0]
            if unit in self._ready and unit not in self._announced and score == self._score[unit.part]:
                if score > self._score[self._missing[0][1].part] and self._ahead() > len(self._threads):
                    return False  # enough is read ahead: what is used more stays, and a slot will be free
                self._forget(unit)
                return True
            heappop(self._idle)
        last = max(self._ready, key=self._announced.__getitem__, default=None)
        if last is None or self._announced[last] < self._missing[0][0]:
            return False
        self._forget(last)
        insort(self._missing, (self._announced[last], last), key=lambda entry: entry[0])
        return True

    def _leave(self) -> None:
        """What was announced and is not used after all may go."""
        for unit in [unit for unit, result in self._ready.items() if isinstance(result, BaseException)]:
            self._forget(unit)
        for unit in self._announced.keys() & self._ready.keys():
            heappush(self._idle, self._entry(unit))
        self._announced.clear()

    def _ahead(self) -> int:
        """Slots that hold, or wait for, what is to be used before the first of what is missing."""
        first, _ = self._missing[0]
        return sum(place < first and unit in self._slot_of for unit, place in self._announced.items())

    def _entry(self, unit: Unit) -> tuple[float, Unit]:
        return self._score[unit.part], unit

    def _forget(self, unit: Unit) -> None:
        slot = self._slot_of[unit]
        del self._ready[unit]
        del self._slot_of[unit]
        self._free.append(slot)
