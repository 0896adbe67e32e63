"""Weights from memory and from streams, in old directories, to another store and back."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import llm_sepweight
from llm_sepweight import WeightError, diff, dump, export, filenames, verify

CONFIG = {"model_type": "tiny", "hidden_size": 24, "rope_theta": 1e4}


def assert_holds(directory: Path, expected) -> None:
    assert verify(directory) == []
    with llm_sepweight.open(directory, verify="lazy") as weights:
        assert weights.parts == tuple(expected)
        assert weights.config == CONFIG
        for part, wanted in expected.items():
            found = weights.load(part)
            assert set(found) == set(wanted)
            for name, tensor in wanted.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), name


def in_pieces(tensors, seed: int):
    """The tensors as a stream of dicts that cut layers anywhere."""
    keys = list(tensors)
    random.Random(seed).shuffle(keys)
    while keys:
        yield {key: tensors[key] for key in keys[:4]}
        del keys[:4]


def test_a_state_dict_in_memory_is_written_as_its_checkpoint_would_be(checkpoint, tensors, layout, expected, tmp_path):
    dump(tensors, tmp_path / "dumped", config=CONFIG, layout=layout)
    assert_holds(tmp_path / "dumped", expected)
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    for file in (tmp_path / "split").glob("*.safetensors"):
        assert (tmp_path / "dumped" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_may_cut_the_model_anywhere(tensors, layout, expected, tmp_path, seed):
    dump(in_pieces(tensors, seed), tmp_path / "dumped", config=CONFIG, layout=layout)
    assert_holds(tmp_path / "dumped", expected)
    assert not [name for name in os.listdir(tmp_path / "dumped") if name.startswith(".")]


@pytest.mark.parametrize("stream", [False, True])
def test_tied_tensors_are_stored_once_and_views_are_what_they_show(tmp_path, stream):
    base = torch.randn(100, 24)
    state = {"embed": base, "head": base, "columns": base[:, 3:7], "turned": base.T, "first": base[:10]}
    layout = {"embed": "begin", "head": "end", "columns": "end", "turned": "end", "first": "end"}
    dump([state] if stream else state, tmp_path, config={}, layout=lambda key, config: [(layout[key], key)])
    with llm_sepweight.open(tmp_path) as weights:
        found = weights.load("begin") | weights.load("end")
        assert weights.manifest is not None
        assert weights.manifest.parts["end"].tensors["head"] == {
            "part": "begin",
            "name": "embed",
            "keys": ["head"],
        }
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("order", [["embed", "head"], ["head", "embed"]])
def test_a_tensor_stands_in_its_own_place_before_one_that_is_tied_to_it(tmp_path, order):
    state = {key: torch.randn(4, 3) for key in order}
    layout = {"embed": [("begin", "embed"), ("end", "head")], "head": [("end", "head")]}
    ways = {"dict": state, "stream": [{key: tensor} for key, tensor in state.items()]}
    for way, tensors in ways.items():
        dump(tensors, tmp_path / way, config={}, layout=lambda key, config: layout[key])
        with llm_sepweight.open(tmp_path / way) as weights:
            assert torch.equal(weights.load("begin")["embed"], state["embed"])
            assert torch.equal(weights.load("end")["head"], state["head"])


def test_memory_of_one_dict_after_the_other_may_be_the_same(tmp_path):
    buffer = torch.zeros(8)

    def stream():
        for number in range(3):
            yield {str(number): buffer.fill_(number)}

    dump(stream(), tmp_path, config={}, layout=lambda key, config: [(f"mid.0000{key}", "x")])
    with llm_sepweight.open(tmp_path) as weights:
        assert [weights.load(part)["x"][0].item() for part in weights.parts] == [0, 1, 2]


def test_of_a_stream_one_dict_is_in_memory(tmp_path):
    def stream():
        before: weakref.ref | None = None
        for number in range(3):
            assert before is None or before() is None
            memory = np.full(8, number)
            before = weakref.ref(memory)
            yield {str(number): torch.from_numpy(memory)}
            del memory

    dump(stream(), tmp_path, config={}, layout=lambda key, config: [(f"mid.0000{key}", "x")])
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "there", "place", "message"),
    [
        ("other.safetensors", b"", ("end", "x"), "there are other weights here already.*other.safetensors"),
        ("config.json", b"{}", ("end", "x"), "is of another model.*config.json"),
        ("README.md", b"", ("nowhere", "x"), "the layout names a part 'nowhere'.*tensor 1"),
        ("README.md", b"", ("end", "x", -1), "the layout gives the index -1.*tensor 1"),
        ("README.md", b"", ("begin", "0"), "the layout puts it where 0 already is.*tensor 1"),
    ],
)
def test_what_is_wrong_is_said_before_more_of_a_stream_is_asked_for(tmp_path, name, there, place, message):
    (tmp_path / name).write_bytes(there)

    def stream():
        if name == "README.md":
            yield {"0": torch.ones(8)}
            yield {"1": torch.ones(8)}
        raise AssertionError("more is asked for")

    def layout(key, config):
        return [("begin", "0") if key == "0" else place]

    with pytest.raises(WeightError, match=message):
        dump(stream(), tmp_path, config={"model_type": "tiny"}, layout=layout)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: there}


@pytest.mark.parametrize("then", ["dump", "dump another", "fetch"])
def test_a_dump_that_was_killed_after_the_manifest_is_finished(
    checkpoint, tensors, layout, expected, tmp_path, monkeypatch, then
):
    def killed(directory: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("llm_sepweight._parts.remove_journal", killed)
        patched.setattr("shutil.rmtree", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            dump(in_pieces(tensors, 0), tmp_path / "new", config=CONFIG, layout=layout)
    assert {"sepweight.json", ".sepweight.journal", ".sepweight.stage"} <= set(os.listdir(tmp_path / "new"))
    if then == "dump":
        dump(in_pieces(tensors, 0), tmp_path / "new", config=CONFIG, layout=layout)
    elif then == "dump another":
        zeros = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
        with pytest.raises(WeightError, match="another split model here already"):
            dump(in_pieces(zeros, 0), tmp_path / "new", config=CONFIG, layout=layout)
    else:
        (tmp_path / "source").mkdir()
        for name in filenames(tmp_path / "new", "f"):
            (tmp_path / "source" / name).write_bytes((tmp_path / "new" / name).read_bytes())
        llm_sepweight.fetch(tmp_path / "source", "f", tmp_path / "new")
    assert not [name for name in os.listdir(tmp_path / "new") if name.startswith(".")]
    assert_holds(tmp_path / "new", expected)


KILLED = """
import os, shutil, signal, sys, torch, llm_sepweight

