"""A split that is killed at any moment, run again: the same bytes as undisturbed, and never a tensor in neither place."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llm_sepweight
from llm_sepweight import WeightError, _copying, _parts
from llm_sepweight._writing import locked


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def forks() -> Iterator[Any]:
    """split(source, destination, in_place, step) in a process of its own: exit status, and how often it changed the disk."""
    script = Path(__file__).with_name("split_in_forks.py")
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        answers = process.stdout
        assert answers is not None

        def split(source: Path, destination: Path, in_place: bool, step: int | None = None) -> list[int]:
            order = {"source": str(source), "destination": str(destination), "in_place": in_place, "step": step}
            print(json.dumps(order), file=process.stdin, flush=True)
            return json.loads(answers.readline())

        yield split
        process.stdin.close()


@pytest.fixture
def sharded(checkpoint, tensors) -> Path:
    """The checkpoint in five shards; every layer lies in two of them, the last shard holds only what is dropped."""
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    dropped = [key for key in tensors if "inv_freq" in key]
    keys = [key for key in tensors if key not in dropped]
    weight_map = {}
    for number in range(5):
        name = f"model-{number}.safetensors"
        chosen = dropped if number == 4 else keys[number * len(keys) // 4 : (number + 1) * len(keys) // 4]
        save_file({key: tensors[key] for key in chosen}, checkpoint / name)
        weight_map |= dict.fromkeys(chosen, name)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return checkpoint


def assert_nothing_is_lost(source: Path, destination: Path, before: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Each part is complete in the destination, or the shards that its tensors come from are all in the source."""
    index = json.loads(before["model.safetensors.index.json"])["weight_map"]
    manifest = json.loads(whole["sepweight.json"])
    for fields in manifest["parts"].values():
        path = destination / fields["file"]
        if not path.exists() or path.read_bytes() != whole[path.name]:
            keys = [key for tensor in fields["tensors"].values() for key in tensor.get("keys", [])]
            for shard in {index[key] for key in keys}:
                assert (source / shard).read_bytes() == before[shard], fields["file"]


@pytest.mark.parametrize(("how", "kills"), [("beside", 50), ("in place", 50), ("in its own directory", 20)])
def test_a_split_killed_at_any_moment_goes_on_to_the_same_bytes(forks, sharded, tmp_path, how, kills):
    in_place = how != "beside"
    before = contents(sharded)

    def begin(name: str) -> tuple[Path, Path]:
        source = tmp_path / name / "checkpoint"
        shutil.copytree(sharded, source)
        return source, source if how == "in its own directory" else tmp_path / name / "split"

    source, destination = begin("undisturbed")
    status, steps = forks(source, destination, in_place)
    assert status == 0
    whole = contents(destination)
    assert in_place == (not any(source.glob("model*")))
    with llm_sepweight.open(destination) as weights:
        assert weights.parts == ("begin", "mid.00000", "mid.00001", "mid.00002", "end")

    assert forks(source, destination, in_place)[0] == 0  # nothing is left to do
    assert contents(destination) == whole

    killed = 0
    for moment in sorted(random.Random(0).choices(range(steps), k=kills)):
        source, destination = begin("killed")
        status, _ = forks(source, destination, in_place, moment)
        killed += status == -9
        if destination.exists():
            assert_nothing_is_lost(source, destination, before, whole)
        if (destination / "sepweight.json").exists():
            assert llm_sepweight.verify(destination) == []
        assert forks(source, destination, in_place)[0] == 0, moment
        assert contents(destination) == whole, moment
        assert in_place == (not any(source.glob("model*")))
        shutil.rmtree(tmp_path / "killed")
    assert killed > 0.9 * kills


def test_a_split_with_other_options_or_from_a_changed_source_does_not_go_on(forks, sharded, tmp_path, layout):
    destination = tmp_path / "split"
    assert forks(sharded, destination, False, 40)[0] == -9
    with pytest.raises(WeightError, match=r"unfinished split of 'checkpoint' here, with other options.*remove the dir"):
        llm_sepweight.split(sharded, destination, layout=layout, spec="b 0:1")
    with pytest.raises(WeightError, match="unfinished split.*other options"):
        llm_sepweight.split(sharded, destination, layout=layout, in_place=True)
    with pytest.raises(WeightError, match="unfinished split.*other options"):
        llm_sepweight.split(sharded, destination, layout=layout, dtype=torch.float32)
    os.utime(sharded / "model-2.safetensors")
    with pytest.raises(WeightError, match="source has changed since .*model-2.safetensors.*split again"):
        llm_sepweight.split(sharded, destination, layout=layout)
    assert not (destination / "sepweight.json").exists()


