"""A fetch that is killed at any moment, run again: the same bytes as undisturbed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_sepweight
from llm_sepweight import WeightError

KILLS = 25  # of each of two kinds
FORKS = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import conftest, httpx2, llm_sepweight
from llm_sepweight import _download

_download.WINDOW = 4096
for line in sys.stdin:
    url, destination, seconds = json.loads(line)
    child = os.fork()
    if child == 0:
        llm_sepweight.fetch(url, "f", destination, layout=conftest._layout)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Any]:
    """fetch(url, destination, seconds) in a process of its own, killed after so long; its exit status."""
    command = [sys.executable, "-c", FORKS, Path(__file__).parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def fetch(url: str, destination: Path, seconds: float | None = None) -> int:
            print(json.dumps([url, str(destination), seconds]), file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield fetch
        process.stdin.close()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["checkpoint", "split"])
def test_a_fetch_killed_at_any_moment_goes_on_to_the_same_bytes(kind, forks, checkpoint, layout, serve, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    url = serve({"checkpoint": checkpoint, "split": tmp_path / "split"}[kind]).url
    forks(url, tmp_path / "first")
    start = time.monotonic()
    assert forks(url, tmp_path / "undisturbed") == 0
    seconds = time.monotonic() - start
    undisturbed = contents(tmp_path / "undisturbed")
    moments, killed, resumed = random.Random(kind), 0, 0
    for number in range(KILLS):
        destination = tmp_path / str(number)
        if forks(url, destination, moments.uniform(0, seconds)) == -signal.SIGKILL:
            killed += 1
            if (destination / "sepweight.json").exists():  # its last moment: all was there already
                assert undisturbed.items() <= contents(destination).items()
            elif destination.exists():
                resumed += (destination / ".sepweight.fetch").exists()
                with pytest.raises(WeightError):
                    llm_sepweight.open(destination)
        else:
            seconds *= 0.9  # the machine has become faster
        assert forks(url, destination) == 0
        assert contents(destination) == undisturbed
    assert killed > KILLS / 2
    assert resumed > KILLS / 5


def test_a_fetch_that_is_killed_again_and_again_arrives(forks, checkpoint, layout, serve, tmp_path):
    url = serve(checkpoint).url
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    start = time.monotonic()
    assert forks(url, tmp_path / "undisturbed") == 0
    seconds = time.monotonic() - start
    runs = 0
    while forks(url, tmp_path / "node", seconds * 0.7) != 0:
        runs += 1
        assert runs < 20
    assert contents(tmp_path / "node") == contents(tmp_path / "undisturbed")
