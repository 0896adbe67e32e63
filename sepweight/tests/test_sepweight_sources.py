"""What a model is written from is checked on the way: neither damage nor another model is sealed as sound."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import llm_sepweight
from llm_sepweight import WeightError


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def directory(checkpoint, layout, tmp_path) -> Path:
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=layout)
    return tmp_path / "split"


def split_an_open_store(source: Path, to: Path) -> None:
    with llm_sepweight.open(source) as weights:
        llm_sepweight.split(weights, to)


def split_a_store_that_checks(source: Path, to: Path) -> None:
    with llm_sepweight.open(source, verify="lazy") as weights:
        llm_sepweight.split(weights, to)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "split": llm_sepweight.split,
    "split an open store": split_an_open_store,
    "split a store that checks": split_a_store_that_checks,
    "convert": lambda source, to: llm_sepweight.split(source, to, dtype=torch.float32),
    "split some": lambda source, to: llm_sepweight.split(source, to, spec="1:2 e"),
    "export": llm_sepweight.export,
}


@pytest.mark.parametrize("name", ["mid.00001.safetensors", "begin.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("way", WAYS)
def test_damage_of_a_split_model_is_not_handed_on(directory, tmp_path, way, name):
    flip(directory / name, -1)
    with pytest.raises(WeightError, match=f"contents are damaged: the checksum .*{name}.*Repair it with verify"):
        WAYS[way](directory, tmp_path / "new")
    assert not any((tmp_path / "new" / file).exists() for file in ("sepweight.json", "model.safetensors"))


@pytest.mark.parametrize("name", ["begin.safetensors", "tokenizer.json"])
def test_a_damaged_copy_mends_no_manifest(directory, tmp_path, name):
    shutil.copytree(directory, tmp_path / "copy")
    flip(tmp_path / "copy" / name, -1)
    (directory / name).unlink()
    (directory / "sepweight.json").unlink()
    with pytest.raises(WeightError, match=f"contents are damaged.*copy/{name}"):
        llm_sepweight.verify(directory, source=tmp_path / "copy")
    assert not (directory / "sepweight.json").exists()


def another_model(checkpoint: Path) -> None:
    """Put shards of another model in the place of these, with the same sizes."""
    for shard in checkpoint.glob("*.safetensors"):
        save_file({key: tensor + 1 for key, tensor in load_file(shard).items()}, checkpoint / "other")
        (checkpoint / "other").replace(shard)


def test_a_store_that_is_open_does_not_mix_its_model_with_another(checkpoint, layout, tmp_path):
    with llm_sepweight.open(checkpoint, layout) as weights:
        weights.load("begin")
        another_model(checkpoint)
        for way in (llm_sepweight.split, llm_sepweight.export):
            with pytest.raises(WeightError, match="source was changed meanwhile.*model-0000"):
                way(weights, tmp_path / "new")
            assert not (tmp_path / "new").exists()
        assert weights.load("begin")  # of the file that was open
        with pytest.raises(WeightError, match="file was changed since the store was opened.*model-00002.*Open the"):
            weights.load("mid.00002")


def test_a_file_that_is_replaced_by_one_of_the_same_size_and_time_is_refused(checkpoint, layout):
    with llm_sepweight.open(checkpoint, layout) as weights:
        weights.load("begin")
        before = {shard: shard.stat().st_mtime_ns for shard in checkpoint.glob("*.safetensors")}
        another_model(checkpoint)
        for shard, modified in before.items():
            os.utime(shard, ns=(modified, modified))
        with pytest.raises(WeightError, match="file was changed since the store was opened.*model-00002"):
            weights.load("mid.00002")


def test_a_model_that_is_replaced_while_it_is_opened_is_not_mixed(checkpoint, layout):
    def replacing(key, config):  # called once all headers were read
        if key == "embed.weight":
            another_model(checkpoint)
        return layout(key, config)

    with llm_sepweight.open(checkpoint, replacing) as weights:
        for part in weights.parts:
            with pytest.raises(WeightError, match="file was changed since the store was opened"):
                weights.load(part)


def test_two_damaged_copies_repair_each_other(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    for name in ("mid.00001.safetensors", "tokenizer.json"):
        flip(directory / name, -1)
    for name in ("mid.00002.safetensors", "config.json"):
        flip(tmp_path / "copy" / name, -1)
    assert all(each.repaired for each in llm_sepweight.verify(directory, source=tmp_path / "copy"))
    assert all(each.repaired for each in llm_sepweight.verify(tmp_path / "copy", source=directory))
    assert llm_sepweight.verify(directory) == llm_sepweight.verify(tmp_path / "copy") == []
    assert llm_sepweight.diff(directory, tmp_path / "copy") == []
