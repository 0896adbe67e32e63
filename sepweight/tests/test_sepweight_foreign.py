"""Where a directory holds something else already, nothing is written over it, or beside other weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import llm_sepweight
from llm_sepweight import WeightError, _copying, _download

Write = Callable[[Path], None]
WAYS = ("split", "split in place", "dump", "dump a stream", "fetch", "fetch from a checkpoint", "export")


@pytest.fixture(params=WAYS)
def write(request, checkpoint, tensors, layout, tmp_path) -> Write:
    """Each way to write a model to a directory."""
    config = json.loads((checkpoint / "config.json").read_text())
    source = tmp_path / "source"
    llm_sepweight.split(checkpoint, source, layout=layout)
    ways: dict[str, Write] = {
        "split": lambda to: llm_sepweight.split(checkpoint, to, layout=layout),
        "split in place": lambda to: llm_sepweight.split(checkpoint, to, layout=layout, in_place=True),
        "dump": lambda to: llm_sepweight.dump(tensors, to, config=config, layout=layout),
        "dump a stream": lambda to: llm_sepweight.dump([tensors], to, config=config, layout=layout),
        "fetch": lambda to: llm_sepweight.fetch(source, "f", to),
        "fetch from a checkpoint": lambda to: llm_sepweight.fetch(checkpoint, "f", to, layout=layout),
        "export": lambda to: llm_sepweight.export(source, to),
    }
    return ways[request.param]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    "name",
    ["begin.safetensors", "mid.00099.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "end.pth",
     "model.safetensors.index.json", "model.gguf"],
)  # fmt: skip
def test_other_weights_are_named_and_stay(write, tmp_path, name, checkpoint):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_bytes(b"of another model")
    before = contents(checkpoint)
    with pytest.raises(WeightError, match=f"other weights here already.*{name}.*Choose another destination"):
        write(tmp_path / "new")
    assert contents(tmp_path / "new") == {name: b"of another model"}
    assert contents(checkpoint) == before


def test_a_small_file_of_another_model_is_named_and_stays(write, tmp_path, checkpoint):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"model_type": "other"}')
    before = contents(checkpoint)
    with pytest.raises(WeightError, match="would be overwritten, and is of another model.*config.json.*Choose another"):
        write(tmp_path / "new")
    assert contents(tmp_path / "new") == {"config.json": b'{"model_type": "other"}'}
    assert contents(checkpoint) == before


def test_what_is_no_weights_may_lie_there(write, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "README.md").write_text("mine")
    write(tmp_path / "new")
    assert (tmp_path / "new" / "README.md").read_text() == "mine"


def test_in_its_own_directory_only_the_files_of_parts_must_be_free(checkpoint, layout):
    (checkpoint / "pytorch_model.bin").write_bytes(b"the same in another form")
    (checkpoint / "begin.safetensors").write_bytes(b"of another model")
    with pytest.raises(WeightError, match="other weights here already.*begin.safetensors"):
        llm_sepweight.split(checkpoint, checkpoint, layout=layout, in_place=True)
    (checkpoint / "begin.safetensors").unlink()
    llm_sepweight.split(checkpoint, checkpoint, layout=layout, in_place=True)
    assert llm_sepweight.verify(checkpoint) == []


def test_an_export_that_was_interrupted_begins_anew_and_leaves_nothing_else(checkpoint, layout, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_sepweight.export(tmp_path / "split", tmp_path / "back", max_shard_nbytes=20_000, progress=stop)
    assert list((tmp_path / "back").glob("model-*"))
    with pytest.raises(WeightError, match="not finished"):
        llm_sepweight.open(tmp_path / "back", layout)
    llm_sepweight.export(tmp_path / "split", tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("begun", "record"),
    [("split", ".sepweight.journal"), ("fetch", ".sepweight.fetch"), ("dump", ".sepweight.journal")],
)
def test_where_something_else_is_not_finished_nothing_is_exported(
    begun, record, checkpoint, layout, tensors, tmp_path, monkeypatch
):
    monkeypatch.setattr(_download, "WINDOW", 4096)
    source, new = tmp_path / "split", tmp_path / "new"
    llm_sepweight.split(checkpoint, source, layout=layout)
    ways: dict[str, Callable[..., None]] = {
        "split": lambda stop: llm_sepweight.split(checkpoint, new, layout=layout, progress=stop),
        "fetch": lambda stop: llm_sepweight.fetch(source, "f", new, progress=stop),
        "dump": lambda stop: llm_sepweight.dump(
            tensors, new, config=json.loads((checkpoint / "config.json").read_text()), layout=layout, progress=stop
        ),
    }

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ways[begun](stop)
    before = contents(new)
    assert record in before
    with pytest.raises(WeightError, match=f"something here that is not finished.*{record}.*Finish it, as it was begun"):
        llm_sepweight.export(source, new)
    assert contents(new) == before
    ways[begun](None)
    assert llm_sepweight.verify(new) == []


@pytest.mark.parametrize("write", [way for way in WAYS if way != "export"], indirect=True)
@pytest.mark.parametrize("killed", ["dump a stream", "fetch"])
def test_what_was_left_in_the_first_file_goes_with_whatever_is_written_there_next(write, killed, tmp_path, monkeypatch):
    monkeypatch.setattr(_download, "WINDOW", 4096)
    new = tmp_path / "new"

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    if killed == "fetch":
        with pytest.raises(KeyboardInterrupt):
            llm_sepweight.fetch(tmp_path / "source", "1:2", new, progress=stop)
    else:
        (new / ".sepweight.stage").mkdir(parents=True)
        (new / ".sepweight.stage" / "model-00000.safetensors").write_bytes(b"half")
    assert list(new.glob(".sepweight.*"))
    write(new)
    assert not list(new.glob(".*"))
    assert llm_sepweight.verify(new) == []


def test_a_damaged_record_of_an_export_is_said_to_be_that(checkpoint, layout, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / ".sepweight.export").write_bytes(b'{"files": [')
    with pytest.raises(WeightError, match="record of an unfinished export cannot be read.*Remove it.*export again"):
        llm_sepweight.export(tmp_path / "split", tmp_path / "back")
    (tmp_path / "back" / ".sepweight.export").unlink()
    llm_sepweight.export(tmp_path / "split", tmp_path / "back")


@pytest.mark.parametrize("limit", [20_000, 5_000_000_000])
def test_what_was_put_where_an_export_was_interrupted_stays(checkpoint, layout, tmp_path, limit, monkeypatch):
    monkeypatch.setattr(_copying, "WINDOW", 4096)
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    back = tmp_path / "back"

    def stop(done: int, total: int) -> None:
        if done > total * 3 // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_sepweight.export(tmp_path / "split", back, max_shard_nbytes=limit, progress=stop)
    finished = sorted(path.name for path in back.glob("model*"))
    assert bool(finished) == (limit == 20_000)
    own = finished[0] if finished else "model.safetensors"
    mine = b"m" * (back / own).stat().st_size if (back / own).exists() else b"mine"
    (back / own).write_bytes(mine)
    with pytest.raises(WeightError, match=f"other weights here already.*{own}"):
        llm_sepweight.export(tmp_path / "split", back, max_shard_nbytes=limit)
    assert (back / own).read_bytes() == mine
    (back / own).unlink()
    llm_sepweight.export(tmp_path / "split", back)
    assert {path.name for path in back.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}


def test_parts_beside_those_of_the_manifest_are_not_written_over_by_a_later_fetch(checkpoint, layout, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    llm_sepweight.fetch(tmp_path / "split", "0:1", tmp_path / "node")
    (tmp_path / "node" / "mid.00001.safetensors").write_bytes(b"of another model")
    with pytest.raises(WeightError, match="other weights here already.*mid.00001.safetensors"):
        llm_sepweight.fetch(tmp_path / "split", "1:2", tmp_path / "node")
    assert (tmp_path / "node" / "mid.00001.safetensors").read_bytes() == b"of another model"


def test_a_part_that_is_there_and_damaged_is_fetched_again(checkpoint, layout, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    llm_sepweight.fetch(tmp_path / "split", "f", tmp_path / "node")
    for name in ("mid.00001.safetensors", "tokenizer.json"):  # other bytes, the same size
        data = (tmp_path / "node" / name).read_bytes()
        (tmp_path / "node" / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "node").glob("*.safetensors")}
    llm_sepweight.fetch(tmp_path / "split", "f", tmp_path / "node")
    assert llm_sepweight.verify(tmp_path / "node") == []
    written = {name for name, inode in inodes.items() if (tmp_path / "node" / name).stat().st_ino != inode}
    assert written == {"mid.00001.safetensors"}
