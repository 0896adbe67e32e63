"""Files that are not what they should be: each is refused when the store is opened, before any weights are read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import llm_sepweight
from llm_sepweight import WeightError
from llm_sepweight._header import HEADER_LIMIT, read_header


def at_end(key, config):
    return [("end", key)]


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: object, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_a_missing_shard_names_file_part_and_tensor(checkpoint, layout):
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        WeightError, match=r"the file is missing \(file .*model-00002.*, part mid.00001, tensor .*\)\. Download"
    ):
        llm_sepweight.open(checkpoint, layout)


@pytest.mark.parametrize("cut", [1, 100, 100_000])
def test_a_truncated_shard_names_file_part_and_tensor(checkpoint, layout, cut):
    file = checkpoint / "model-00001-of-00002.safetensors"
    os.truncate(file, max(0, file.stat().st_size - cut))
    with pytest.raises(WeightError, match=r"cut short.*model-00001.*, part \w+.*, tensor .*\. Download"):
        llm_sepweight.open(checkpoint, layout)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None, "a\\b"])
def test_an_index_that_points_elsewhere_is_refused(checkpoint, layout, name):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"embed.weight": name}}))
    with pytest.raises(WeightError, match=r"not the name of a file.*index\.json.*tensor embed.weight"):
        llm_sepweight.open(checkpoint, layout)


def test_a_key_that_the_index_promises_must_be_in_the_file(checkpoint, layout):
    index = checkpoint / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["layers.7.up.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(WeightError, match="not in it.*model-00002.*part mid.00007, tensor layers.7.up.weight"):
        llm_sepweight.open(checkpoint, layout)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1, "a": 2}', "[" * 100_000, "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_cannot_be_read_is_named(checkpoint, layout, name, text):
    (checkpoint / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(WeightError, match=f"no valid JSON.*{name}"):
        llm_sepweight.open(checkpoint, layout)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_weight_map_is_refused(checkpoint, layout, content):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(WeightError, match="no weight_map"):
        llm_sepweight.open(checkpoint, layout)


def test_nothing_there_is_said_with_what_was_looked_for(tmp_path):
    with pytest.raises(WeightError, match="no such directory"):
        llm_sepweight.open(tmp_path / "absent", at_end)
    with pytest.raises(WeightError, match=r"none of model.safetensors.index.json, .*pytorch_model.bin"):
        llm_sepweight.open(tmp_path, at_end)


def test_a_pointer_of_git_lfs_is_recognised(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightError, match="git lfs pull"):
        llm_sepweight.open(tmp_path, at_end)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="not a regular file"):
        llm_sepweight.open(tmp_path, at_end)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, 6, "overlaps"),
        ({"a": entry(0, 4, [4]), "b": entry(5, 9, [4])}, 9, "gap"),
        ({"a": entry(0, 4, [5])}, 4, "takes 5"),
        ({"a": entry(0, 4, [4])}, 5, "longer than its header says"),
        ({"a": entry(0, 4, [4])}, 3, "cut short"),
        ({"a": entry(0, 1 << 60, [1 << 60])}, 4, "cut short"),
        ({"a": entry(-4, 0, [4])}, 4, "not possible"),
        ({"a": entry(0, 4, [-2, -2])}, 4, "not possible"),
        ({"a": entry(0, 0, [0, 1 << 40, 1 << 40])}, 0, "not possible"),
        ({"a": entry(0, 4, [1] * 65)}, 4, "not possible"),
        ({"a": entry(0, 4, [True, 4])}, 4, "not possible"),
        ({"a": entry(0, 4, [4.0])}, 4, "not possible"),
        ({"a": entry(0, 4, [4], "Q4")}, 4, "dtype 'Q4'"),
        ({"a": entry(0, 4, [4], ["U8"])}, 4, "dtype"),
        ({"a": {"dtype": "U8", "shape": [4]}}, 4, "no valid entry"),
        ({"a": {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}}, 4, "no valid entry"),
        ({"a": [1, 2]}, 4, "no valid entry"),
        ({"a": None}, 4, "no valid entry"),
        ([], 0, "no valid safetensors header"),
        (b'{"a": 1, "a": 2}', 0, "comes twice"),
        (b"\xff\xfe", 0, "no valid safetensors header"),
        (b'{"a":' * 50_000, 0, "no valid safetensors header"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, message):
    file = write(tmp_path / "model.safetensors", header, b"\0" * data)
    with pytest.raises(WeightError, match=message):
        read_header(file)


@pytest.mark.parametrize("length", [3, 1 << 40, HEADER_LIMIT + 1, (1 << 64) - 1])
def test_a_header_length_beyond_the_file_allocates_nothing(tmp_path, length):
    file = write(tmp_path / "model.safetensors", b"", b"", length)
    with pytest.raises(WeightError, match="its header claims"):
        read_header(file)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_header_is_refused_or_right_but_never_another_error(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.int8)}, file)
    content = bytearray(file.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 28), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        extents = read_header(file)
    except WeightError:
        return
    assert all(0 <= extent.offset <= extent.offset + extent.nbytes <= len(content) for extent in extents)
