"""fetch from places that behave: what arrives, and that nothing else does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import llm_sepweight
from llm_sepweight import WeightError, _download, fetch
from llm_sepweight._catalog import JSON_LIMIT

CONFIG = {"model_type": "tiny", "hidden_size": 24, "rope_theta": 1e4}
HEADER_START = 8  # bytes of a file that tell its size and, in a shard, how long its header is


@pytest.fixture
def split(checkpoint, layout, tmp_path) -> Path:
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    return tmp_path / "split"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_download, "WINDOW", 4096)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def keys_of(shard: Path) -> list[str]:
    with safe_open(shard, "pt") as opened:
        return list(opened.keys())


def assert_same_files(directory: Path, other: Path, names: set[str]) -> None:
    for name in names:
        assert (directory / name).read_bytes() == (other / name).read_bytes(), name


def test_a_node_gets_its_layers_and_nothing_else(split, serve, tmp_path, expected):
    server = serve(split)
    fetch(server.url, "1:3", tmp_path / "node")
    own = {"mid.00001.safetensors", "mid.00002.safetensors"}
    small = {"config.json", "tokenizer.json"}
    assert names_in(tmp_path / "node") == own | small | {"sepweight.json"}
    assert_same_files(tmp_path / "node", split, own | small)
    with llm_sepweight.open(tmp_path / "node") as weights:
        assert weights.parts == ("mid.00001", "mid.00002")
        for name, tensor in expected["mid.00002"].items():
            assert torch.equal(weights.load("mid.00002")[name], tensor)
    asked_for = {request.name for request in server.requests}
    assert asked_for == own | small | {"sepweight.json"}
    ranges = [request for request in server.requests if request.headers.get("Range", "bytes=0-7") != "bytes=0-7"]
    assert all("If-Range" in request.headers for request in ranges)
    needed = sum((split / name).stat().st_size for name in asked_for)
    assert server.sent == needed + HEADER_START * len(own)


def test_of_a_checkpoint_only_the_bytes_of_the_tensors_needed_are_read(checkpoint, split, serve, layout, tmp_path):
    server = serve(checkpoint)
    fetch(server.url, "1:2", tmp_path / "node", layout=layout)
    assert names_in(tmp_path / "node") == {"mid.00001.safetensors", "sepweight.json", "config.json", "tokenizer.json"}
    assert_same_files(tmp_path / "node", split, {"mid.00001.safetensors", "config.json", "tokenizer.json"})
    with llm_sepweight.open(tmp_path / "node") as weights:
        weights_needed = weights.nbytes("mid.00001")
    whole = ("config.json", "tokenizer.json", "model.safetensors.index.json")
    headers = [int.from_bytes(shard.read_bytes()[:8], "little") + 8 for shard in checkpoint.glob("*.safetensors")]
    assert len(headers) == 2
    assert server.sent == weights_needed + sum(headers) + sum((checkpoint / name).stat().st_size for name in whole)


@pytest.mark.parametrize("spec", ["b", "e", "0:2", "b 0:16", "f"])
def test_what_is_fetched_from_a_checkpoint_is_what_split_writes(checkpoint, split, serve, layout, tmp_path, spec):
    if spec == "b 0:16":
        with pytest.raises(ValueError, match="there is no mid.00003"):
            fetch(serve(checkpoint).url, spec, tmp_path / "node", layout=layout)
        assert not (tmp_path / "node").exists()
        return
    fetch(serve(checkpoint).url, spec, tmp_path / "node", layout=layout)
    assert_same_files(tmp_path / "node", split, names_in(tmp_path / "node") - {"sepweight.json"})
    fetched, whole = (json.loads((path / "sepweight.json").read_text()) for path in (tmp_path / "node", split))
    assert fetched["parts"] == {part: whole["parts"][part] for part in fetched["parts"]}
    assert fetched["config"] == whole["config"]


def test_a_part_with_a_tied_tensor_brings_the_part_that_stores_it(checkpoint, split, serve, layout, tmp_path, expected):
    fetch(serve(checkpoint).url, "e", tmp_path / "from-checkpoint", layout=layout)
    fetch(serve(split).url, "e", tmp_path / "from-split")
    for directory in (tmp_path / "from-checkpoint", tmp_path / "from-split"):
        with llm_sepweight.open(directory) as weights:
            assert weights.parts == ("begin", "end")
            assert torch.equal(weights.load("end")["head.weight"], expected["end"]["head.weight"])


@pytest.mark.parametrize("kind", ["checkpoint", "split"])
def test_a_later_fetch_adds_parts_and_gets_none_twice(kind, checkpoint, split, serve, layout, tmp_path):
    server = serve({"checkpoint": checkpoint, "split": split}[kind])
    for spec in ("1:2", "0:2", "e"):
        before = len(server.requests)
        fetch(server.url, spec, tmp_path / "node", layout=layout)
    assert not any(request.name.startswith("mid.") for request in server.requests[before:])
    with llm_sepweight.open(tmp_path / "node") as weights:
        assert weights.parts == ("begin", "mid.00000", "mid.00001", "end")
    assert_same_files(tmp_path / "node", split, names_in(tmp_path / "node") - {"sepweight.json"})
    sent = server.sent
    fetch(server.url, "0:2", tmp_path / "node", layout=layout)
    assert server.sent - sent < 4096  # the manifest, or headers and index


def test_parts_of_two_models_are_never_mixed(checkpoint, split, serve, layout, tensors, tmp_path):
    fetch(serve(split).url, "0:1", tmp_path / "node")
    before = {path: path.read_bytes() for path in (tmp_path / "node").iterdir()}
    for shard in checkpoint.glob("*.safetensors"):  # another fine-tune: the same names, shapes and config
        save_file({key: tensors[key] * 2 for key in keys_of(shard)}, shard)
    llm_sepweight.split(checkpoint, tmp_path / "other", layout=layout)
    for source in (tmp_path / "other", checkpoint):
        with pytest.raises(WeightError, match="cannot be told to be the one at .*Choose another destination"):
            fetch(serve(source).url, "1:2", tmp_path / "node", layout=layout)
    assert {path: path.read_bytes() for path in (tmp_path / "node").iterdir()} == before


def served_by_time_and_size(serve, directory: Path):
    """A server whose ETags are, as those of many are, of time and size; here all times are the same."""
    server = serve(directory)

    def answer(request) -> bool:
        if not request.name.endswith(".safetensors"):
            return False
        data = (directory / request.name).read_bytes()
        first, last = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        content = f"bytes {first}-{last}/{len(data)}"
        request.answer(206, data[first : last + 1], ETag=f'"3b9aca00-{len(data):x}"', Content_Range=content)
        return True

    server.trick = answer
    return server


@pytest.mark.parametrize("begun", ["a part", "part of a file"])
def test_two_checkpoints_that_a_server_gives_the_same_versions_are_never_mixed(
    begun, checkpoint, serve, layout, tensors, tmp_path
):
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    for shard in other.glob("*.safetensors"):
        save_file({key: -tensors[key] for key in keys_of(shard)}, shard)
    llm_sepweight.split(other, tmp_path / "other-split", layout=layout)
    first, second = (served_by_time_and_size(serve, directory) for directory in (checkpoint, other))
    if begun == "a part":
        fetch(first.url, "b", tmp_path / "node", layout=layout)
        with pytest.raises(WeightError, match="cannot be told to be the one at"):
            fetch(second.url, "f", tmp_path / "node", layout=layout)
        fetch(first.url, "f", tmp_path / "node", layout=layout)
    else:
        progress: list[int] = []

        def interrupt(done: int, total: int) -> None:
            progress.append(done)
            if len(progress) == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fetch(first.url, "f", tmp_path / "node", layout=layout, progress=interrupt)
        assert ".begin.safetensors.partial" in names_in(tmp_path / "node")
        fetch(second.url, "f", tmp_path / "node", layout=layout)
        assert_same_files(tmp_path / "node", tmp_path / "other-split", names_in(tmp_path / "node") - {"sepweight.json"})


@pytest.mark.parametrize("other", ["layout", "config"])
def test_parts_of_one_checkpoint_by_two_layouts_or_configs_are_never_mixed(other, checkpoint, layout, tmp_path):
    def renamed(key, config):
        return [(part, f"model.{name}", *row) for part, name, *row in layout(key, CONFIG)]

    fetch(checkpoint, "b", tmp_path / "node", layout=layout)
    if other == "config":
        (checkpoint / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 1e6}))
    before = {path: path.read_bytes() for path in (tmp_path / "node").iterdir()}
    with pytest.raises(WeightError, match="cannot be told to be the one at"):
        fetch(
            checkpoint,
            "1:2",
            tmp_path / "node",
            layout=renamed if other == "layout" else lambda key, _: layout(key, CONFIG),
        )
    assert {path: path.read_bytes() for path in (tmp_path / "node").iterdir()} == before


def test_parts_that_were_split_alone_are_fetched_together_as_far_as_they_prove_to_be_the_same(
    checkpoint, layout, tmp_path
):
    for name, spec in (("some", "1:3"), ("others", "0:2")):  # nothing tells that these are of one model
        llm_sepweight.split(checkpoint, tmp_path / name, layout=layout, spec=spec)
    fetch(tmp_path / "some", "1:2", tmp_path / "node")
    fetch(tmp_path / "some", "1:2", tmp_path / "node")
    fetch(tmp_path / "others", "0:1", tmp_path / "node")  # has the part that is here, byte for byte
    with llm_sepweight.open(tmp_path / "node") as weights:
        assert weights.parts == ("mid.00000", "mid.00001")
    with pytest.raises(WeightError, match="cannot be told to be the one"):
        fetch(tmp_path / "some", "2:3", tmp_path / "node")


def test_a_split_that_is_not_finished_is_no_destination(checkpoint, split, layout, tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_sepweight.split(checkpoint, tmp_path / "new", layout=layout, progress=interrupt)
    with pytest.raises(WeightError, match="a split here that is not finished"):
        fetch(split, "f", tmp_path / "new")


@pytest.mark.parametrize("kind", ["checkpoint", "split"])
def test_an_interrupted_fetch_goes_on_where_it_was(kind, checkpoint, split, serve, layout, tmp_path):
    server = serve({"checkpoint": checkpoint, "split": split}[kind])

    def interrupt(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server.url, "f", tmp_path / "node", layout=layout, connections=1, progress=interrupt)
    assert "sepweight.json" not in names_in(tmp_path / "node")
    with pytest.raises(WeightError):
        llm_sepweight.open(tmp_path / "node")
    sent = server.sent
    seen = []
    fetch(server.url, "f", tmp_path / "node", layout=layout, progress=lambda *done: seen.append(done))
    total = sum(path.stat().st_size for path in split.glob("*.safetensors"))
    assert seen == sorted(seen)
    assert seen[0][0] > total // 3  # what was there counts as done
    assert seen[-1] == (total, total)
    overhead = 4096 + sum(len(path.read_bytes()) for path in server.directory.glob("*.json"))
    assert server.sent - sent < total - seen[0][0] + 2 * overhead
    assert_same_files(tmp_path / "node", split, names_in(split) - {"sepweight.json"})
    assert names_in(tmp_path / "node") == names_in(split)


def interrupted(source: Path | str, spec: str, destination: Path, **how) -> dict[str, bytes]:
    """Fetch until more than three quarters of the bytes are there; what the destination holds then."""

    def interrupt(done: int, total: int) -> None:
        if done > total * 3 // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(source, spec, destination, progress=interrupt, **how)
    return {path.name: path.read_bytes() for path in destination.iterdir()}


@pytest.mark.parametrize("kind", ["checkpoint", "split", "some parts"])
@pytest.mark.parametrize("spec", ["b", "f"])
def test_what_an_interrupted_fetch_left_is_not_written_over_once_the_source_is_another(
    kind, spec, checkpoint, layout, tensors, tmp_path
):
    def source(name: str) -> Path:
        if kind == "checkpoint":
            return checkpoint
        llm_sepweight.split(checkpoint, tmp_path / name, layout=layout, spec="f" if kind == "split" else "b 0:2 e")
        return tmp_path / name

    before = interrupted(source("first"), "f", tmp_path / "node", layout=layout)
    assert "begin.safetensors" in before
    for shard in checkpoint.glob("*.safetensors"):
        save_file({key: -tensors[key] for key in keys_of(shard)}, shard)
    with pytest.raises(WeightError, match="other weights here already.*begin.safetensors.*Choose another destination"):
        fetch(source("second"), spec, tmp_path / "node", layout=layout)
    assert {path.name: path.read_bytes() for path in (tmp_path / "node").iterdir()} == before


def test_of_another_model_less_than_a_file_is_begun_anew(checkpoint, split, layout, tensors, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(split, "1:2", tmp_path / "node", progress=interrupt)
    assert names_in(tmp_path / "node") == {".sepweight.fetch", ".mid.00001.safetensors.partial"}
    for shard in checkpoint.glob("*.safetensors"):
        save_file({key: -tensors[key] for key in keys_of(shard)}, shard)
    fetch(checkpoint, "0:1", tmp_path / "node", layout=layout)
    assert names_in(tmp_path / "node") == {"mid.00000.safetensors", "sepweight.json", "config.json", "tokenizer.json"}


@pytest.mark.parametrize("kind", ["checkpoint", "split"])
def test_an_interrupted_fetch_goes_on_after_another_of_the_same_model(kind, checkpoint, split, serve, layout, tmp_path):
    server = serve({"checkpoint": checkpoint, "split": split}[kind])
    left = interrupted(server.url, "f", tmp_path / "node", layout=layout, connections=1)
    fetch(server.url, "b", tmp_path / "node", layout=layout)
    with llm_sepweight.open(tmp_path / "node") as weights:
        assert weights.parts == ("begin",)
    assert left.keys() <= names_in(tmp_path / "node")
    sent = server.sent
    fetch(server.url, "f", tmp_path / "node", layout=layout)
    total = sum(path.stat().st_size for path in split.glob("*.safetensors"))
    overhead = 4096 + sum(len(path.read_bytes()) for path in server.directory.glob("*.json"))
    assert server.sent - sent < total // 4 + 2 * overhead
    assert names_in(tmp_path / "node") == names_in(split)
    assert_same_files(tmp_path / "node", split, names_in(split) - {"sepweight.json"})


def test_a_fetch_that_was_killed_as_it_wrote_its_record_anew_leaves_nothing_for_ever(split, tmp_path, monkeypatch):
    interrupted(split, "f", tmp_path / "node")

    def killed(path: Path, data: bytes) -> None:
        path.with_name(f".{path.name}.partial").write_bytes(data[:-1])
        raise KeyboardInterrupt

    with monkeypatch.context() as moment:
        moment.setattr(_download, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch(split, "b", tmp_path / "node")
    assert "..sepweight.fetch.partial" in names_in(tmp_path / "node")
    fetch(split, "f", tmp_path / "node")
    assert names_in(tmp_path / "node") == names_in(split)


def test_a_file_bears_its_name_only_once_the_record_of_it_is_on_the_disk(split, tmp_path, monkeypatch):
    record, synced = tmp_path / "node" / ".sepweight.fetch", {}
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced[path] = Path(path).read_bytes() if Path(path).is_file() else b""
        real_sync(descriptor)

    def replace(source: Path, destination: Path) -> None:
        if destination.suffix == ".safetensors":
            last = json.loads(synced[str(record)].splitlines()[-1])
            assert (last["name"], last["nbytes"]) == (destination.name, source.stat().st_size)
        real_replace(source, destination)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    fetch(split, "f", tmp_path / "node")
    assert str(record) in synced


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def cut(data: bytes) -> bytes:
    return data[:-1]


def lengthen(data: bytes) -> bytes:  # as by a window that was written and not yet recorded
    return data + bytes(100_000)


@pytest.mark.parametrize("damage", [flip, cut, lengthen])
def test_what_an_interrupted_fetch_left_is_not_believed_once_it_is_damaged(split, serve, tmp_path, damage):
    def interrupt(done: int, total: int) -> None:
        if done > total // 3:
            raise KeyboardInterrupt

    server = serve(split)
    with pytest.raises(KeyboardInterrupt):
        fetch(server.url, "f", tmp_path / "node", progress=interrupt)
    [partial] = (tmp_path / "node").glob(".*.partial")
    partial.write_bytes(damage(partial.read_bytes()))
    fetch(server.url, "f", tmp_path / "node")
    assert_same_files(tmp_path / "node", split, names_in(split))


@pytest.mark.parametrize("more", [1, 4096, 1 << 40])
def test_a_record_that_says_more_than_there_is_is_not_believed(checkpoint, split, layout, tmp_path, more):
    interrupted(checkpoint, "f", tmp_path / "node", layout=layout)
    record = tmp_path / "node/.sepweight.fetch"
    *lines, last = [json.loads(line) for line in record.read_text().splitlines() if line]
    last["nbytes"] += more
    record.write_text("\n".join(map(json.dumps, [*lines, last])))
    fetch(checkpoint, "f", tmp_path / "node", layout=layout)
    assert_same_files(tmp_path / "node", split, names_in(split) - {"sepweight.json"})


@pytest.mark.parametrize("key", ["model", "name", "of", "nbytes", "checksum"])
@pytest.mark.parametrize("value", [None, -1, 0.5, "x", ["x"]])
def test_a_record_that_is_damaged_is_none(split, tmp_path, key, value):
    def interrupt(done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(split, "1:2", tmp_path / "node", progress=interrupt)
    record = tmp_path / "node/.sepweight.fetch"
    record.write_text(json.dumps({**json.loads(record.read_text()), key: value}))
    fetch(split, "1:2", tmp_path / "node")
    assert_same_files(tmp_path / "node", split, {"mid.00001.safetensors", "config.json", "tokenizer.json"})


@pytest.mark.parametrize("form", ["file://{}", "{}"])
def test_a_directory_is_a_source_too(form, checkpoint, split, layout, tmp_path):
    fetch(form.format(split), "1:3", tmp_path / "node")
    assert_same_files(tmp_path / "node", split, names_in(tmp_path / "node") - {"sepweight.json"})
    fetch(form.format(checkpoint), "1:3", tmp_path / "node2", layout=layout)
    assert_same_files(tmp_path / "node2", split, names_in(tmp_path / "node2") - {"sepweight.json"})
    with pytest.raises(WeightError, match="source and destination are the same"):
        fetch(split, "1:3", split)


def test_what_split_does_not_take_for_a_small_file_fetch_does_not_either(checkpoint, layout, tmp_path):
    (checkpoint / "LICENSES").mkdir()
    (checkpoint / "folder.json").symlink_to("LICENSES")
    (checkpoint / "gone.json").symlink_to("nowhere")
    (checkpoint / "vocab.txt").symlink_to("tokenizer.json")
    with (checkpoint / "samples.txt").open("wb") as file:
        file.truncate(JSON_LIMIT + 1)
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    fetch(checkpoint, "f", tmp_path / "node", layout=layout, retries=0)
    assert names_in(tmp_path / "node") == names_in(tmp_path / "split")
    assert_same_files(tmp_path / "node", tmp_path / "split", names_in(tmp_path / "node") - {"sepweight.json"})


@pytest.mark.parametrize("name", ["Tokenizer.json", "a\\b.txt"])
def test_small_files_that_no_manifest_can_name_are_refused_before_any_weights(checkpoint, layout, tmp_path, name):
    (checkpoint / name).write_text("x")
    progress: list[int] = []
    with pytest.raises(WeightError, match="Change that at the source, then fetch again"):
        fetch(checkpoint, "b", tmp_path / "node", layout=layout, progress=lambda done, total: progress.append(done))
    assert progress == []
    assert not (tmp_path / "node").exists()


def test_a_bucket_is_a_source_too(split, serve, tmp_path, monkeypatch):
    server = serve(split)
    for name, value in {
        "AWS_ENDPOINT_URL": server.url.removesuffix("/model"),
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fetch("s3://bucket/model", "0:1 e", tmp_path / "node")
    assert_same_files(tmp_path / "node", split, names_in(tmp_path / "node") - {"sepweight.json"})
    assert "mid.00001.safetensors" not in {request.name for request in server.requests}
    assert all("AWS4-HMAC" in request.headers["Authorization"] for request in server.requests)


HUB = """
import sys, llm_sepweight
layout = lambda key, config: [("mid.00000", key)] if key.startswith("layers.0.") else []
llm_sepweight.fetch(sys.argv[1], "0:1", sys.argv[2], layout=layout)
"""


def test_a_model_on_the_hub_is_read_at_one_commit_with_the_token_and_that_goes_nowhere_else(
    checkpoint, serve, tmp_path
):
    commit = "c0ffee" * 6 + "c0ff"
    hub, storage = serve(checkpoint), serve(checkpoint)

    def as_hub(request) -> bool:
        if request.path.startswith("/api/models/owner/name/revision/v1"):
            files = [{"rfilename": path.name} for path in checkpoint.iterdir()]
            body = json.dumps({"id": "owner/name", "sha": commit, "siblings": files}).encode()
            request.answer(200, body, Content_Type="application/json")
        elif request.path.startswith(f"/owner/name/resolve/{commit}/") and request.name.endswith(".safetensors"):
            request.answer(302, Location=f"{storage.url}/{request.name}?signature=x", X_Linked_ETag=f'"{request.name}"')
        else:
            return not request.path.startswith(f"/owner/name/resolve/{commit}/") and request.answer(404) is None
        return True

    def as_one_of_many(request) -> bool:  # each of which has ETags of its own
        start = request.headers["Range"].removeprefix("bytes=").split("-")[0]
        data = (checkpoint / request.name).read_bytes()
        stop = int(request.headers["Range"].split("-")[1]) + 1
        body = data[int(start) : stop]
        etag = f'"{len(storage.requests)}"'
        request.answer(206, body, ETag=etag, Content_Range=f"bytes {start}-{stop - 1}/{len(data)}")
        return True

    hub.trick, storage.trick = as_hub, as_one_of_many
    environment = {**os.environ, "HF_ENDPOINT": hub.url.removesuffix("/model"), "HF_TOKEN": "hf_secret"}
    command = [sys.executable, "-c", HUB, "hf://owner/name@v1", tmp_path / "node"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert names_in(tmp_path / "node") == {"mid.00000.safetensors", "sepweight.json", "config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "node/sepweight.json").read_text())["source"] == f"name@{commit}"
    about_the_model = [request for request in hub.requests if "/owner/name/" in request.path]
    assert {request.headers["Authorization"] for request in about_the_model} == {"Bearer hf_secret"}
    assert storage.requests
    assert not any("Authorization" in request.headers for request in storage.requests)


def test_a_model_that_the_hub_does_not_have_is_said_with_what_may_help(serve, tmp_path):
    hub = serve(tmp_path)
    environment = {**os.environ, "HF_ENDPOINT": hub.url.removesuffix("/model")}
    command = [sys.executable, "-c", HUB, "hf://owner/name", tmp_path / "node"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "WeightError: the model cannot be found on the hub" in done.stderr
    assert "set HF_TOKEN" in done.stderr


def test_nothing_that_only_a_remote_source_needs_is_imported_before():
    code = "import sys, llm_sepweight; print([m for m in sys.modules if m in ('httpx2', 'fsspec', 'huggingface_hub')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_library_that_is_missing_is_said_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    monkeypatch.delitem(sys.modules, "llm_sepweight._http", raising=False)
    with pytest.raises(WeightError, match=r"https:// needs a library.*pip install 'llm_sepweight\[remote\]'"):
        fetch("https://127.0.0.1/model", "f", tmp_path / "node")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bogus://there", "Protocol not known: bogus.*Sources are http"),
        ("file:///there/is/nothing", "there is no sepweight.json here"),
        ("hf://name", "must be 'namespace/name'"),
        ("http://[::1", "no valid address"),
        ("ftp://user:secret@127.0.0.1:1/x", r"cannot be reached: .*\(file ftp://127.0.0.1:1/x\). Check the address."),
        (
            "http://user:secret@127.0.0.1:1/x?key=secret",
            r"^the connection failed: .*\(file http://127.0.0.1:1/x/sepweight.json\)$",
        ),
    ],
)
def test_a_source_that_cannot_be_is_said(source, message, tmp_path):
    with pytest.raises(WeightError, match=message):
        fetch(source, "f", tmp_path / "node", retries=0)
    assert not (tmp_path / "node").exists()


@pytest.mark.parametrize("wrong", [{"connections": 0}, {"retries": -1}, {"timeout": 0}])
def test_settings_that_cannot_be_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"not possible: .*{next(iter(wrong))}={next(iter(wrong.values()))}"):
        fetch("http://127.0.0.1:1", "f", tmp_path / "node", **wrong)


def test_a_checkpoint_needs_a_layout_and_safetensors(checkpoint, layout, tmp_path):
    with pytest.raises(WeightError, match="a checkpoint needs a layout"):
        fetch(checkpoint, "f", tmp_path / "node")
    for path in checkpoint.glob("model*"):
        path.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightError, match="A .bin checkpoint has to be downloaded whole"):
        fetch(checkpoint, "f", tmp_path / "node", layout=layout)


def test_a_second_fetch_to_the_same_place_is_refused(split, tmp_path):
    refused = []

    def second(done: int, total: int) -> None:
        with pytest.raises(WeightError, match="another process is writing here") as error:
            fetch(split, "f", tmp_path / "node")
        refused.append(error)

    fetch(split, "0:1", tmp_path / "node", progress=second)
    assert refused


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    [before, example] = [code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "tiny-split" in code]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(before, names)
    exec(example, names)
    assert_same_files(tmp_path / "node", tmp_path / "other-node", {"mid.00001.safetensors", "config.json"})
