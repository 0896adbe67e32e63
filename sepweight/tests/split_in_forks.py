"""Runs `split` in forks of this process, which has imported all that it needs, and kills them where it is told to.

Reads a JSON object per line: source, destination, in_place, and step: the call that changes the disk, counted from 0, before
which the fork kills itself (SIGKILL), or null. Answers with a line: the fork's exit status, and how many such calls it made.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import threading
from typing import Any

import llm_sepweight

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import conftest

CHANGES = ("pwrite", "fsync", "replace", "unlink", "truncate", "mkdir")


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os._exit(split(order, writing))
        os.close(writing)
        _, status = os.waitpid(child, 0)
        counts = os.read(reading, 1 << 20)
        os.close(reading)
        print(json.dumps([os.waitstatus_to_exitcode(status), len(counts)]), flush=True)


def split(order: dict[str, Any], report: int) -> int:
    lock, write, count = threading.Lock(), os.write, 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            with lock:
                if count == order["step"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                write(report, b".")
            return function(*args, **more)

        return call

    of_paths = getattr(pathlib, "_NormalAccessor", None)  # in Python 3.10 paths have these functions from here
    for name in CHANGES:
        setattr(os, name, counted(getattr(os, name)))
        if hasattr(of_paths, name):
            setattr(of_paths, name, staticmethod(getattr(os, name)))
    layout = conftest._layout  # pyright: ignore[reportAttributeAccessIssue]
    try:
        llm_sepweight.split(order["source"], order["destination"], layout=layout, in_place=order["in_place"])
    except BaseException as error:
        print(repr(error), error, file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    main()
