"""Whatever the bytes of manifest, index and header are: a WeightError, or the truth; never another error, never a claim of memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import llm_sepweight
from llm_sepweight import WeightError
from llm_sepweight._manifest import NewerError, parse_manifest

ZEROS = "xxh3_128:" + "0" * 32


def at_end(key, config):
    return [("end", key)]


def sealed(manifest: Any) -> bytes:
    """With the checksum that it must have, so that what lies behind that check is reached."""
    data = json.dumps(manifest).encode()
    return data.replace(b"0" * 32, xxhash.xxh3_128(data).hexdigest().encode(), 1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("model")
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3)}, place / "model.safetensors")
    (place / "config.json").write_text('{"model_type": "tiny"}')

    def layout(key, config):
        return [("begin", key), ("end", key)] if key == "a" else [("mid.00000", key)]

    llm_sepweight.split(place, place / "split", layout=layout)
    return place / "split"


nothing_special = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["begin", "end", "mid.00000", "a", "F32", ZEROS, "../x", "/etc/passwd", "begin.safetensors", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def paths(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value within a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(path for key, inner in items for path in paths(inner, (*way, key)))]


def changed(document: Any, way: tuple[Any, ...], value: Any) -> Any:
    if not way:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[way[0]] = changed(document[way[0]], way[1:], value)
    return copy


FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_a_manifest_with_any_value_anywhere_is_refused_or_true(directory, tmp_path_factory, data):
    manifest = json.loads((directory / "sepweight.json").read_text()) | {"checksum": ZEROS}
    way = data.draw(st.sampled_from(paths(manifest)))
    forged = tmp_path_factory.mktemp("forged") / "model"
    shutil.copytree(directory, forged)
    (forged / "sepweight.json").write_bytes(sealed(changed(manifest, way, data.draw(nothing_special))))
    try:
        with llm_sepweight.open(forged, verify="lazy") as weights:
            for part in weights.parts:
                weights.load(part)
    except WeightError:
        pass
    else:
        assert set(weights.parts) <= {"begin", "mid.00000", "end"}
    with suppress(NewerError):  # of which nothing can be said, not even by verify
        assert all((forged / each.file).parent == forged for each in llm_sepweight.verify(forged))
    shutil.rmtree(forged)


@FUZZ
@given(data=st.binary(max_size=300) | nothing_special.map(lambda value: json.dumps(value).encode()))
def test_a_manifest_of_any_bytes_is_refused(data):
    with pytest.raises(WeightError):
        parse_manifest(data, "sepweight.json")


@FUZZ
@given(data=st.data())
def test_an_index_with_any_value_anywhere_is_refused_or_true(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("indexed")
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, place / "one.safetensors")
    index = {"metadata": {"total_size": 20}, "weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    way = data.draw(st.sampled_from(paths(index)))
    (place / "model.safetensors.index.json").write_text(json.dumps(changed(index, way, data.draw(nothing_special))))
    try:
        with llm_sepweight.open(place, at_end) as weights:
            assert set(weights.load("end")) <= {"a", "b"}
    except WeightError:
        pass
    shutil.rmtree(place)


@FUZZ
@given(data=st.data())
def test_a_header_with_any_value_anywhere_is_refused_or_true(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("header")
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [16, 19]},
    }
    way = data.draw(st.sampled_from(paths(header)))
    text = json.dumps(changed(header, way, data.draw(nothing_special))).encode()
    (place / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(19))
    try:
        with llm_sepweight.open(place, at_end) as weights:
            for part in weights.parts:
                assert sum(tensor.nbytes for tensor in weights.load(part).values()) <= 19
    except WeightError:
        pass
    shutil.rmtree(place)


BOMB = """
import json, resource, sys
import llm_sepweight
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    with llm_sepweight.open(sys.argv[1], lambda key, config: [("end", key)]) as weights:
        weights.load("end")
except llm_sepweight.WeightError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "bomb",
    [
        (99_000_000).to_bytes(8, "little") + b"{" + b" " * 100,
        (1 << 63).to_bytes(8, "little"),
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": {"dtype": "F32", "shape": [1 << 31, 1 << 31], "data_offsets": [0, 1 << 64]}},
        {"a": {"dtype": "F32", "shape": [0, 1 << 62], "data_offsets": [0, 0]}},
    ],
    ids=["length", "huge length", "offsets", "overflow", "empty"],
)
def test_a_header_that_claims_much_gets_no_memory(tmp_path, bomb):
    """In a process that may use 256 MiB more than it has."""
    if isinstance(bomb, dict):
        text = json.dumps(bomb).encode()
        bomb = len(text).to_bytes(8, "little") + text + bytes(64)
    (tmp_path / "model.safetensors").write_bytes(bomb)
    done = subprocess.run([sys.executable, "-c", BOMB, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout


def test_part_files_that_are_links_out_of_the_directory_are_refused(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "model")
    part = tmp_path / "model" / "mid.00000.safetensors"
    part.rename(tmp_path / "elsewhere.safetensors")
    part.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(WeightError, match="leads out of its directory.*mid.00000.safetensors, part mid.00000"):
        llm_sepweight.open(tmp_path / "model")
    assert [each.file for each in llm_sepweight.verify(tmp_path / "model")] == [part.name]
    part.unlink()
    part.symlink_to(part)
    with pytest.raises(WeightError, match="leads nowhere.*mid.00000"):
        llm_sepweight.open(tmp_path / "model")
