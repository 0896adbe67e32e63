"""The benchmark end to end on a tiny checkpoint, and the pieces that its numbers rest on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import llm_llama_model

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import cgroup  # noqa: E402
import checkpoint  # noqa: E402
import experts  # noqa: E402
import mixture  # noqa: E402
import peers  # noqa: E402
import rates  # noqa: E402
import sampler  # noqa: E402
import speculation  # noqa: E402

TINY = checkpoint.SHAPES["tiny"]


@pytest.fixture
def in_cgroup() -> None:
    if reason := cgroup.why_not():
        pytest.skip(f"no memory cgroup: {reason}")


def run_bench(folder: Path, *arguments: str) -> tuple[str, dict]:
    command = [
        sys.executable,
        BENCH / "bench.py",
        "--shape",
        "tiny",
        "--dir",
        folder,
        "--json",
        folder / "results.json",
    ]
    done = subprocess.run(
        [*command, "--peers", "--tokens", "3", *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "results.json").read_text())


def test_bench_prints_a_table_and_writes_all_numbers(tmp_path: Path):
    printed, written = run_bench(tmp_path, "--memory", "smallest", "all")
    assert [run["error"] for run in written["runs"]] == [None, None]
    assert [run["memory"] is None for run in written["runs"]] == [False, True]
    for run in written["runs"]:
        assert len(run["seconds"]) == 3
        assert run["seconds_per_token"] > 0
        assert run["of_limit"] == pytest.approx(run["limit"] / run["seconds_per_token"])
        stats = run["last"]["stats"]
        assert stats["passes"] == 1
        parts = stats["seconds_computing"] + stats["seconds_waiting"] + stats["seconds_else"]
        assert parts == pytest.approx(stats["seconds_total"])
        assert run["last"]["tokens"] == written["runs"][0]["last"]["tokens"]
    assert len(written["disk_rates"]) == 4  # before and after each run
    table = printed[printed.index("memory  ", printed.index("s/token\n")) :]
    assert table.count("llm_partial_run") == 2
    if written["cgroup"] == "used":
        assert written["runs"][0]["capped"]
        assert written["runs"][0]["peak"] <= written["runs"][0]["memory"]


def test_a_budget_too_small_is_told_in_the_table(tmp_path: Path):
    command = [
        sys.executable,
        BENCH / "bench.py",
        "--shape",
        "tiny",
        "--dir",
        tmp_path,
        "--json",
        tmp_path / "results.json",
    ]
    done = subprocess.run([*command, "--peers", "--memory", "90MiB"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    [run] = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["error"]
    assert run["error"] in done.stdout


def test_the_checkpoint_is_one_that_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shape = replace(TINY, layers=2)
    monkeypatch.setattr(checkpoint, "BYTES_PER_SHARD", shape.nbytes // 3)
    path = checkpoint.write(shape, tmp_path, lambda line: None)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) > shape.nbytes
    model, told = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)  # pyright: ignore[reportGeneralTypeIssues]
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) * 2 == shape.nbytes
    assert model.lm_head.weight.std().item() == pytest.approx(checkpoint.STD, rel=0.02)
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_checkpoint_is_reused_where_it_is_whole_and_written_again_where_not(tmp_path: Path):
    def written() -> int:
        return (checkpoint.write(TINY, tmp_path, lambda line: None) / "model.safetensors").stat().st_mtime_ns

    first = written()
    assert written() == first
    with open(tmp_path / TINY.name / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert written() != first
    assert (tmp_path / TINY.name / "model.safetensors").stat().st_size > TINY.nbytes


def test_the_default_shape_is_6_85_gigabytes_of_which_a_pass_touches_6_65():
    shape = checkpoint.SHAPES["3b"]
    assert shape.nbytes == pytest.approx(6.85e9, rel=1e-3)
    assert shape.touched == shape.nbytes - 2 * 32000 * 3200


def test_disk_rate_reads_files_that_are_smaller_than_a_chunk(tmp_path: Path):
    file = tmp_path / "small"
    file.write_bytes(bytes(100_000))
    assert rates.disk([file], sample=1 << 20).rate > 0


@pytest.mark.usefixtures("in_cgroup")
def test_a_group_counts_what_a_command_uses_and_the_kernel_ends_one_that_wants_more():
    def use(nbytes: int) -> cgroup.Finished:
        command = [sys.executable, "-c", f"print(len(b'x' * {nbytes}))"]
        return cgroup.run(command, limit=200_000_000, timeout=60)

    fits = use(100_000_000)
    assert (fits.returncode, fits.killed, fits.stdout) == (0, False, "100000000\n")
    assert fits.peak is None or 100_000_000 < fits.peak <= 200_000_000
    assert use(400_000_000).killed


def test_a_command_that_takes_too_long_is_ended():
    with pytest.raises(TimeoutError, match="longer than 1 s"):
        cgroup.run(["sleep", "60"], limit=None, timeout=1)


def test_a_peer_that_cannot_be_installed_is_told_with_pips_own_words(tmp_path: Path):
    peer = peers.Peer("broken", ("./there-is-no-such-folder",), "none.py", has_torch=False)
    error = peers.install(peer, tmp_path)
    assert error is not None
    assert "there-is-no-such-folder" in error
    assert not peer.installed(tmp_path)


def test_layers_of_a_bloom_are_measured_at_real_size_and_deleted(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "desktop.py", "--preset", "bloom-560m", "--layers", "3", "--tokens", "1", "64"]
    command += ["--memory", "700MiB", "--plans", "700MiB", "--dir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "of 1.52 GiB, computing in bfloat16" in done.stdout  # 24 layers, begin and end
    rows = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("700MiB")]
    assert [row[:2] for row in rows if len(row) == 11] == [["700MiB", "1"], ["700MiB", "64"]]
    assert done.stdout.count("disk GB/s") == 1  # beside what each run read, as the disk was then
    assert not list(tmp_path.iterdir())


def test_a_mixture_reads_the_experts_that_are_wanted_and_absent(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "mixture.py", "--shape", "tiny", "--dir", tmp_path, "--tokens", "3"]
    command += ["--warm-up", "2", "--memory", "smallest", "--json", tmp_path / "results.json"]
    subprocess.run(command, capture_output=True, text=True, check=True)
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert 0 < run["read_per_token"] < run["read_by_whole_layers"]
    assert 0 <= run["hits"] < 1
    assert 0 < run["held"] < 1


def test_the_measured_mixture_has_no_favourites_whatever_its_router_says() -> None:
    config = llm_llama_model.Config.from_hf(mixture.SHAPES["tiny"].config)
    router: Any = llm_llama_model.parts(config, "0:1")["mid.00000"].get_submodule("mlp")
    router.gate.weight = torch.nn.Parameter(torch.eye(8, 256))
    uses = mixture.send_evenly(router, seed=0)
    chosen, _ = router(torch.arange(256.0).repeat(1000, 1))  # the same for all tokens, as if it were what they share
    assert all(len(set(pair)) == 2 for pair in chosen.tolist())
    assert uses == Counter(chosen.flatten().tolist())
    assert mixture.used_most([uses], experts=8) == pytest.approx(0.25, abs=0.03)
    assert mixture.used_most([Counter({2: 6, 5: 2, 7: 2})], experts=8) == 0.8


def test_what_is_said_of_the_measured_mixture_elsewhere_is_what_its_bench_says() -> None:
    bench, package = ((BENCH.parent / name / "README.md").read_text() for name in ("bench", "partial_run"))
    (said,) = re.findall(r"Mixtral's shape without favourites[^`]*", package)
    (table,) = re.findall(r"bench/mixture\.py .*?\n\n## ", bench, re.DOTALL)
    assert set(re.findall(r"\d+\.\d+", said)) <= set(re.findall(r"\d+\.\d+", table))
    size = f"{mixture.SHAPES['small'].nbytes / 1e9:.1f} GB"
    assert all(size in text for text in (said, table, str(mixture.__doc__)))


def test_the_recorded_choices_of_experts_give_the_table_of_the_readme(tmp_path: Path) -> None:
    experts.main(["--json", str(tmp_path / "rates.json")])
    rates = json.loads((tmp_path / "rates.json").read_text())["hit_rates"]
    rows = [line.strip("| ").split(" | ") for line in (BENCH / "README.md").read_text().splitlines()]
    shown = {name: row for name, *row in rows if name in rates}
    assert len(shown) == 6
    assert shown == {name: [f"{100 * rate:.1f} %" for rate in rates[name]] for name in shown}


def test_all_rules_are_counted_on_the_second_half_alone_which_finds_them_warm() -> None:
    cold = [[[2 * (t % 8), 2 * (t % 8) + 1]] * experts.LAYERS for t in range(8)]  # each expert once
    settled = [[[0, 1]] * experts.LAYERS for _ in range(8)]
    slots = experts.LAYERS * experts.EXPERTS
    for name, rule in experts.RULES.items():
        assert experts.hit_rate(rule, cold + settled, slots) == 1, name
        assert experts.hit_rate(rule, settled + cold, 2 * experts.LAYERS) == 1 / 8, name


def test_choices_of_experts_are_read_as_they_were_written(tmp_path: Path) -> None:
    trace = [[[3, 15], [0, 7]], [[1, 2], [10, 11]]]
    experts.write_trace(trace, tmp_path / "trace.txt")
    assert experts.read_trace(tmp_path / "trace.txt") == trace


def test_bench_of_the_sampler_times_both_beside_the_same_model(tmp_path: Path):
    command = [sys.executable, BENCH / "sampler.py", "--vocabulary", "500", "--prompt", "5", "--steps", "4"]
    options = ["--rows", "1", "3", "--peer-rows", "1", "--rounds", "2", "--settings", "greedy", "eta 3e-4"]
    options += ["--json", tmp_path / "sampler.json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "sampler.json").read_text())
    assert {(result["settings"], result["rows"]) for result in results} == {
        (settings, rows) for settings in ("greedy", "eta 3e-4") for rows in (1, 3)
    }
    for result in results:
        assert len(result["llm_sampler"]) == 2
        assert len(result["transformers"]) == (2 if result["rows"] == 1 else 0)
        assert all(seconds > 0 for seconds in result["llm_sampler"] + result["transformers"])


def test_logits_that_are_ready_are_others_in_the_next_step() -> None:
    ids = torch.randint(500, (2, 5), generator=torch.Generator().manual_seed(0))
    ready = sampler.Ready(sampler.peaked_model(500), ids)
    steps = [ready.last_logits(ids.new_zeros(2, length), None, 1) for length in (5, 6, 5)]
    assert not torch.equal(steps[0], steps[1])
    assert torch.equal(steps[0], steps[2])


whole_history = pytest.mark.skipif(
    not (BENCH.parent / ".git").exists() or (BENCH.parent / ".git/shallow").exists(),
    reason="the texts come from the repository's history",
)


@whole_history
def test_bench_of_speculation_counts_more_than_a_token_a_forward_where_text_is_grounded(tmp_path: Path):
    command = [sys.executable, BENCH / "speculation.py", "--texts", "1", "--tokens", "8", "--vocabulary", "1000"]
    done = subprocess.run([*command, "--json", tmp_path / "out.json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert {(result["text"], result["branches"]) for result in results} == {
        (text, branches) for text in ("edit", "quote", "other") for branches in (1, 4)
    }
    assert all(result["tokens_per_forward"] > 2 for result in results if result["text"] != "other")
    assert all(result["tokens_per_forward"] == result["gained"] / result["forwards"] for result in results)


@whole_history
def test_texts_of_speculation_stay_what_they_are_when_the_repository_goes_on(tmp_path: Path, monkeypatch):
    texts = [speculation.edits(2), speculation.quotes(2), speculation.halves(2)]
    subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", BENCH.parent, tmp_path], check=True)
    (tmp_path / "README.md").write_text("This is written later, and longer than it has to be. " * 20)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=Say more"]
    subprocess.run(["git", "add", "README.md"], cwd=tmp_path, check=True)
    subprocess.run([*commit, "--no-gpg-sign", "README.md"], cwd=tmp_path, check=True)
    monkeypatch.setattr(speculation, "ROOT", tmp_path)
    assert [speculation.edits(2), speculation.quotes(2), speculation.halves(2)] == texts


@whole_history
def test_bench_of_speculation_says_that_a_shallow_clone_lacks_its_texts(tmp_path: Path, monkeypatch):
    origin = BENCH.parent.as_uri()
    subprocess.run(["git", "clone", "--quiet", "--depth=1", "--no-checkout", origin, tmp_path], check=True)
    monkeypatch.setattr(speculation, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["speculation.py", "--texts", "1", "--vocabulary", "300"])
    with pytest.raises(SystemExit, match="git fetch --unshallow"):
        speculation.main()