def test_parts_that_are_complete_are_not_written_again(forks, sharded, tmp_path, layout):
    destination = tmp_path / "split"
    assert forks(sharded, destination, False, 40)[0] == -9
    before = {path.name: path.stat().st_ino for path in destination.glob("*.safetensors")}
    seen: list[tuple[int, int]] = []
    llm_sepweight.split(sharded, destination, layout=layout, progress=lambda *done: seen.append(done))
    kept = [name for name, inode in before.items() if (destination / name).stat().st_ino == inode]
    assert 0 < len(kept) < 5
    assert seen[0][0] > sum((destination / name).stat().st_size for name in kept)
    assert seen[-1][0] == seen[-1][1]


def unfinished(forks, sharded: Path, destination: Path, in_place: bool) -> list[Path]:
    """Split until some parts are complete and, in place, something is freed; gives the files of these parts."""
    for step in range(30, 200, 2):
        assert forks(sharded, destination, in_place, step)[0] == -9
        kept = sorted(destination.glob("*.safetensors"))
        if kept and len(list(sharded.glob("*.safetensors"))) in ((1, 2, 3, 4) if in_place else (5,)):
            return kept
    raise AssertionError("the split was killed too early each time")


def damage(file: Path) -> None:
    """Other bytes, the same size."""
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def test_a_complete_part_that_was_damaged_is_written_again(forks, sharded, tmp_path, layout):
    for file in unfinished(forks, sharded, tmp_path / "split", in_place=False):
        damage(file)
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout)
    assert llm_sepweight.verify(tmp_path / "split") == []


def test_nothing_more_is_freed_for_a_part_that_was_damaged_since(forks, sharded, tmp_path, layout):
    destination = tmp_path / "split"
    kept = unfinished(forks, sharded, destination, in_place=True)
    sound = {file: file.read_bytes() for file in kept}
    before = contents(sharded)
    for file in kept:
        damage(file)
    with pytest.raises(WeightError, match="the part is damaged, and model-.* is freed already.*part (begin|mid|end)"):
        llm_sepweight.split(sharded, destination, layout=layout, in_place=True)
    assert contents(sharded) == before
    for file, data in sound.items():
        file.write_bytes(data)
    llm_sepweight.split(sharded, destination, layout=layout, in_place=True)
    assert llm_sepweight.verify(destination) == []


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_else_is_written_over_an_unfinished_split_in_place(forks, sharded, tensors, tmp_path, layout, stream):
    destination = tmp_path / "split"
    unfinished(forks, sharded, destination, in_place=True)
    (destination / ".sepweight.lock").unlink()  # the killed one left it
    before = contents(destination)
    config = json.loads((sharded / "config.json").read_text())
    zeros = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    only_copy = "Do not remove the directory: it holds the only copy of parts"
    with pytest.raises(WeightError, match=f"unfinished split of 'checkpoint'.*{only_copy}"):
        llm_sepweight.dump([zeros] if stream else zeros, destination, config=config, layout=layout)
    with pytest.raises(WeightError, match=f"other options.*{only_copy}"):
        llm_sepweight.split(sharded, destination, layout=layout, dtype=torch.float32, in_place=True)
    shard = next(sharded.glob("*.safetensors"))
    data = shard.read_bytes()
    replace_with(shard, flipped(data))
    with pytest.raises(WeightError, match=f"source has changed.*{only_copy}"):
        llm_sepweight.split(sharded, destination, layout=layout, in_place=True)
    assert contents(destination) == before
    replace_with(shard, data)
    llm_sepweight.split(sharded, destination, layout=layout, in_place=True)
    assert llm_sepweight.verify(destination) == []


def flipped(data: bytes) -> bytes:
    """Another fine-tune, as it were: the same header, other values."""
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def replace_with(file: Path, data: bytes) -> None:
    """Put another file in a file's place, that bears the same time."""
    times = file.stat().st_mtime_ns
    other = file.with_suffix(".other")
    other.write_bytes(data)
    os.utime(other, ns=(times, times))
    other.replace(file)


