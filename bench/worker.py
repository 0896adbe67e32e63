"""What every measured process shares: the job it is given, the clock, and the JSON it prints. Needs nothing but Python."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One greedy decode of some prompts of equal length, until `tokens` passes are timed or `seconds` are over."""

    checkpoint: str
    copy: str  # where a peer that cannot use the checkpoint in place puts its own copy
    memory: int | None  # bytes for the whole process; None: everything may be resident
    prompts: list[list[int]]
    context: int
    tokens: int
    seconds: float
    share: float = 0.75  # of the memory may be weights, for a peer that is told nothing but that

    def to_json(self) -> str:
        return json.dumps(asdict(self))


Decode = Generator[list[int], None, None]  # each `next` is one pass, and gives the token of each row


def serve(
    load: Callable[[Job], tuple[Decode, Callable[[], dict[str, Any]]]],
    prepare: Callable[[Job], object] = lambda job: None,
) -> None:
    """The main function of a worker: `worker.py JOB` measures, `worker.py JOB prepare` converts the checkpoint.

    `load` gives the passes, and a function that tells what the worker knows about itself, asked after the first pass and at
    the end: numbers of `stats` are given as their growth between both, a pass.
    """
    job = Job(**json.loads(sys.argv[1]))
    if sys.argv[2:] == ["prepare"]:
        prepare(job)
        return
    start, runtime = time.perf_counter(), _resident_set()
    decode, about = load(job)
    loaded = time.perf_counter()
    tokens = [next(decode)]
    first = time.perf_counter() - loaded
    before = about().get("stats", {})
    samples: list[float] = []
    begun = time.perf_counter()
    while len(samples) < job.tokens and (len(samples) < 2 or time.perf_counter() - begun < job.seconds):
        lap = time.perf_counter()
        tokens.append(next(decode))
        samples.append(time.perf_counter() - lap)
    facts = about()
    facts["stats"] = {k: (v - before[k]) / len(samples) for k, v in facts.get("stats", {}).items()}
    decode.close()
    result = {
        "seconds_per_token": samples,  # one pass gives one token to each row
        "seconds_first_pass": first,
        "seconds_load": loaded - start,
        "runtime": runtime,  # bytes that Python and the libraries had in use before anything was opened
        "resident_set": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tokens": tokens,
        **facts,
    }
    print("\n" + json.dumps(result), flush=True)


def threads() -> int:
    """Processors that this process may use: as many threads as every worker computes with."""
    return len(os.sched_getaffinity(0))


def _resident_set() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
