from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import llm_sepweight
from llm_sepweight import WeightError
from llm_sepweight._checksum import checksum
from llm_sepweight._spec import chosen


@pytest.fixture
def directory(checkpoint, layout, tmp_path) -> Path:
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    return tmp_path / "split"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_same(weights: llm_sepweight.WeightStore, expected) -> None:
    assert weights.parts == tuple(expected)
    for part, wanted in expected.items():
        found = weights.load(part)
        assert set(found) == set(weights.tensors(part)) == set(wanted)
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_what_was_split_is_what_was_there(directory, checkpoint, expected):
    with llm_sepweight.open(directory) as weights:
        assert_same(weights, expected)
        assert weights.config == json.loads((checkpoint / "config.json").read_text())
    assert {path.name for path in directory.iterdir()} == {
        "begin.safetensors", "mid.00000.safetensors", "mid.00001.safetensors", "mid.00002.safetensors",
        "end.safetensors", "sepweight.json", "config.json", "tokenizer.json",
    }  # fmt: skip


def test_every_file_is_a_safetensors_file_with_its_data_on_a_page(directory, expected):
    for part, wanted in expected.items():
        file = directory / f"{part}.safetensors"
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 4096 == 0
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert torch.equal(opened.get_tensor(name), wanted[name])


def test_tensors_lie_as_aligned_as_their_sizes_allow(tmp_path):
    shapes = {"a": 3, "b": 4096, "c": 64, "d": 5, "e": 8192, "f": 128, "g": 0}
    source = tmp_path / "source"
    source.mkdir()
    save_file({name: torch.ones(n, dtype=torch.uint8) for name, n in shapes.items()}, source / "model.safetensors")
    llm_sepweight.split(source, tmp_path / "split", layout=lambda key, config: [("end", key)])
    with llm_sepweight.open(tmp_path / "split") as weights:
        for name, entry in weights._part("end").items():
            assert entry.extents[0].offset % (shapes[name] & -shapes[name] or 4096) == 0


def test_a_tied_matrix_is_stored_once(directory):
    manifest = json.loads((directory / "sepweight.json").read_text())
    assert manifest["parts"]["end"]["tensors"]["head.weight"] == {"part": "begin", "name": "embed.weight"}
    assert set(load_file(directory / "end.safetensors")) == {"norm.weight"}
    with llm_sepweight.open(directory) as weights:
        assert weights.tensors("end")["head.weight"] == weights.tensors("begin")["embed.weight"]