def test_a_shard_that_was_replaced_by_another_of_the_same_size_and_time_is_noticed(forks, sharded, tmp_path, layout):
    assert forks(sharded, tmp_path / "split", False, 40)[0] == -9
    for file in sharded.glob("model-?.safetensors"):
        data = file.read_bytes()
        replace_with(file, flipped(data))
        with pytest.raises(WeightError, match=f"source has changed since .*{file.name}.*split again"):
            llm_sepweight.split(sharded, tmp_path / "split", layout=layout)
        break
    shutil.rmtree(tmp_path / "split")

    def change(done: int, total: int) -> None:
        replace_with(file, data)

    with pytest.raises(WeightError, match=f"source was changed meanwhile.*{file.name}"):
        llm_sepweight.split(sharded, tmp_path / "split", layout=layout, progress=change)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("what", ["version", "link", "mode"])
def test_a_split_goes_on_by_another_version_and_with_other_links_and_modes(
    forks, sharded, tmp_path, layout, monkeypatch, in_place, what
):
    kept = {file: file.stat().st_ino for file in unfinished(forks, sharded, tmp_path / "split", in_place)}
    for file in sharded.glob("*.safetensors"):
        if what == "link":
            os.link(file, tmp_path / file.name)
        elif what == "mode":
            file.chmod(0o600)
    if what == "version":
        monkeypatch.setattr(llm_sepweight, "__version__", "99.0.0")
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=in_place)
    assert llm_sepweight.verify(tmp_path / "split") == []
    assert {file: file.stat().st_ino for file in kept} == kept


def test_a_split_that_is_stopped_by_another_mode_of_its_source_goes_on_when_it_is_run_again(sharded, tmp_path, layout):
    def change(done: int, total: int) -> None:
        for file in sharded.glob("*.safetensors"):
            file.chmod(0o600)

    with pytest.raises(WeightError, match="source was changed meanwhile"):
        llm_sepweight.split(sharded, tmp_path / "split", layout=layout, progress=change)
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout)
    assert llm_sepweight.verify(tmp_path / "split") == []


def test_a_freed_shard_that_is_put_back_for_a_damaged_part_is_taken_though_its_times_are_others(
    forks, sharded, tmp_path, layout
):
    before = contents(sharded)
    kept = unfinished(forks, sharded, tmp_path / "split", in_place=True)
    for file in kept:
        damage(file)
    for name, data in before.items():
        (sharded / name).write_bytes(data)
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True)
    assert llm_sepweight.verify(tmp_path / "split") == []
    assert not list(sharded.glob("model*"))


def test_a_record_whose_last_line_was_cut_short_counts_without_it(forks, sharded, tmp_path, layout):
    destination = tmp_path / "split"
    unfinished(forks, sharded, destination, in_place=False)
    journal = destination / ".sepweight.journal"
    journal.write_bytes(journal.read_bytes() + b'{"part": "en')

    def stop(done: int, total: int) -> None:
        if journal.read_bytes().count(b"\n") > lines:  # one more part is complete
            raise KeyboardInterrupt

    lines = journal.read_bytes().count(b"\n")
    with pytest.raises(KeyboardInterrupt):
        llm_sepweight.split(sharded, destination, layout=layout, progress=stop)
    llm_sepweight.split(sharded, destination, layout=layout)
    assert llm_sepweight.verify(destination) == []


@pytest.mark.parametrize("in_place", [False, True])
def test_a_record_with_one_flipped_bit_is_not_believed(forks, sharded, tmp_path, layout, in_place):
    destination = tmp_path / "split"
    unfinished(forks, sharded, destination, in_place)
    (destination / ".sepweight.lock").unlink()  # the killed one left it
    journal, before = destination / ".sepweight.journal", contents(sharded)
    data = journal.read_bytes()
    words = [data.index(word) for word in (b'"fingerprint"', b'"in_place"', b'"part": "', b'"nbytes": ')]
    for at in [0, *(word + 3 for word in words), *random.Random(0).sample(range(len(data) - 1), 20)]:
        journal.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(WeightError, match=r"record of an unfinished split cannot be read.*\.sepweight\.journal"):
            llm_sepweight.split(sharded, destination, layout=layout, in_place=in_place)
    assert contents(sharded) == before
    journal.write_bytes(data)
    llm_sepweight.split(sharded, destination, layout=layout, in_place=in_place)
    assert llm_sepweight.verify(destination) == []


