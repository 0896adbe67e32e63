"""A fetch that is killed at any moment, run again: the same bytes as undisturbed."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import llm_sepweight
from llm_sepweight import WeightError

KILLS = 25  # of each of two kinds
FORKS = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import conftest, httpx2, llm_sepweight
from llm_sepweight import _download

_download.WINDOW = 4096
for line in sys.stdin:
    url, destination = json.loads(line)
    child = os.fork()
    if child == 0:
        llm_sepweight.fetch(url, "f", destination, layout=conftest._layout)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Any]:
    """fetch(server, destination, kill_at, after) in a process of its own, killed so many seconds after its nth request."""
    command = [sys.executable, "-c", FORKS, Path(__file__).parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        orders, answers = process.stdin, process.stdout
        assert orders is not None
        assert answers is not None

        def fetch(server: Any, destination: Path, kill_at: int = 0, after: float = 0) -> int:
            count, pids = itertools.count(1), []

            def kill(request: Any) -> bool:
                if next(count) == kill_at:
                    while not pids:
                        time.sleep(0.001)
                    time.sleep(after)
                    with suppress(ProcessLookupError):  # it was done before
                        os.kill(pids[0], signal.SIGKILL)
                return False

            server.trick = kill
            print(json.dumps([server.url, str(destination)]), file=orders, flush=True)
            pids.append(int(answers.readline()))
            return int(answers.readline())

        yield fetch
        orders.close()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["checkpoint", "split"])
def test_a_fetch_killed_at_any_moment_goes_on_to_the_same_bytes(kind, forks, checkpoint, layout, serve, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    server = serve({"checkpoint": checkpoint, "split": tmp_path / "split"}[kind])
    assert forks(server, tmp_path / "undisturbed") == 0
    requests = len(server.requests)
    undisturbed = contents(tmp_path / "undisturbed")
    moments, killed, begun = random.Random(kind), 0, 0
    for number in range(KILLS):
        destination = tmp_path / str(number)
        if forks(server, destination, moments.randint(1, requests), moments.uniform(0, 0.02)) == -signal.SIGKILL:
            killed += 1
            if (destination / "sepweight.json").exists():  # its last moment: all was there already
                assert undisturbed.items() <= contents(destination).items()
            elif destination.exists():
                begun += (destination / ".sepweight.fetch").exists()
                with pytest.raises(WeightError):
                    llm_sepweight.open(destination)
        assert forks(server, destination) == 0
        assert contents(destination) == undisturbed
    assert killed > KILLS / 2
    assert begun > KILLS / 5


def test_a_fetch_that_is_killed_again_and_again_arrives(forks, checkpoint, serve, tmp_path):
    server = serve(checkpoint)
    assert forks(server, tmp_path / "undisturbed") == 0
    requests = len(server.requests)
    runs = 0
    while forks(server, tmp_path / "node", kill_at=requests * 4 // 5) != 0:  # small files take the first half of them
        runs += 1
        assert runs < 20
    assert runs > 0
    assert contents(tmp_path / "node") == contents(tmp_path / "undisturbed")
