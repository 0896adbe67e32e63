"""The benchmark of split, verify and reading, end to end on a tiny checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def test_it_measures_all_that_is_installed_and_leaves_only_the_checkpoint(tmp_path: Path):
    results = tmp_path / "results.json"
    command = [sys.executable, BENCH / "sepweight.py", "--shape", "tiny", "--layers", "2", "--dir", tmp_path / "data"]
    done = subprocess.run(
        [*command, "--rounds", "2", "--json", results, "--peers-dir", tmp_path / "none"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(results.read_text())
    runs = {run["work"]: run for run in written["runs"]}
    absent = runs.pop("runai-model-streamer")
    assert absent["error"] in done.stdout
    assert list(runs) == [
        "cp", "cp, then sync", "split", "verify", "load(part, into=)", "load, verify=lazy", "safetensors load_file",
        "safetensors safe_open",
    ]  # fmt: skip
    for run in runs.values():
        assert run["error"] is None
        assert len(run["seconds"]) == 2
        assert run["rate"] > 0
        assert run["nbytes"] == pytest.approx(written["shape"]["nbytes"], rel=0.02)
    assert runs["split"]["of_cp"] == pytest.approx(runs["split"]["rate"] / runs["cp"]["rate"])
    assert runs["split"]["peak"] >= runs["split"]["runtime"] > 0
    for work in ("verify", "load(part, into=)", "load, verify=lazy", "safetensors load_file"):
        rates = runs[work]["plain_rates"]
        assert len(rates) == 4  # before and after, each round
        of_both = [
            runs[work]["nbytes"] / seconds / ((before + after) / 2)
            for seconds, before, after in zip(runs[work]["seconds"], rates[::2], rates[1::2], strict=True)
        ]
        assert runs[work]["of_plain_reads"] == pytest.approx(sum(of_both) / 2)
    [checkpoint] = (tmp_path / "data").iterdir()
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "model.safetensors"]


def test_work_that_fails_is_told_and_makes_the_run_fail(tmp_path: Path):
    blocked = tmp_path / "data" / "llama-2x512x1376-h8-v4096-split"
    blocked.parent.mkdir()
    blocked.write_text("a file where the split model would go")
    command = [sys.executable, BENCH / "sepweight.py", "--shape", "tiny", "--layers", "2", "--dir", tmp_path / "data"]
    done = subprocess.run([*command, "--json", tmp_path / "results.json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "split: " in done.stdout
    assert "cannot be written" in done.stdout