def test_a_record_is_changed_only_by_the_split_that_has_the_directory(forks, sharded, tmp_path, layout):
    destination = tmp_path / "split"
    assert forks(sharded, destination, False, 40)[0] == -9
    journal = destination / ".sepweight.journal"
    torn = journal.read_bytes() + b'{"part": "en'  # the line that another process writes just now
    journal.write_bytes(torn)
    with pytest.raises(WeightError, match="not finished"):
        llm_sepweight.verify(destination)
    with locked(destination):
        for in_place in (False, True):
            with pytest.raises(WeightError, match="another process is writing here"):
                llm_sepweight.split(sharded, destination, layout=layout, in_place=in_place)
    with pytest.raises(WeightError, match="not finished"):
        llm_sepweight.fetch(sharded, "f", destination, layout=layout)
    assert journal.read_bytes() == torn


def test_a_source_that_changes_under_a_split_is_noticed(sharded, tmp_path, layout):
    def change(done: int, total: int) -> None:
        os.utime(sharded / "model-3.safetensors")

    with pytest.raises(WeightError, match="source was changed meanwhile.*model-3.safetensors"):
        llm_sepweight.split(sharded, tmp_path / "split", layout=layout, progress=change)
    assert not (tmp_path / "split" / "sepweight.json").exists()


def test_a_second_split_to_the_same_place_is_refused_while_the_first_is_at_work(sharded, tmp_path, layout):
    refused = []

    def meanwhile(done: int, total: int) -> None:
        if not refused:
            with pytest.raises(WeightError, match="another process is writing here.*Wait") as caught:
                llm_sepweight.split(sharded, tmp_path / "split", layout=layout)
            refused.append(caught)

    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, progress=meanwhile)
    assert len(refused) == 1
    assert llm_sepweight.verify(tmp_path / "split") == []


def test_in_place_keeps_the_files_of_parts_that_are_not_written(sharded, tmp_path, layout):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    before = contents(sharded)
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, spec="2:3 e", in_place=True)
    for key, shard in index.items():
        if "layers.0" in key or "layers.1" in key:
            assert (sharded / shard).read_bytes() == before[shard]
    assert (sharded / "model.safetensors.index.json").exists()


def test_in_place_needs_room_for_a_shard_and_two_parts_only(tmp_path, monkeypatch):
    monkeypatch.setattr(_copying, "WINDOW", 4096)
    monkeypatch.setattr(_copying, "AHEAD", 2)
    source, destination = tmp_path / "source", tmp_path / "split"
    source.mkdir()
    weight_map = {}
    for shard in range(8):  # four layers in every three shards
        keys = [str(third) for third in range(shard * 4, shard * 4 + 4)]
        save_file({key: torch.ones(8192, dtype=torch.uint8) for key in keys}, source / f"model-{shard}.safetensors")
        weight_map |= dict.fromkeys(keys, f"model-{shard}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def on_disk() -> int:
        return sum(path.stat().st_size for folder in (source, destination) for path in folder.glob("*.safe*"))

    before, seen = on_disk(), []
    llm_sepweight.split(
        source,
        destination,
        layout=lambda key, config: [(f"mid.{int(key) // 3:05d}", str(int(key) % 3))],
        in_place=True,
        progress=lambda *_: seen.append(on_disk()),
    )
    shard, part = 4 * 8192, 3 * 8192 + 4096
    assert len(list(destination.glob("*.safetensors"))) == 11
    assert max(seen) <= before + shard + 2 * part + 11 * 4096  # each file has a header of a page


@pytest.mark.parametrize("there", [None, {}, {"config.json": "{}", "tokenizer.json": "{}"}])
def test_a_split_in_place_is_done_only_where_its_source_was(sharded, tmp_path, layout, there):
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True)
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True)  # nothing is left to do
    other = tmp_path / "other" / sharded.name
    if there is not None:
        other.mkdir(parents=True)
        for name, text in there.items():
            (other / name).write_text(text)
    with pytest.raises(WeightError, match="no such directory|no checkpoint here"):
        llm_sepweight.split(other, tmp_path / "split", layout=layout, in_place=True)


def test_what_cannot_be_freed_is_refused_in_place(sharded, tmp_path, layout):
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout)
    with pytest.raises(WeightError, match="split already"):
        llm_sepweight.split(tmp_path / "split", tmp_path / "again", in_place=True)
    with (
        llm_sepweight.open(sharded, layout) as weights,
        pytest.raises(ValueError, match="give the path of a checkpoint"),
    ):
        llm_sepweight.split(weights, tmp_path / "again", in_place=True)
    (sharded / "model-1.safetensors").rename(sharded / "elsewhere")
    (sharded / "model-1.safetensors").symlink_to("elsewhere")
    with pytest.raises(WeightError, match="a link cannot be freed.*model-1"):
        llm_sepweight.split(sharded, tmp_path / "again", layout=layout, in_place=True)
    assert (sharded / "elsewhere").exists()