def die(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)

def stream():
    if sys.argv[2] == "staging":
        die()
    for number in range(3):
        yield {str(number): torch.full((8,), float(number))}

if sys.argv[2] == "record":
    llm_sepweight._parts.remove_journal = die
if sys.argv[2] == "stage":
    shutil.rmtree = die
if sys.argv[2] == "comparing":
    llm_sepweight._parts.checksums = die
llm_sepweight.dump(stream(), sys.argv[1], config={}, layout=lambda key, config: [(f"mid.0000{key}", "x")])
"""


@pytest.mark.parametrize("moments", [["stage"], ["stage", "staging"], ["record", "staging"], ["record", "comparing"]])
def test_a_dump_of_a_stream_that_is_killed_near_its_end_again_and_again_is_finished(tmp_path, moments):
    for moment in [*moments, ""]:
        done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, moment], capture_output=True, text=True)
        assert done.returncode == (-signal.SIGKILL if moment else 0), done.stderr
        assert (tmp_path / "sepweight.json").exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert verify(tmp_path) == []


def interrupt(done: int, total: int) -> None:
    if done > total * 3 // 4:
        raise KeyboardInterrupt


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("first", ["split", "dump of another", "dump of the same"])
def test_what_was_begun_is_written_over_by_the_same_dump_alone(
    checkpoint, layout, tensors, expected, tmp_path, monkeypatch, first, stream
):
    monkeypatch.setattr("llm_sepweight._copying.WINDOW", 4096)
    state = {key: tensor for key, tensor in tensors.items() if first == "dump of the same" or "layers.2" not in key}
    begin = partial(dump, [state] if stream else state, config=CONFIG)
    if first == "split":
        begin = partial(llm_sepweight.split, checkpoint)
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "new", layout=layout, progress=interrupt)
    before = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert {"begin.safetensors", ".sepweight.journal"} <= before.keys()
    again = [tensors] if stream else tensors
    if first == "dump of the same":
        dump(again, tmp_path / "new", config=CONFIG, layout=layout)
        assert_holds(tmp_path / "new", expected)
    else:
        with pytest.raises(WeightError, match="there are other weights here already.*begin.safetensors"):
            dump(again, tmp_path / "new", config=CONFIG, layout=layout)
        assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == before


SLOW = """
import sys, torch, llm_sepweight

