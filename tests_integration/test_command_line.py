"""`llm-partial-run` as a user starts it: a process, its output, its exit status."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tqdm
from tokenizers import Tokenizer

from llm_partial_run import cli

MODEL = Path(__file__).parent.parent / "demo" / "model"
PROMPT = "Q: What is the capital of France?\nA:"


def command(*arguments, **options):
    line = [sys.executable, "-m", "llm_partial_run.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def test_generate_prints_the_answer_on_stdout_and_the_plan_and_cost_on_stderr():
    done = command("generate", MODEL, "--prompt", PROMPT, "--memory", "1GiB", "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Paris"
    assert "weights resident" in done.stderr
    assert "waiting for the disk" in done.stderr


def test_generate_for_a_script_is_one_json_object():
    done = command("generate", MODEL, "--prompt", "-", "--memory", "1GiB", "--json", input=PROMPT)
    facts = json.loads(done.stdout)
    assert facts["text"].strip() == "Paris"
    assert facts["peak_memory"] < facts["plan"]["memory"] == 1 << 30


def test_plan_loads_nothing_and_says_where_every_byte_goes():
    done = command("plan", MODEL, "--memory", "1GiB")
    assert done.returncode == 0
    assert "read per pass" in done.stdout
    assert json.loads(command("plan", MODEL, "--memory", "1GiB", "--json").stdout)["memory"] == 1 << 30


def test_the_smallest_budget_that_an_error_names_works():
    refused = command("generate", MODEL, "--prompt", PROMPT, "--memory", "10MiB", "--max-new-tokens", 4)
    assert refused.returncode == 2
    assert "too small" in refused.stderr
    smallest = refused.stderr.split("the smallest that works is ")[1].split()[0]
    done = command("generate", MODEL, "--prompt", PROMPT, "--memory", smallest, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Paris"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: (m / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer"),
        (lambda m: (m / "config.json").unlink(), "config.json does not exist"),
        (lambda m: (m / "config.json").write_text('{"model_type": "t5"}'), "'t5'"),
        (lambda m: (m / "config.json").write_text('{"model_type": ["llama"]}'), "['llama']"),
        (lambda m: (m / "model.safetensors").unlink(), "safetensors"),
        (lambda m: os.truncate(m / "model.safetensors", 1_000_000), "model.safetensors"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_model_is_said_in_one_line(model, break_it, message):
    break_it(model)
    done = command("generate", model, "--prompt", PROMPT, "--memory", "1GiB")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: edit(m / "config.json", hidden_act="gelu"), "{}/config.json: hidden_act 'gelu'"),
        (lambda m: edit(m / "config.json", num_hidden_layers=7), "no part 'mid.00006'.*(file {}). Take weights"),
        (lambda m: edit(m / "config.json", intermediate_size=48), "in the weights in {} and .* Take weights"),
        (lambda m: (m / "config.json").write_bytes(b"\xff"), "{}/config.json is no model's config.* download it"),
        (lambda m: (m / "generation_config.json").write_bytes(b"\xff"), "{}/generation_config.json is damaged"),
        (lambda m: shutil.rmtree(m), "{}/config.json does not exist: give the directory of a checkpoint"),
    ],
)  # fmt: skip
def test_the_file_at_fault_is_named(model, capsys, break_it, message):
    break_it(model)
    assert cli.main(["generate", str(model), "--prompt", PROMPT, "--memory", "1GiB"]) == 2
    out, errors = capsys.readouterr()
    assert re.search(message.replace("(", r"\(").replace(")", r"\)").format(model), errors), errors
    assert (out, errors.count("\n")) == ("", 1)


def test_a_model_of_no_family_is_sent_to_offload_and_not_to_a_package_that_is_installed(model, capsys, monkeypatch):
    edit(model / "config.json", model_type="mpt")
    assert cli.main(["plan", str(model)]) == 2
    errors = capsys.readouterr().err
    assert "runs the model_type 'mpt'; those here run " in errors
    assert "or run it with transformers under llm_partial_run.offload" in errors
    assert "llm_llama_model" not in errors
    monkeypatch.setattr(cli, "entry_points", lambda group: [])
    assert cli.main(["plan", str(model)]) == 2
    assert "those here run none. Install llm_llama_model, or another family's package" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [1.5, [[1]], "abc", True, -1, [0, 1000]])
def test_an_end_of_text_that_is_no_id_is_refused_with_its_file(model, capsys, wrong):
    path = model / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": wrong}))
    assert cli.main(["generate", str(model), "--prompt", PROMPT, "--memory", "1GiB"]) == 2
    assert (
        f"{path}: eos_token_id has to be an id below 1000, a list of them or null, and is {wrong!r}"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("eos", [None, 0, [], [3, 0]])
def test_an_end_of_text_may_be_an_id_or_several_or_none(model, capsys, eos):
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert cli.main(["generate", str(model), "--prompt", PROMPT, "--memory", "8GiB", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip() == "Paris"


def test_more_tokens_than_a_model_is_supported_for_are_refused_before_anything_is_loaded(model, capsys):
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    edit(model / "config.json", rope_parameters=dynamic, max_position_embeddings=64, eos_token_id=None)
    longest = 65 - len(Tokenizer.from_file(str(model / "tokenizer.json")).encode(PROMPT).ids)
    line = ["generate", str(model), "--prompt", PROMPT, "--memory", "8GiB", "--json", "--max-new-tokens"]
    assert cli.main([*line, str(longest)]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == longest
    assert cli.main([*line, str(longest + 1)]) == 2
    out, errors = capsys.readouterr()
    assert (out, errors.count("\n")) == ("", 1)
    assert f"--max-new-tokens {longest + 1} together are more than the 65 up to which this model is supported" in errors


def test_a_tokenizer_file_made_for_training_neither_cuts_nor_pads_the_prompt(model):
    facts = json.loads((model / "tokenizer.json").read_text())
    facts["truncation"] = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    facts["padding"] = {"strategy": {"Fixed": 90}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
                        "pad_token": "<pad>"}  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(facts))
    done = command("generate", model, "--prompt", PROMPT, "--memory", "1GiB", "--max-new-tokens", 8)
    assert done.stdout.strip() == "Paris", done.stderr


def test_a_prompt_that_is_no_text_is_named():
    done = command("generate", MODEL, "--prompt", os.fsdecode(b"\xff"), "--memory", "1GiB")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the prompt is no UTF-8" in done.stderr


def test_a_prompt_on_stdin_that_is_no_text_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Q: \xff"), "utf-8"))
    assert cli.main(["generate", str(MODEL), "--prompt", "-", "--memory", "1GiB"]) == 2
    assert "the prompt is no UTF-8 ('utf-8' codec can't decode byte 0xff in position 3" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_the_command_without_a_traceback():
    line = [sys.executable, "-m", "llm_partial_run.cli", "plan", MODEL, "--memory", "1GiB"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing) as nobody_reads:
        done = subprocess.run(
            line,
            stdout=nobody_reads,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONUNBUFFERED": ""},
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_the_bar_runs_once_from_start_to_end_however_many_passes_the_prompt_takes(monkeypatch):
    seen: list[tuple[int, int]] = []

    class Bar(tqdm.tqdm):
        def __init__(self, **settings) -> None:
            super().__init__(**settings | {"disable": False, "delay": 0, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            seen.append((int(self.n), self.total))
            return shown

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with cli.Bar() as progress:
        progress.passes = 3
        for _ in range(3):
            for part in range(5):
                progress("pass", part, 4)
    assert seen == [(4 * passed + part, 12) for passed in range(3) for part in range(5)]


def test_an_empty_prompt_is_refused():
    done = command("generate", MODEL, "--prompt", "", "--memory", "1GiB")
    assert (done.returncode, done.stdout) == (2, "")
    assert "prompt is empty" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "1.5"), "top_p"),
        (("--top-k", "-3"), "top_k"),
        (("--max-new-tokens", "-2"), "max_new_tokens"),
        (("--max-new-tokens", "8", "--context", "9"), "--context 9 is less"),
        (("--tokens", "0"), "tokens=0"),
        (("--memory", "4 gigs"), "memory='4 gigs' is no size"),
        (("--memory", "-1"), "memory='-1' is no size"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(arguments, message):
    done = command("generate", MODEL, "--prompt", PROMPT, "--memory", "1GiB", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1  # no plan: nothing was loaded
    assert message in done.stderr


def test_a_prompt_beyond_the_vocabulary_is_refused_before_anything_is_loaded(model):
    text = (model / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    tokenizer["added_tokens"].append({"id": 99999, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False,
                                      "normalized": False, "special": True})  # fmt: skip
    tokenizer["model"]["vocab"]["<far>"] = 99999
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = command("generate", model, "--prompt", "A<far>", "--memory", "1GiB")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "99999" in done.stderr


def test_an_interrupt_ends_the_command_at_once_and_without_a_traceback():
    line = [sys.executable, "-u", "-m", "llm_partial_run.cli", "generate", str(MODEL), "--prompt", PROMPT]
    line += ["--memory", "1GiB", "--max-new-tokens", "20000", "--temperature", "100", "--seed", "1"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
    try:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    process.stdout.read(1)  # it has begun
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_without_its_extra_the_command_says_what_to_install():
    code = "import sys; sys.modules['llm_sepweight'] = None; from llm_partial_run.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "plan", str(MODEL)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "llm_partial_run[cli]" in done.stderr
