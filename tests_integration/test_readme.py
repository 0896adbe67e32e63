"""The README's program is the one that a user would write: it runs as it stands there."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*line: str) -> str:
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_in_the_readme_runs_and_gives_the_right_answer():
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(program.splitlines()) <= 30
    shown = run("-c", program)
    assert "weights resident" in shown
    assert shown.strip().endswith("Paris")


def test_the_command_below_make_demo_stands_where_that_installs_it():
    (installs_into,) = re.findall(r"^BIN := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    _, after = (ROOT / "README.md").read_text().split("    make demo\n")
    assert re.findall(r"^    (\S+) generate", after, re.MULTILINE) == [f"{installs_into}/llm-partial-run"]


def test_the_demo_answers_and_its_streamed_logits_are_the_resident_ones():
    shown = run("demo/demo.py", "--question", "Is the sun a star?")
    assert "A: Yes" in shown
    assert "bit for bit" in shown


@pytest.mark.parametrize(
    ("memory", "message"), [("1MiB", "the smallest that works is"), ("x", "memory='x' is no size")]
)
def test_the_demo_refuses_a_memory_that_will_not_do_in_one_line(monkeypatch, capsys, memory, message):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--memory", memory])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "demo" / "demo.py"), run_name="__main__")
    assert message in capsys.readouterr().err.splitlines()[-1]