def stream():
    for number in range(3):
        print("under way", flush=True)
        sys.stdin.readline()
        yield {str(number): torch.full((8,), float(sys.argv[2]) + number)}

llm_sepweight.dump(stream(), sys.argv[1], config={}, layout=lambda key, config: [(f"mid.0000{key}", "x")])
"""


def test_of_two_processes_that_dump_to_one_place_the_second_is_refused(tmp_path):
    def start(value: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SLOW, tmp_path / "dumped", str(value)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    with start(10) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "under way\n"
        with start(20) as second:
            _, said = second.communicate("\n\n\n")
        assert second.returncode == 1
        assert re.search("another process is writing here.*Wait until it is done", said)
        first.communicate("\n\n\n")
    assert first.returncode == 0
    with llm_sepweight.open(tmp_path / "dumped", verify="lazy") as weights:
        assert [weights.load(part)["x"][0].item() for part in weights.parts] == [10, 11, 12]


def test_what_cannot_be_dumped_is_named_and_nothing_looks_finished(tensors, layout, tmp_path):
    def end(key, config):
        return [("end", key)]

    for state, message in (
        ({"a": torch.empty(2, device="meta")}, "on meta cannot be stored.*tensor a"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "complex128 .*tensor a"),
        ([{"a": torch.ones(2)}, {"a": torch.ones(2)}], "twice in the stream.*tensor a"),
        ([{"a": torch.ones(2)}, {"b": torch.empty(2, device="meta")}], "meta.*tensor b"),
    ):
        with pytest.raises(WeightError, match=message):
            dump(state, tmp_path / "new", config={}, layout=end)
        assert "sepweight.json" not in (os.listdir(tmp_path / "new") if (tmp_path / "new").exists() else [])
    dump(tensors, tmp_path / "new", config=CONFIG, layout=layout)
    for state in (in_pieces(tensors, 0), {key: t + 1 for key, t in tensors.items()}):
        with pytest.raises(WeightError, match="split model here already"):
            dump(state, tmp_path / "new", config=CONFIG, layout=layout)


def test_a_dump_with_another_config_is_told_from_the_one_that_is_here(tmp_path):
    def end(key, config):
        return [("end", key)]

    config: Any = {0: 1}
    dump({"a": torch.zeros(2)}, tmp_path, config=config, layout=end)
    dump({"a": torch.zeros(2)}, tmp_path, config={"0": 1}, layout=end)  # on the disk it is the same
    for value in (torch.zeros(2), torch.ones(2)):
        with pytest.raises(WeightError, match="another split model here already"):
            dump({"a": value}, tmp_path, config={"0": 2}, layout=end)
    with pytest.raises(WeightError, match="another split model here already"):
        dump({"a": torch.ones(2)}, tmp_path, config=config, layout=end)
    with llm_sepweight.open(tmp_path) as weights:
        assert torch.equal(weights.load("end")["a"], torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_converts_floats_as_torch_does_and_nothing_else(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("llm_sepweight._copying.WINDOW", 4096)  # cuts tensors anywhere
    state = {
        "f32": torch.randn(1001, 7),
        "bf16": torch.randn(999, 5).bfloat16(),
        "f64": torch.randn(3, dtype=torch.float64),
        "f8": torch.randn(40).to(torch.float8_e4m3fn),
        "i32": torch.arange(5, dtype=torch.int32),
        "scalar": torch.tensor(0.1),
        "nothing": torch.empty(0, 3),
    }
    dump(state, tmp_path / "new", config={}, layout=lambda key, config: [("end", key)], dtype=dtype)
    with llm_sepweight.open(tmp_path / "new", verify="lazy") as weights:
        found = weights.load("end")
    for name, tensor in state.items():
        wanted = tensor.to(dtype) if name in ("f32", "bf16", "f64", "scalar", "nothing") else tensor
        assert found[name].dtype == wanted.dtype
        assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (found[name], wanted))), name


def test_a_dtype_that_is_no_float_is_refused(checkpoint, layout, tmp_path):
    with pytest.raises(ValueError, match="dtype: .*torch.bfloat16 are possible, not torch.int8"):
        llm_sepweight.split(checkpoint, tmp_path / "new", layout=layout, dtype=torch.int8)
    assert not (tmp_path / "new").exists()


# Directories of begin.pth, mid.00000.pth, ..., end.pth


@pytest.fixture
def old(tmp_path, expected) -> Path:
    directory = tmp_path / "old"
    directory.mkdir()
    for part, state in expected.items():
        torch.save(state, directory / f"{part}.pth")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def test_an_old_directory_is_a_store_without_a_layout_and_can_be_split(old, expected, tmp_path):
    with llm_sepweight.open(old) as weights:
        assert weights.parts == tuple(expected)
        assert torch.equal(weights.load("mid.00001")["up.weight"], expected["mid.00001"]["up.weight"])
    llm_sepweight.split(old, tmp_path / "split")
    assert_holds(tmp_path / "split", expected)


def test_a_layout_renames_the_tensors_of_an_old_directory(old, expected):
    def renamed(key, config):
        part, name = key.removesuffix(".weight")[:9].rstrip("."), key
        return [(part, f"renamed.{name}")] if part.startswith("mid") else []

    with llm_sepweight.open(old, renamed) as weights:
        assert weights.parts == ("mid.00000", "mid.00001", "mid.00002")
        assert set(weights.tensors("mid.00001")) == {f"renamed.mid.00001.{name}" for name in expected["mid.00001"]}


def test_an_old_directory_is_split_in_place(old, expected):
    llm_sepweight.split(old, old, in_place=True)
    assert not list(old.glob("*.pth"))
    assert_holds(old, expected)


@pytest.mark.parametrize(
    ("gone", "layers", "missing"),
    [(["mid.00001"], None, "mid.00001"), (["mid.00000"], None, "mid.00000"), (["mid.00002"], 3, "mid.00002")],
)
def test_an_old_directory_without_one_of_its_layers_is_refused(old, gone, layers, missing):
    for part in gone:
        (old / f"{part}.pth").unlink()
    if layers:
        (old / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    with pytest.raises(WeightError, match=f"the file is missing.*{missing}.pth, part {missing}.*Put it back"):
        llm_sepweight.open(old)


def test_an_old_directory_may_hold_what_one_machine_runs(old):
    for part in ("begin", "mid.00000", "end"):
        (old / f"{part}.pth").unlink()
    with llm_sepweight.open(old) as weights:
        assert weights.parts == ("mid.00001", "mid.00002")


def test_a_pickle_with_code_in_an_old_directory_is_refused_and_not_run(old, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"a": Attack()}, old / "mid.00001.pth")
    with pytest.raises(WeightError, match=r"refused.*mkdir.*mid.00001.pth, part mid.00001"):
        llm_sepweight.open(old)
    assert not (tmp_path / "made").exists()


def test_pth_shards_without_an_index_are_a_checkpoint(tensors, layout, expected, tmp_path):
    keys = list(tensors)
    for number in range(2):
        torch.save({key: tensors[key] for key in keys[number::2]}, tmp_path / f"consolidated.{number:02d}.pth")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    llm_sepweight.split(tmp_path, tmp_path / "split", layout=layout)
    assert_holds(tmp_path / "split", expected)


# The way back, and comparing


@pytest.fixture
def directory(checkpoint, layout, tmp_path) -> Path:
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    return tmp_path / "split"


@pytest.mark.parametrize("limit", [5_000_000_000, 30_000, 1])
def test_an_export_holds_the_tensors_under_the_names_that_they_had(directory, checkpoint, tensors, tmp_path, limit):
    export(directory, tmp_path / "back", max_shard_nbytes=limit)
    found = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        shard = load_file(file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= limit or len(shard) == 1
        found |= shard
    assert found.keys() == {key for key in tensors if "inv_freq" not in key}
    assert all(torch.equal(found[key], tensors[key]) for key in found)
    index = tmp_path / "back" / "model.safetensors.index.json"
    assert index.exists() == (limit < 5_000_000_000)
    if index.exists():
        assert set(json.loads(index.read_text())["weight_map"]) == set(found)
    assert (tmp_path / "back" / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


@pytest.mark.parametrize("form", ["memory", "stream", "bin", "in place", "split twice"])
def test_an_export_has_every_name_of_tensors_that_share_their_bytes(tmp_path, form):
    base = torch.randn(100, 24)
    state = {"embed": base, "norm": torch.randn(24), "head": base}
    parts = {"embed": "begin", "norm": "end", "head": "end"}

    def layout(key, config):
        return [(parts[key], f"{key}.weight")]

    if form in ("memory", "stream"):
        dump(state if form == "memory" else [state], tmp_path / "split", config={}, layout=layout)
    else:
        (tmp_path / "source").mkdir()
        torch.save(state, tmp_path / "source" / "pytorch_model.bin")
        llm_sepweight.split(tmp_path / "source", tmp_path / "split", layout=layout, in_place=form == "in place")
    if form == "split twice":
        (tmp_path / "split").rename(tmp_path / "first")
        llm_sepweight.split(tmp_path / "first", tmp_path / "split")
    assert sum(file.stat().st_size for file in (tmp_path / "split").glob("*.safetensors")) < 2 * base.nbytes + 8192
    export(tmp_path / "split", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_stack_of_one_goes_round(tmp_path, in_place):
    state = {"norm": torch.randn(3), "experts.0": torch.randn(4, 3), "wide": torch.randn(1, 4, 3)}
    places = {"norm": ("begin", "x"), "experts.0": ("end", "experts", 0), "wide": ("end", "wide")}
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors")
    llm_sepweight.split(
        tmp_path / "source", tmp_path / "split", layout=lambda key, config: [places[key]], in_place=in_place
    )
    with llm_sepweight.open(tmp_path / "split") as weights:
        assert weights.load("end")["experts"].shape == (1, 4, 3)
    export(tmp_path / "split", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_what_makes_no_whole_checkpoint_is_not_exported(directory, checkpoint, layout, tensors, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "some", layout=layout, spec="b 0:1 2:3 e")
    with pytest.raises(WeightError, match="mid.00001 is missing"):
        export(tmp_path / "some", tmp_path / "back")
    with pytest.raises(WeightError, match="there are other weights here already"):
        export(directory, checkpoint)
    layers = dict(CONFIG, num_hidden_layers=4)
    dump({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "few", config=layers,
         layout=lambda key, config: [("begin" if key == "a" else "end", key)])  # fmt: skip
    with pytest.raises(WeightError, match="mid.00000 is missing.*Fetch or split all parts"):
        export(tmp_path / "few", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_difference_is_named_with_part_and_tensor(directory, checkpoint, layout, tensors, tmp_path):
    assert diff(directory, checkpoint, layout=layout) == []
    other = {key: tensor.clone() for key, tensor in tensors.items()}
    other["layers.1.up.weight"][-1, -1] += 1
    other["layers.2.scale"] = other["layers.2.scale"].double()
    del other["layers.0.down.weight"]
    other = {key: tensor for key, tensor in other.items() if key != "norm.weight"} | {
        "layers.3.up.weight": torch.ones(1)
    }
    dump(other, tmp_path / "other", config=CONFIG, layout=layout)
    seen: list[tuple[int, int]] = []
    found = {str(each) for each in diff(directory, tmp_path / "other", progress=lambda *done: seen.append(done))}
    assert found == {
        f"mid.00000 down.weight: only in {directory}",
        "mid.00001 up.weight: the values differ",
        "mid.00002 scale: F32 [] and F64 []",
        f"mid.00003: only in {tmp_path / 'other'}",
        f"end norm.weight: only in {directory}",
    }
    assert seen[-1][0] == seen[-1][1]


def test_filenames_are_what_must_be_there_to_open_and_read_a_spec(directory, layout, expected, tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    for name in filenames(directory, "f"):
        (some / name).write_bytes((directory / name).read_bytes())
    assert verify(some) == []
    assert "mid.00001.safetensors" not in filenames(directory, "b 0:1 e")


def test_the_small_files_of_any_tokenizer_travel_along_and_nothing_else_does(checkpoint, layout, serve, tmp_path):
    small = {
        "qwen.tiktoken", "tekken.json", "sentencepiece.bpe.model", "spiece.model", "chat_template.jinja", "bpe.codes",
        "preprocessor_config.json", "source.spm", "merges.txt", "modeling_tiny.py", "LICENSE",
    }  # fmt: skip
    others = {"README.md", ".gitattributes", "training_args.bin", "pytorch_model.bin.index.json", "picture.png"}
    for name in small | others:
        (checkpoint / name).write_text(name)
    small |= {"config.json", "tokenizer.json"}
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    llm_sepweight.fetch(checkpoint, "f", tmp_path / "node", layout=layout)
    export(tmp_path / "split", tmp_path / "back")
    for directory in (tmp_path / "split", tmp_path / "node", tmp_path / "back"):
        found = {path.name for path in directory.iterdir() if path.suffix != ".safetensors"}
        assert found - {"sepweight.json"} == small
        assert all((directory / name).read_bytes() == (checkpoint / name).read_bytes() for name in small)


def test_a_bad_file_beside_a_checkpoint_does_not_travel_along(checkpoint, layout, tmp_path):
    (tmp_path / "secret").write_text("x")
    (checkpoint / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(WeightError, match="leads out of its directory.*tokenizer.model"):
        llm_sepweight.split(checkpoint, tmp_path / "new", layout=layout)
