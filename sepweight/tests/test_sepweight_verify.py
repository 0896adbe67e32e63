"""Damage is found, whatever it is, by the name of the file; and mended from a source."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llm_sepweight
from llm_sepweight import WeightError, WeightStore, verify
from llm_sepweight._reading import WeightFile

DAMAGES = 200


@pytest.fixture
def directory(checkpoint, layout, tmp_path) -> Path:
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    return tmp_path / "split"


@pytest.fixture
def untied(layout):
    """The layout without the head, which is the embedding: no part needs another."""
    return lambda key, config: layout(key, config)[:1]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def damage(directory: Path, chance: random.Random) -> set[str]:
    """One random damage; the names of the files that it hits."""
    names = sorted(path.name for path in directory.iterdir() if path.stat().st_size > 2)
    name, other = chance.sample(names, 2)
    path = directory / name
    kind = chance.choice(["flip", "flip", "truncate", "extend", "zero", "swap", "missing", "replaced"])
    if kind == "flip":
        flip(path, chance.randrange(path.stat().st_size), chance.randrange(8))
    elif kind == "truncate":
        os.truncate(path, chance.randrange(path.stat().st_size))
    elif kind == "extend":
        path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 5000)))
    elif kind == "zero":  # a page that never reached the disk
        data = bytearray(path.read_bytes())
        nonzero = next(at for at in range(chance.randrange(len(data)), -1, -1) if data[at])
        data[nonzero : nonzero + 4096] = bytes(len(data[nonzero : nonzero + 4096]))
        path.write_bytes(data)
    elif kind == "swap":
        (directory / other).rename(directory / "swapping")
        path.rename(directory / other)
        (directory / "swapping").rename(path)
        return {name, other}
    elif kind == "missing":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    return {name}


def test_an_undamaged_model_has_no_damages_and_is_read_once(directory):
    seen: list[tuple[int, int]] = []
    assert verify(directory, progress=lambda *done: seen.append(done)) == []
    total = sum(path.stat().st_size for path in directory.iterdir() if path.name != "sepweight.json")
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_200_random_damages_are_found_by_the_names_of_their_files(directory, tmp_path):
    whole = contents(directory)
    for seed in range(DAMAGES):
        shutil.copytree(directory, tmp_path / "damaged")
        hit = damage(tmp_path / "damaged", random.Random(seed))
        found = {each.file for each in verify(tmp_path / "damaged")}
        if "sepweight.json" in hit:  # by which nothing else can be judged
            assert found == {"sepweight.json"}, seed
        else:
            assert found == hit, seed
        shutil.rmtree(tmp_path / "damaged")
    assert contents(directory) == whole


def test_every_flipped_bit_of_a_manifest_is_found(directory):
    manifest = directory / "sepweight.json"
    data = manifest.read_bytes()
    for at in range(0, len(data), 7):
        manifest.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        assert [each.file for each in verify(directory)] == ["sepweight.json"], at


def test_what_is_damaged_is_repaired_from_the_checkpoint(directory, checkpoint, layout):
    whole = contents(directory)
    flip(directory / "mid.00001.safetensors", -3)
    (directory / "begin.safetensors").unlink()
    os.truncate(directory / "tokenizer.json", 0)
    found = verify(directory, source=checkpoint, layout=layout)
    assert {each.file: each.part for each in found} == {
        "begin.safetensors": "begin", "mid.00001.safetensors": "mid.00001", "tokenizer.json": None,
    }  # fmt: skip
    assert all(each.repaired for each in found)
    assert contents(directory) == whole


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("spec", ["f", "1:3"])
def test_a_damaged_manifest_is_written_anew_for_the_parts_that_are_there(checkpoint, layout, tmp_path, dtype, spec):
    directory = tmp_path / "some"
    llm_sepweight.split(checkpoint, directory, layout=layout, spec=spec, dtype=dtype)
    whole = contents(directory)
    manifest = directory / "sepweight.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"tool": "llm', b'"tool": "lln'))
    flip(directory / "mid.00001.safetensors", 8000)
    sound = {path: path.stat().st_ino for path in directory.iterdir() if "json" not in path.name}
    del sound[directory / "mid.00001.safetensors"]
    found = verify(directory, source=checkpoint, layout=layout)
    assert [(each.file, each.repaired) for each in found] == [("sepweight.json", True), ("mid.00001.safetensors", True)]
    assert contents(directory) == whole
    assert {path: path.stat().st_ino for path in sound} == sound  # what is right is not replaced


@pytest.mark.parametrize("name", ["begin.safetensors", "tokenizer.json"])
def test_what_a_lost_manifest_cannot_tell_is_not_replaced(directory, checkpoint, layout, name):
    whole = contents(directory)
    flip(directory / name, -1)
    (directory / "sepweight.json").unlink()
    damaged = contents(directory)
    for _ in range(2):
        manifest, other = verify(directory, source=checkpoint, layout=layout)
        assert (manifest.file, manifest.repaired) == ("sepweight.json", False)
        assert (other.file, other.repaired) == (name, False)
        assert "are others than at the source, and the manifest cannot tell which is right" in other.problem
        assert contents(directory) == damaged
    (directory / name).unlink()  # the others need it, and are right
    assert all(each.repaired for each in verify(directory, source=checkpoint, layout=layout))
    assert contents(directory) == whole


def test_a_damaged_manifest_and_the_checkpoint_of_another_model_leave_all_as_it_is(
    directory, checkpoint, tensors, layout
):
    flip(directory / "sepweight.json", 300)
    damaged = contents(directory)
    for shard in checkpoint.glob("*.safetensors"):  # another fine-tune: only the layers are others
        keys = load_file(shard)
        save_file({key: tensors[key] * (2 if "layers" in key else 1) for key in keys}, shard)
    found = verify(directory, source=checkpoint, layout=layout)
    assert [each.file for each in found] == ["sepweight.json", *(f"mid.0000{i}.safetensors" for i in range(3))]
    assert not any(each.repaired for each in found)
    assert contents(directory) == damaged


def fine_tune(checkpoint: Path, tensors: dict[str, torch.Tensor], *changed: str) -> None:
    """Make the checkpoint that of a model in which these tensors are others."""
    for shard in checkpoint.glob("*.safetensors"):
        save_file({key: tensors[key] * (2 if key in changed else 1) for key in load_file(shard)}, shard)


@pytest.mark.parametrize(("key", "name"), [("layers.1.up.weight", "mid.00001"), ("embed.weight", "begin")])
def test_a_missing_part_is_not_taken_from_another_model(directory, checkpoint, tensors, layout, key, name):
    whole = contents(directory)
    manifest = directory / "sepweight.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"tool": "llm', b'"tool": "lln'))
    (directory / f"{name}.safetensors").unlink()
    damaged = contents(directory)
    fine_tune(checkpoint, tensors, key)
    _, found = verify(directory, source=checkpoint, layout=layout)
    assert (found.file, found.repaired) == (f"{name}.safetensors", False)
    assert "file is missing, and the manifest cannot tell whether the source has what was in it" in found.problem
    assert contents(directory) == damaged
    fine_tune(checkpoint, tensors)  # what it was split from
    assert all(each.repaired for each in verify(directory, source=checkpoint, layout=layout))
    assert contents(directory) == whole


DAMAGED_MANIFESTS = {
    "cut": lambda manifest: manifest[:200],
    "empty": lambda manifest: b"",
    "zeros": lambda manifest: bytes(len(manifest)),
    "misspelt": lambda manifest: re.sub(rb'"[a-z0-9.]+.safetensors"', b'"mid.00011.safetensors"', manifest),
    "one twice": lambda manifest: re.sub(rb'"[a-z0-9.]+.safetensors"', b'"mid.00000.safetensors"', manifest),
}


@pytest.mark.parametrize("damaged", DAMAGED_MANIFESTS.values(), ids=DAMAGED_MANIFESTS)
@pytest.mark.parametrize("name", ["begin", "mid.00001", "mid.00002", "end"])
def test_a_missing_part_is_not_left_out_of_a_new_manifest(checkpoint, tmp_path, untied, name, damaged):
    directory = tmp_path / "split"
    llm_sepweight.split(checkpoint, directory, layout=untied)
    manifest = directory / "sepweight.json"
    manifest.write_bytes(damaged(manifest.read_bytes()))
    (directory / f"{name}.safetensors").unlink()
    before = contents(directory)
    *_, found = verify(directory, source=checkpoint, layout=untied)
    assert (found.file, found.part, found.repaired) == (f"{name}.safetensors", name, False)
    problem = "the file is missing, and the manifest cannot tell whether it was here: split or fetch"
    assert problem in found.problem
    assert contents(directory) == before


@pytest.mark.parametrize("old", ["mid.00001", "tokenizer"])
def test_a_file_whose_name_is_misspelt_in_the_manifest_is_not_left_out(directory, checkpoint, layout, old):
    file = f"{old}.safetensors" if "." in old else f"{old}.json"
    manifest = directory / "sepweight.json"
    misspelt = manifest.read_bytes().replace(f'"{file}"'.encode(), f'"{file.translate({49: 51, 116: 117})}"'.encode())
    whole = contents(directory)
    manifest.write_bytes(misspelt)
    assert [each.repaired for each in verify(directory, source=checkpoint, layout=layout)] == [True]  # it is here
    assert contents(directory) == whole
    manifest.write_bytes(misspelt)
    (directory / file).unlink()
    before = contents(directory)
    found = verify(directory, source=checkpoint, layout=layout)
    assert (found[-1].file, found[-1].repaired) == (file, False)
    assert contents(directory) == before


@pytest.mark.parametrize("cut", [0, 200])
def test_small_files_are_written_where_nothing_is_left_of_the_manifest(directory, checkpoint, layout, cut):
    whole = contents(directory)
    (directory / "sepweight.json").write_bytes(whole["sepweight.json"][:cut])
    (directory / "tokenizer.json").unlink()
    _, found = verify(directory, source=checkpoint, layout=layout)
    assert (found.file, found.repaired) == ("tokenizer.json", cut == 0)
    assert (contents(directory) == whole) == (cut == 0)


def test_a_manifest_that_cannot_be_read_is_not_mended_for_some_of_the_parts(checkpoint, layout, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "some", layout=layout, spec="1:3")
    os.truncate(tmp_path / "some" / "sepweight.json", 200)
    before = contents(tmp_path / "some")
    _, *found = verify(tmp_path / "some", source=checkpoint, layout=layout)
    assert [each.file for each in found[:3]] == ["begin.safetensors", "mid.00000.safetensors", "end.safetensors"]
    assert not any(each.repaired for each in found)
    assert contents(tmp_path / "some") == before


def test_a_manifest_that_names_all_its_parts_is_mended_without_those_between(checkpoint, layout, tmp_path):
    llm_sepweight.split(checkpoint, tmp_path / "some", layout=layout, spec="b 1:2 e")
    whole = contents(tmp_path / "some")
    manifest = tmp_path / "some" / "sepweight.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"tool": "llm', b'"tool": "lln'))
    (found,) = verify(tmp_path / "some", source=checkpoint, layout=layout)
    assert found.repaired
    assert contents(tmp_path / "some") == whole


def test_a_part_that_only_the_damaged_manifest_knows_is_not_left_out(directory, checkpoint, layout):
    manifest = directory / "sepweight.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"tool": "llm', b'"tool": "lln'))
    damaged = contents(directory)

    def fewer(key, config):
        return [] if ".2." in key else layout(key, config)

    found = verify(directory, source=checkpoint, layout=fewer)
    assert [(each.file, each.repaired) for each in found] == [
        ("sepweight.json", False), ("mid.00002.safetensors", False),
    ]  # fmt: skip
    assert "the source does not have it" in found[1].problem
    assert contents(directory) == damaged
    (directory / "mid.00002.safetensors").unlink()
    assert [each.file for each in verify(directory, source=checkpoint, layout=fewer)][1:] == ["mid.00002.safetensors"]
    assert not (directory / "mid.00002.safetensors").exists()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("with_manifest", [False, True])
def test_an_unfinished_split_is_no_damage_and_is_not_touched(checkpoint, layout, tmp_path, in_place, with_manifest):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout, in_place=in_place, progress=stop)
    if with_manifest:  # that of the finished split, damaged, as after a crash at its very end
        (tmp_path / "split" / "sepweight.json").write_text("{")
    before = contents(tmp_path / "split")
    remedy = "Do not remove the directory" if in_place else "Run it again, as it was"
    for source in (None, copy):
        with pytest.raises(WeightError, match=f"split of 'checkpoint' to this directory is not finished.*{remedy}"):
            verify(tmp_path / "split", source=source, layout=layout)
    assert contents(tmp_path / "split") == before
    (tmp_path / "split" / "sepweight.json").unlink(missing_ok=True)
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout, in_place=in_place)
    assert verify(tmp_path / "split") == []


def test_an_unfinished_fetch_is_no_damage(directory, tmp_path):
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm_sepweight.fetch(directory, "f", tmp_path / "node", progress=stop)
    with pytest.raises(WeightError, match="not finished.*Run it again"):
        verify(tmp_path / "node", source=directory)


def test_a_newer_format_is_no_damage(directory, checkpoint, layout):
    manifest = directory / "sepweight.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"version": 1', b'"version": 2'))
    before = contents(directory)
    for source in (None, checkpoint):
        with pytest.raises(WeightError, match="version 2 of the format, newer than 1.*Upgrade llm_sepweight"):
            verify(directory, source=source, layout=layout)
    assert contents(directory) == before


def test_another_copy_repairs_as_well(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    whole = contents(directory)
    flip(directory / "end.safetensors", -2)
    with llm_sepweight.open(tmp_path / "copy") as copy:
        (found,) = verify(directory, source=copy)
    assert str(found).endswith("repaired")
    assert contents(directory) == whole


def test_a_source_that_holds_something_else_mends_nothing(directory, checkpoint, layout):
    flip(directory / "mid.00001.safetensors", 8000)
    damaged = contents(directory)
    for shard in checkpoint.glob("*.safetensors"):
        for at in range(-4000, 0, 100):
            flip(shard, at)
    (found,) = verify(directory, source=checkpoint, layout=layout)
    assert not found.repaired
    assert "'checkpoint' does not hold what was in it" in found.problem
    assert contents(directory) == damaged


def test_what_cannot_be_repaired_does_not_keep_the_rest_from_it(directory, checkpoint, layout):
    flip(directory / "end.safetensors", -2)
    (directory / "begin.safetensors").unlink()
    (directory / "begin.safetensors").mkdir()
    begin, end = verify(directory, source=checkpoint, layout=layout)
    assert not begin.repaired
    assert "not a regular file; not repaired: the file cannot be written" in begin.problem
    assert (end.file, end.repaired) == ("end.safetensors", True)
    assert [each.file for each in verify(directory)] == ["begin.safetensors"]


def test_a_file_that_cannot_be_read_does_not_hide_the_others(directory, monkeypatch):
    flip(directory / "end.safetensors", -2)
    real = WeightFile.read

    def failing(self, into, offset, nbytes):
        if "mid.00000" in self.path:
            raise WeightError(f"reading failed: {os.strerror(errno.EIO)}", file=self.path)
        real(self, into, offset, nbytes)

    monkeypatch.setattr(WeightFile, "read", failing)
    found = verify(directory)
    assert [each.file for each in found] == ["mid.00000.safetensors", "end.safetensors"]
    assert "Input/output error" in found[0].problem


def test_where_there_is_nothing_to_verify_this_is_said(tmp_path, checkpoint):
    with pytest.raises(WeightError, match="no such directory"):
        verify(tmp_path / "absent")
    (found,) = verify(checkpoint)
    assert (found.file, found.problem) == ("sepweight.json", "the file is missing")


# verify="lazy"


def uses(weights: WeightStore):
    """Each way to read from the last part, and from a tensor that is tied."""
    into = torch.empty(1 << 20, dtype=torch.uint8)
    return {
        "load": lambda: weights.load("mid.00002"),
        "load into": lambda: weights.load("mid.00002", into=into),
        "read": lambda: weights.read("mid.00002", "up.weight", 3, 5, into),
        "rows": lambda: weights.rows("mid.00002", "up.weight", [5]),
        "tied": lambda: weights.load("end"),
    }


@pytest.mark.parametrize("way", ["load", "load into", "read", "rows", "tied"])
@pytest.mark.parametrize("at", [9, 4090, -2])  # in the header, in its blanks, in the data
def test_lazy_verification_finds_damage_when_a_part_is_first_read(directory, way, at):
    file = directory / ("begin.safetensors" if way == "tied" else "mid.00002.safetensors")
    flip(file, at, 1 if at > 0 else 0)
    if at == 9:  # a name of the header: `open` sees that
        with pytest.raises(WeightError, match=file.name):
            llm_sepweight.open(directory)
        return
    if at == 4090:
        file.write_bytes(file.read_bytes()[:4090] + b"\t" + file.read_bytes()[4091:])  # another blank
    with llm_sepweight.open(directory) as weights:
        uses(weights)[way]()  # unnoticed
    with llm_sepweight.open(directory, verify="lazy") as weights:
        assert weights.load("mid.00000")
        for _ in range(2):
            with pytest.raises(WeightError, match=rf"contents are damaged.*{file.name}, part .*Repair it"):
                uses(weights)[way]()


def test_lazy_verification_reads_what_is_sound_and_checks_it_once(directory, expected, monkeypatch):
    read: list[tuple[str, int, int]] = []
    real = WeightFile.read

    def counting(self, into, offset, nbytes):
        read.append((Path(self.path).name, offset, nbytes))
        real(self, into, offset, nbytes)

    monkeypatch.setattr(WeightFile, "read", counting)
    with llm_sepweight.open(directory, verify="lazy") as weights:
        for _ in range(2):
            for part, wanted in expected.items():
                found = weights.load(part)
                assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        headers = [name for name, offset, _ in read if offset == 0]
        assert sorted(headers) == sorted(f"{part}.safetensors" for part in expected)
        read.clear()
        weights.rows("begin", "embed.weight", [5])
        assert len(read) == 1


@pytest.mark.parametrize("way", ["load", "read", "rows"])
def test_what_is_read_first_is_taken_from_the_pass_that_checks_it(directory, expected, monkeypatch, way):
    read: list[int] = []
    real = WeightFile.read

    def counting(self, into, offset, nbytes):
        read.append(nbytes)
        real(self, into, offset, nbytes)

    wanted = expected["begin"]["embed.weight"]
    monkeypatch.setattr(WeightFile, "read", counting)
    with llm_sepweight.open(directory, verify="lazy") as weights:
        into = torch.empty(1 << 20, dtype=torch.uint8)
        if way == "load":
            assert torch.equal(weights.load("begin", into=into)["embed.weight"], wanted)
        elif way == "read":
            assert torch.equal(weights.read("begin", "embed.weight", 3, 999, into), wanted[3:999])
        else:
            assert torch.equal(weights.rows("begin", "embed.weight", [7]), wanted[[7]])
        assert sum(read) == (directory / "begin.safetensors").stat().st_size


def test_only_a_split_model_can_be_verified(checkpoint, layout, directory):
    with pytest.raises(WeightError, match="no checksums to verify.*Split it first"):
        llm_sepweight.open(checkpoint, layout, verify="lazy")
    with pytest.raises(ValueError, match="verify: None or 'lazy', not True"):
        llm_sepweight.open(directory, verify=True)  # type: ignore[arg-type]