def test_in_place_does_not_remove_a_tensor_that_the_index_leaves_out(sharded, tmp_path, layout):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    left_out = {key: weight_map.pop(key) for key in ("layers.2.up.weight", "layers.2.down.weight")}
    index.write_text(json.dumps({"weight_map": weight_map}))
    before = contents(sharded)
    message = f"index leaves out this tensor.*{left_out['layers.2.up.weight']}, tensor layers.2.(up|down).weight.*Enter"
    with pytest.raises(WeightError, match=message):
        llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True)
    assert contents(sharded) == before
    assert not (tmp_path / "split").exists()
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout)
    index.write_text(json.dumps({"weight_map": weight_map | left_out}))
    llm_sepweight.split(sharded, tmp_path / "in place", layout=layout, in_place=True)


def test_a_second_copy_of_a_tensor_goes_with_its_file(sharded, tensors, tmp_path, layout):
    dropped = load_file(sharded / "model-4.safetensors")
    save_file(dropped | {"norm.weight": tensors["norm.weight"]}, sharded / "model-4.safetensors")
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True)
    assert not list(sharded.glob("model*"))


@pytest.mark.parametrize("other", [lambda tensor: tensor + 1, lambda tensor: tensor[:-1], lambda tensor: tensor.int()])
def test_in_place_does_not_remove_other_values_of_a_tensor_that_the_index_takes_elsewhere(
    sharded, tensors, tmp_path, layout, other
):
    rest = load_file(sharded / "model-1.safetensors")
    save_file(rest | {"norm.weight": other(tensors["norm.weight"])}, sharded / "model-1.safetensors")
    before = contents(sharded)
    message = "index takes this tensor from another file.*would be lost.*model-1.safetensors, tensor norm.weight"
    with pytest.raises(WeightError, match=message):
        llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True)
    assert contents(sharded) == before
    assert not (tmp_path / "split").exists()
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout)


def test_a_shard_that_is_named_like_a_part_is_not_written_over(sharded, layout):
    index = sharded / "model.safetensors.index.json"
    (sharded / "model-1.safetensors").rename(sharded / "begin.safetensors")
    index.write_text(index.read_text().replace("model-1", "begin"))
    before = contents(sharded)
    with pytest.raises(WeightError, match="a file that the source needs.*begin.safetensors.*another destination"):
        llm_sepweight.split(sharded, sharded, layout=layout, in_place=True)
    assert contents(sharded) == before


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vocab.txt", "Vocab.txt"], "the file name 'vocab.txt' is taken or reserved"),
        (["Sepweight.json"], "the file name 'Sepweight.json' is taken or reserved"),
        (["a\\b.txt"], r"'a\\\\b.txt', which is not the name of a file"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_small_files_that_no_manifest_can_name_are_refused_before_anything_is_written(
    sharded, layout, tmp_path, names, message, in_place
):
    for name in names:
        (sharded / name).touch()
    before = contents(sharded)
    with pytest.raises(WeightError, match=f"{message}.*Change that in the source"):
        llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=in_place)
    assert contents(sharded) == before
    assert not (tmp_path / "split").exists()
    (sharded / names[0]).unlink()
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=in_place)
    assert llm_sepweight.verify(tmp_path / "split") == []


def test_a_manifest_that_cannot_be_read_again_is_not_written_and_nothing_is_lost(sharded, layout, tmp_path):
    """A small file that comes while the parts are written."""

    def meanwhile(done: int, total: int) -> None:
        (sharded / "Tokenizer.json").touch()

    with pytest.raises(WeightError, match="'tokenizer.json' is taken or reserved"):
        llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True, progress=meanwhile)
    assert not (tmp_path / "split" / "sepweight.json").exists()
    (sharded / "Tokenizer.json").unlink()
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True)
    assert llm_sepweight.verify(tmp_path / "split") == []


def test_an_index_that_was_not_read_stays(sharded, layout, tmp_path):
    other = sharded / "pytorch_model.bin.index.json"
    other.write_text("{}")
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True)
    assert [path.name for path in sharded.glob("*.index.json")] == [other.name]


