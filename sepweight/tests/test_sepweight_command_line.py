"""`llm-sepweight` as a user starts it: what it prints, its exit status."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import llm_sepweight
from llm_sepweight import cli

LAYOUT = ("--layout", "tiny_layout:tiny")


@pytest.fixture
def run(tmp_path, layout, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tiny_layout", type("Module", (), {"tiny": staticmethod(layout)}))

    def command(*arguments: Any) -> tuple[int, str, str]:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse
            status = int(error.code or 0)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return command


@pytest.fixture
def directory(run, checkpoint, tmp_path) -> Path:
    assert run("split", checkpoint, tmp_path / "split", *LAYOUT)[0] == 0
    return tmp_path / "split"


def test_split_says_what_it_wrote_and_again_it_has_nothing_to_do(run, checkpoint, tmp_path):
    for _ in range(2):
        status, out, err = run("split", checkpoint, "split", *LAYOUT)
        assert (status, err) == (0, "")
        assert out.startswith("5 parts, ")
    facts = json.loads(run("split", checkpoint, "some", *LAYOUT, "--spec", "b 0:2", "--dtype", "float32", "--json")[1])
    assert facts["parts"] == ["begin", "mid.00000", "mid.00001"]
    assert facts["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "some").glob("*.safetensors"))
    with llm_sepweight.open("some") as weights:
        assert {str(info.dtype) for info in weights.tensors("mid.00000").values()} == {"torch.float32"}


def test_verify_names_damage_with_status_1_and_repairs_with_status_0(run, directory, checkpoint):
    assert run("verify", directory) == (0, f"{directory}: every byte is as it was written\n", "")
    file = directory / "mid.00001.safetensors"
    os.truncate(file, 100)
    status, out, _ = run("verify", directory)
    assert (status, out.split(":")[0]) == (1, "mid.00001.safetensors")
    status, out, _ = run("verify", directory, "--json")
    assert status == 1
    assert json.loads(out)["damaged"][0]["part"] == "mid.00001"
    status, out, _ = run("verify", directory, "--source", checkpoint, *LAYOUT)
    assert (status, out.endswith("repaired\n")) == (0, True)
    assert run("verify", directory)[0] == 0


def test_info_shows_parts_and_tensors_of_both_forms(run, directory, checkpoint):
    status, out, _ = run("info", directory)
    assert status == 0
    assert "tiny, split by llm_sepweight" in out
    assert "mid.00001  5        10.1 kB  BF16 F16 F32\n" in out
    assert "a checkpoint" in run("info", checkpoint, *LAYOUT)[1]
    assert "mid.00002  experts.weight  F16    [2, 9, 24]\n" in run("info", directory, "--tensors")[1]
    facts = json.loads(run("info", directory, "--json")[1])
    assert facts["source"] == "checkpoint"
    assert facts["parts"][0]["tensors"] == {"embed.weight": {"dtype": "BF16", "shape": [1000, 24], "nbytes": 48000}}


def test_filenames_lists_what_a_spec_needs(run, directory, checkpoint):
    _, out, _ = run("filenames", directory, "1:2 e")
    small = ["sepweight.json", "config.json", "tokenizer.json"]
    assert out.split() == [*small, "begin.safetensors", "mid.00001.safetensors", "end.safetensors"]
    _, out, _ = run("filenames", checkpoint, "0:1", *LAYOUT, "--json")
    small = ["model.safetensors.index.json", "config.json", "tokenizer.json"]
    assert json.loads(out)["files"] == [*small, "model-00001-of-00002.safetensors"]


def test_fetch_gets_the_parts_of_a_spec(run, directory, checkpoint):
    status, out, _ = run("fetch", directory, "0:2", "node", "--json")
    assert status == 0
    assert json.loads(out)["parts"] == ["mid.00000", "mid.00001"]
    status, out, _ = run("fetch", checkpoint, "0:2", "other-node", *LAYOUT, "--connections", "2")
    assert (status, out.split(",")[0]) == (0, "2 parts")
    assert run("diff", "node", "other-node")[0] == 0


def test_diff_and_export_go_round(run, directory, checkpoint, tensors, tmp_path):
    assert run("diff", checkpoint, directory, *LAYOUT) == (0, "the weights are the same\n", "")
    status, out, _ = run("export", directory, "back", "--max-shard", "40kB")
    assert (status, out.split(",")[0]) == (0, "model-00001-of-00002.safetensors")
    assert run("diff", checkpoint, "back", *LAYOUT)[0] == 0
    found = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == {key for key in tensors if "inv_freq" not in key}
    run("split", checkpoint, "other", *LAYOUT, "--dtype", "float16")
    status, out, _ = run("diff", directory, "other")
    assert status == 1
    assert "begin embed.weight: BF16 [1000, 24] and F16 [1000, 24]\n" in out
    assert json.loads(run("diff", directory, "other", "--json")[1])["same"] is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("split absent there", "there is no such directory"),
        ("split checkpoint there", "no installed package knows the model_type 'tiny'.* or pass --layout"),
        ("split checkpoint there --layout absent", "--layout absent: No module named"),
        ("split checkpoint there --layout json:absent", "--layout json:absent: module 'json' has no attribute"),
        ("split checkpoint there --layout tiny_layout:tiny --spec 7:9", "there is no mid.00007"),
        ("verify absent", "no such directory"),
        ("info there", "no such directory"),
        ("export split back --max-shard many", "--max-shard 'many': write a number and a unit"),
        ("fetch nowhere f there --header nonsense", "--header 'nonsense': write it as"),
        ("filenames split x", "'x' at character 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_status_2(run, directory, line, message):
    status, out, err = run(*line.split(" "))
    assert (status, out) == (2, "")
    assert err.startswith("llm-sepweight: ")
    assert err.count("\n") == 1
    assert re.search(message, err)


def test_an_error_of_the_program_is_told_apart_from_damage_that_was_found(run, directory, monkeypatch):
    def broken(*args: Any, **more: Any) -> None:
        raise KeyError("nobody expected this")

    monkeypatch.setattr(cli, "verify", broken)
    status, out, err = run("verify", directory)
    assert (status, out) == (70, "")
    assert "KeyError: 'nobody expected this'" in err
    assert "an error of the program itself" in err


def test_a_reader_who_has_enough_is_no_error(directory):
    theirs, ours = os.pipe()
    os.close(theirs)
    line = [sys.executable, "-m", "llm_sepweight.cli", "info", directory, "--tensors"]
    done = subprocess.run(line, stdout=ours, stderr=subprocess.PIPE, text=True)
    os.close(ours)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_teaches_and_an_unknown_command_is_refused(run):
    status, out, _ = run("--help")
    assert status == 0
    assert "exit status: 0 done; 1 damage" in out
    assert "70 an error of the program itself" in out
    for name in ("split", "verify", "fetch", "info", "filenames", "diff", "export"):
        assert f"\n    {name}" in out
        assert run(name, "--help")[0] == 0
    assert run("melt")[0] == 2


def test_progress_is_shown_on_a_terminal(checkpoint, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nfrom llm_sepweight import _copying\nreal = _copying.fill\n"
        "def fill(*args):\n    time.sleep(1)\n    real(*args)\n_copying.fill = fill\n"
        "def layout(key, config):\n    return [('end', key)]\n"
    )
    line = [sys.executable, "-m", "llm_sepweight.cli", "split", checkpoint, tmp_path / "new", "--layout", "slow"]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # rows and columns
    with subprocess.Popen(line, cwd=tmp_path, stderr=theirs, stdout=subprocess.PIPE) as process:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # it has ended
            while data := os.read(ours, 1000):
                shown += data
        process.wait(60)
    os.close(ours)
    assert process.returncode == 0, shown
    assert b"splitting" in shown
    assert b"B/s" in shown