def test_the_manifest_says_what_each_file_holds(directory):
    manifest = json.loads((directory / "sepweight.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("sepweight", 1)
    assert manifest["tool"] == f"llm_sepweight {llm_sepweight.__version__}"
    for part, fields in manifest["parts"].items():
        assert fields["file"] == f"{part}.safetensors"
        assert fields["nbytes"] == (directory / fields["file"]).stat().st_size
        assert fields["checksum"] == checksum((directory / fields["file"]).read_bytes())
    experts = manifest["parts"]["mid.00001"]["tensors"]["experts.weight"]
    keys = [f"layers.1.experts.{expert}.weight" for expert in range(2)]
    assert experts == {"dtype": "F16", "shape": [2, 9, 24], "keys": keys}
    assert set(manifest["files"]) == {"config.json", "tokenizer.json"}
    for name, fields in manifest["files"].items():
        data = (directory / name).read_bytes()
        assert fields == {"nbytes": len(data), "checksum": checksum(data)}


def test_a_checksum_is_what_xxh128sum_prints():
    assert checksum(b"sepweight") == "xxh3_128:b52cbadfdc3df67f2ab3173c27e51057"  # printf sepweight | xxh128sum


def test_a_spec_writes_its_parts_and_those_that_their_tied_tensors_lie_in(directory, checkpoint, layout, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "some", layout=layout, spec="1:3 e")
    with llm_sepweight.open(tmp_path / "some") as weights:
        assert weights.parts == ("begin", "mid.00001", "mid.00002", "end")
    for file in (tmp_path / "some").glob("*.safetensors"):
        assert file.read_bytes() == (directory / file.name).read_bytes()


def test_splitting_a_split_model_gives_the_same_bytes(directory, tmp_path):
    with llm_sepweight.open(directory) as weights:
        llm_sepweight.split(weights, tmp_path / "again")
    for path in directory.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_progress_goes_up_to_all_bytes_written(checkpoint, layout, tmp_path):
    seen = []
    llm_sepweight.split(checkpoint, tmp_path / "new", layout=layout, progress=lambda *done: seen.append(done))
    written = sum(path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors"))
    assert seen == sorted(seen)
    assert seen[-1] == (written, written)


def test_a_split_model_is_not_overwritten(directory, checkpoint, layout):
    before = contents(directory)
    llm_sepweight.split(checkpoint, directory, layout=layout)  # nothing is left to do
    assert contents(directory) == before
    with pytest.raises(WeightError, match=r"another split model .*sepweight.json\)\. Choose another destination"):
        llm_sepweight.split(checkpoint, directory, layout=layout, spec="b 0:3")
    file = checkpoint / "model-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightError, match=r"another split model .*sepweight.json\)\. Choose another destination"):
        llm_sepweight.split(checkpoint, directory, layout=layout)
    with pytest.raises(WeightError, match="the same"):
        llm_sepweight.split(checkpoint, checkpoint, layout=layout)
    assert contents(directory) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", '{"other": 1}'), ("tokenizer.json", '{"other": 1}'), ("tokenizer.json", None), ("new.txt", "new")],
)
def test_a_model_of_the_same_shapes_is_told_from_the_one_that_is_here(directory, checkpoint, tmp_path, name, text):
    before = contents(directory)
    if text is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_text(text)
    places = json.loads((directory / "sepweight.json").read_text())["parts"]
    layout = {
        key: (part, name, *([i] if len(field["keys"]) > 1 else []))
        for part, fields in places.items()
        for name, field in fields["tensors"].items()
        for i, key in enumerate(field.get("keys", ()))
    }

    def same_shapes(key, config):
        tied = [("end", "head.weight")] if key == "embed.weight" else []
        return [layout[key], *tied] if key in layout else []

    with pytest.raises(WeightError, match=rf"another split model .*{name}\)\. Choose another destination"):
        llm_sepweight.split(checkpoint, directory, layout=same_shapes)
    assert contents(directory) == before


def test_a_split_that_fails_leaves_nothing_that_looks_finished(checkpoint, layout, tmp_path):
    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_sepweight.split(checkpoint, tmp_path / "new", layout=layout, progress=stop)
    assert "sepweight.json" not in os.listdir(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.partial"))
    with pytest.raises(WeightError, match="to this directory is not finished.*Run it again"):
        llm_sepweight.open(tmp_path / "new", layout)


def test_a_disk_that_is_full_is_said_with_the_file(checkpoint, layout, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(WeightError, match=r"No space left on device \(file .*begin.safetensors\)\. Make room"):
        llm_sepweight.split(checkpoint, tmp_path / "new", layout=layout)
    assert [path.name for path in (tmp_path / "new").iterdir() if "safetensors" in path.name] == []


@pytest.mark.parametrize("spelled", ["Infinity", '{"__float__": "Infinity"}', "1e999"])
@pytest.mark.parametrize("in_place", [False, True])
def test_infinity_and_nan_in_a_config_go_round_and_the_manifest_is_json(tmp_path, spelled, in_place):
    source, config = tmp_path / "source", f'{{"limits": [0.0, {spelled}, -Infinity], "unknown": NaN}}'
    source.mkdir()
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, source / "model.safetensors")
    (source / "config.json").write_text(config)

    def layout(key, config):
        assert config["limits"] == [0, math.inf, -math.inf]
        assert math.isnan(config["unknown"])
        return [("begin" if key == "a" else "end", key)]

    for _ in range(2):
        llm_sepweight.split(source, tmp_path / "split", layout=layout, in_place=in_place)
    text = (tmp_path / "split" / "sepweight.json").read_text()
    manifest = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert manifest["config"]["limits"] == [0, {"__float__": "Infinity"}, {"__float__": "-Infinity"}]
    with llm_sepweight.open(tmp_path / "split") as weights:
        layout("a", weights.config)
    llm_sepweight.export(tmp_path / "split", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_text() == config
    llm_sepweight.dump({"a": torch.ones(2)}, tmp_path / "dumped", config=weights.config, layout=layout)
    with llm_sepweight.open(tmp_path / "dumped") as weights:
        layout("a", weights.config)


def test_a_manifest_with_numbers_that_are_not_json_is_refused(directory):
    manifest = json.loads((directory / "sepweight.json").read_text())
    manifest["config"]["limit"] = math.inf
    seal(directory / "sepweight.json", manifest)
    with pytest.raises(WeightError, match="no valid JSON: Infinity is not JSON"):
        llm_sepweight.open(directory)


def change(directory: Path, path: str, value: object) -> None:
    """Set the field at `path` of the manifest; None removes it."""
    file = directory / "sepweight.json"
    manifest = json.loads(file.read_text())
    *way, last = path.split("|")
    fields = manifest
    for step in way:
        fields = fields[step]
    if value is None:
        del fields[last]
    else:
        fields[last] = value
    seal(file, manifest)


def seal(file: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the checksum that FORMAT.md asks for."""
    data = json.dumps(manifest | {"checksum": "xxh3_128:" + "0" * 32}).encode()
    file.write_bytes(data.replace(b"0" * 32, xxhash.xxh3_128(data).hexdigest().encode(), 1))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("version", 2, "version 2 of the format, newer than 1, which can be read.*Upgrade llm_sepweight"),
        ("version", True, "version True"),
        ("version", 0, "version 0; 'sepweight' version 1 can be read.*Split the model again"),
        ("version", None, "version None"),
        ("format", "other", "'other'"),
        ("config", None, "config, parts or files are missing"),
        ("parts", {}, "config, parts or files are missing"),
        ("files", [], "config, parts or files are missing"),
        ("files|../x", {"nbytes": 1, "checksum": "xxh3_128:" + "0" * 32}, "'../x', which is not the name of a file"),
        ("files|x", {"nbytes": -1, "checksum": "xxh3_128:" + "0" * 32}, "no valid entry for x"),
        ("files|x", {"nbytes": 1, "checksum": "md5:0"}, "no valid entry for x"),
        ("files|END.safetensors", {"nbytes": 1, "checksum": "xxh3_128:" + "0" * 32}, "taken"),
        ("files|sepweight.json", {"nbytes": 1, "checksum": "xxh3_128:" + "0" * 32}, "taken or reserved"),
        ("files|.x", {"nbytes": 1, "checksum": "xxh3_128:" + "0" * 32}, "taken or reserved"),
        ("tool", 7, "not a string"),
        ("source", None, "not a string"),
        ("parts|begin|checksum", None, "no valid entry.*part begin"),
        ("parts|begin|checksum", "xxh3_128:0", "no valid entry.*part begin"),
        ("parts|begin", 7, "no valid entry.*part begin"),
        ("parts|begin|file", "../begin.safetensors", "not the name of a file"),
        ("parts|begin|file", "absent.safetensors", "the file is missing.*part begin"),
        ("parts|begin|file", "end.safetensors", "'end.safetensors' is taken"),
        ("parts|begin|nbytes", 8192 * 7, "but 57344 in the manifest.*part begin"),
        ("parts|begin|tensors", [], "no valid entry|not in the manifest"),
        ("parts|middle", {}, "parts are begin"),
        ("parts|mid.00001|tensors|up.weight", None, "not in the manifest.*part mid.00001, tensor up.weight"),
        ("parts|mid.00001|tensors|new", {"dtype": "F32", "shape": [1]}, "not in the file.*tensor new"),
        ("parts|mid.00001|tensors|scale", {"dtype": "F32", "shape": [1]}, r"\[1\].* expected.*tensor scale"),
        (
            "parts|end|tensors|head.weight",
            {"part": "begin", "name": "no"},
            "another part.*part end, tensor head.weight",
        ),
        ("parts|end|tensors|head.weight", {"part": "end", "name": "head.weight"}, "another part"),
        ("parts|end|tensors|head.weight", {"part": []}, "no valid entry"),
        ("parts|end|tensors|head.weight", 5, "no valid entry"),
        ("parts|mid.00001|tensors|experts.weight|stacked", 1, "no valid entry"),
    ],
)
def test_a_manifest_that_is_not_true_is_refused(directory, path, value, message):
    change(directory, path, value)
    with pytest.raises(WeightError, match=message):
        llm_sepweight.open(directory)


def test_a_truncated_or_missing_part_is_named(directory):
    os.truncate(directory / "mid.00001.safetensors", 6000)
    with pytest.raises(WeightError, match="the file is cut short.*mid.00001.safetensors, part mid.00001, tensor"):
        llm_sepweight.open(directory)
    (directory / "mid.00001.safetensors").unlink()
    with pytest.raises(WeightError, match="the file is missing.*mid.00001.safetensors, part mid.00001"):
        llm_sepweight.open(directory)


PARTS = ("begin", "mid.00000", "mid.00001", "mid.00001/experts.00000", "mid.00002", "end")


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("f", PARTS),
        ("b 0:1", PARTS[:2]),
        ("e 1-2", ("mid.00001", "mid.00001/experts.00000", "end")),
        ("0:1 2:3", ("mid.00000", "mid.00002")),
    ],
)
def test_a_spec_names_parts(spec, names):
    assert chosen(spec, PARTS) == list(names)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "names nothing"),
        ("x", "'x' at character 1"),
        ("b 0:1x", "'x' at character 6"),
        ("b 0", "the end of '0'"),
        ("0:", "the end of '0:'"),
        ("2:1", "holds no layer"),
        ("2:9", "no mid.00003"),
        ("b,e", "',' at character 2|'b' at character 1"),
    ],
)
def test_a_bad_spec_is_refused_at_its_character(spec, message):
    with pytest.raises(ValueError, match=message):
        chosen(spec, PARTS)


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], names)  # type: ignore[index]
    with llm_sepweight.open("tiny-split") as weights:
        assert torch.equal(weights.load("end")["head.weight"], load_file("tiny/model.safetensors")["head"])