def test_a_part_that_reads_back_otherwise_frees_nothing(sharded, tmp_path, layout, monkeypatch):
    before = contents(sharded)
    monkeypatch.setattr(_parts, "file_checksum", lambda path: "xxh3_128:" + "0" * 32)
    with pytest.raises(WeightError, match="not what was written.*Check the disk"):
        llm_sepweight.split(sharded, tmp_path / "split", layout=layout, in_place=True)
    assert contents(sharded) == before


def test_no_thread_and_no_temporary_file_outlives_a_split_that_fails(sharded, tmp_path, layout):
    threads = threading.active_count()

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_sepweight.split(sharded, tmp_path / "split", layout=layout, progress=stop)
    assert threading.active_count() == threads
    assert not list((tmp_path / "split").glob("*.partial"))
    llm_sepweight.split(sharded, tmp_path / "split", layout=layout)
    assert llm_sepweight.verify(tmp_path / "split") == []


@pytest.mark.parametrize("limit", [40_000, 41 << 10])  # no whole pages; one is whole sectors
def test_a_disk_that_takes_no_more_loses_nothing_and_the_split_goes_on_later(checkpoint, layout, tmp_path, limit):
    """A real limit: no file of this process may be larger than about 40 kB. The embedding is."""
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(WeightError, match=r"begin.safetensors\). Make room .*run it again"):
            llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout, in_place=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert not (tmp_path / "split" / "sepweight.json").exists()
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout, in_place=True)
    assert llm_sepweight.verify(tmp_path / "split") == []


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(checkpoint, layout, tmp_path, monkeypatch):
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real(path)[:4], 10, *real(path)[5:])))
    with pytest.raises(WeightError, match=r"[\d,]+ bytes are to be written, but the disk has only 40,960 free"):
        llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    assert not list((tmp_path / "split").glob("*.safetensors"))


@pytest.fixture
def permissions_count(checkpoint, tmp_path, monkeypatch) -> Iterator[None]:
    """In `tmp_path`, which is the working directory; for root, as another user, who owns it."""
    monkeypatch.chdir(tmp_path)
    root, nobody = os.geteuid() == 0, 65534
    if root:
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, nobody, -1)
        os.seteuid(nobody)
    yield
    if root:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o500, 0o600])
@pytest.mark.parametrize("destination", ["closed", "closed/split"])
@pytest.mark.parametrize("way", ["split", "split in place", "dump", "dump a stream", "export"])
def test_a_destination_where_nothing_may_be_written_is_named(
    permissions_count, tensors, layout, way, destination, mode
):
    config = json.loads(Path("checkpoint/config.json").read_text())
    begin = {
        "split": partial(llm_sepweight.split, "checkpoint"),
        "split in place": partial(llm_sepweight.split, "checkpoint", in_place=True),
        "dump": partial(llm_sepweight.dump, tensors, config=config),
        "dump a stream": partial(llm_sepweight.dump, [tensors], config=config),
        "export": partial(llm_sepweight.export, "checkpoint"),
    }
    before = contents(Path("checkpoint"))
    Path("closed").mkdir()
    Path("closed").chmod(mode)
    with pytest.raises(WeightError, match=rf"Permission denied \(file {destination}.*Allow it or choose another dest"):
        begin[way](destination, layout=layout)
    assert contents(Path("checkpoint")) == before
    Path("closed").chmod(0o700)
    assert not list(Path("closed").iterdir())


def test_files_that_may_not_be_removed_are_named_before_anything_is_split_in_place(permissions_count, layout):
    Path("checkpoint").chmod(0o500)
    with pytest.raises(WeightError, match=r"cannot be removed: permission denied \(file checkpoint\)\. Allow it"):
        llm_sepweight.split("checkpoint", "split", layout=layout, in_place=True)
    assert not Path("split").exists()
    Path("checkpoint").chmod(0o700)

    def meanwhile(done: int, total: int) -> None:
        Path("checkpoint").chmod(0o500)

    with pytest.raises(WeightError, match=r"cannot be removed: Permission denied \(file checkpoint/model-.* Allow it"):
        llm_sepweight.split("checkpoint", "split", layout=layout, in_place=True, progress=meanwhile)
    Path("checkpoint").chmod(0o700)
    llm_sepweight.split("checkpoint", "split", layout=layout, in_place=True)
    assert llm_sepweight.verify("split") == []


def test_a_destination_that_is_no_directory_is_named(checkpoint, layout, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WeightError, match=r"cannot be written: .*\(file .*file"):
        llm_sepweight.split(checkpoint, tmp_path / "file" / "split", layout=layout)
