from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import llm_sepweight
from llm_sepweight import WeightError
from llm_sepweight._header import DTYPES


def at_end(key, config):
    return [("end", key)]


class Attack:
    """Would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_pickle(path: Path, data: bytes, prefix: str = "archive") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{prefix}/data.pkl", data)


def test_a_bin_checkpoint_in_shards_is_a_store(tmp_path, tensors, layout, expected):
    keys = list(tensors)
    weight_map = {}
    for number in range(3):
        name = f"pytorch_model-{number}.bin"
        torch.save({key: tensors[key] for key in keys[number::3]}, tmp_path / name)
        weight_map |= dict.fromkeys(keys[number::3], name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text('{"model_type": "tiny", "hidden_size": 24, "rope_theta": 10000.0}')
    with llm_sepweight.open(tmp_path, layout) as weights:
        for part, wanted in expected.items():
            found = weights.load(part)
            assert set(found) == set(wanted)
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert torch.equal(weights.rows("begin", "embed.weight", [9, 3]), tensors["embed.weight"][[9, 3]])


def test_views_parameters_shared_storage_and_all_dtypes_are_read(tmp_path):
    base = torch.arange(60.0).reshape(10, 6)
    state = {str(dtype): torch.ones(5).to(dtype) for name, dtype in DTYPES.items() if not name.startswith("F8_E8")}
    state |= {"slice": base[3:7], "tied": base, "parameter": torch.nn.Parameter(base.clone()), "empty": base[:0]}
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict() | state, tmp_path / "pytorch_model.bin")
    with llm_sepweight.open(tmp_path, at_end) as weights:
        found = weights.load("end")
    for name, tensor in (module.state_dict() | state).items():
        assert found[name].dtype == tensor.dtype
        raw = (found[name].contiguous().view(torch.uint8), tensor.detach().contiguous().view(torch.uint8))
        assert torch.equal(*raw), name


def test_a_view_that_lies_within_another_tensor_does_not_shorten_it(tmp_path):
    base = torch.randn(1000, 64)
    torch.save({"base": base, "view": base[:7]}, tmp_path / "pytorch_model.bin")
    with llm_sepweight.open(tmp_path, at_end) as weights:
        found = weights.load("end")
    assert torch.equal(found["base"], base)
    assert torch.equal(found["view"], base[:7])


def test_a_state_dict_with_its_metadata_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    with llm_sepweight.open(tmp_path, at_end) as weights:
        assert torch.equal(weights.load("end")["0.weight"], module.state_dict()["0.weight"])


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, nested):
    attack = Attack(tmp_path / "made")
    torch.save({"a": {"b": [attack]}} if nested else attack, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightError, match=r"refused.*posix\.mkdir.*pytorch_model\.bin.*safetensors"):
        llm_sepweight.open(tmp_path, at_end)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "name",
    ["builtins\neval", "os\nsystem", "torch\nload", "torch.serialization\nload", "collections\nOrderedDict.fromkeys"],
)
def test_no_name_but_those_of_tensors_is_looked_up(tmp_path, name):
    with_pickle(tmp_path / "pytorch_model.bin", f"c{name}\n(VX\ntR.".encode())
    with pytest.raises(WeightError, match="which no weights need"):
        llm_sepweight.open(tmp_path, at_end)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"N.",
        pickle.dumps([1, 2]),
        pickle.dumps({"a": 1}),
        pickle.dumps({3: "x"}),
        b"\x80\x02Nr\xff\xff\xff\xff.",  # a memo of four billion places
        b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v2\n(K\x00K\x00K\x00K\x00tRs.",
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, data):
    with_pickle(tmp_path / "pytorch_model.bin", data)
    with pytest.raises(WeightError, match=r"pytorch_model\.bin"):
        llm_sepweight.open(tmp_path, at_end)


def doubled(times: int) -> bytes:
    """A tuple of two that are the same tuple, and so on, so many times: few bytes, of which a text would have 2**times."""
    return b"K\x01K\x01\x86" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(times))


STORAGE = b"(X\x01\x00\x00\x00actorch\nFloatStorage\n%bX\x01\x00\x00\x00cK\x01tQ"


@pytest.mark.parametrize(
    "data",
    [
        b"}" + doubled(200) + b"K\x01s.",
        b"}(" + doubled(200) + b"K\x01u.",
        b"(" + doubled(200) + b"K\x01d.",
        b"\x8f(" + doubled(200) + b"\x90.",
        b"(" + doubled(200) + b"\x91.",
        b"ccollections\nOrderedDict\n(((" + doubled(200) + b"K\x01tttR.",
        b"}X\x01\x00\x00\x00a" + doubled(200) + b"s.",
        b"}X\x01\x00\x00\x00a" + STORAGE % doubled(200) + b"s.",
        b"}X\x01\x00\x00\x00a" + STORAGE % b"X\x01\x00\x00\x000" + b"}X\x06\x00\x00\x00record" + doubled(200) + b"sbs.",
        b"\x96" + (1 << 62).to_bytes(8, "little") + b".",
    ],
    ids=["setitem", "setitems", "dict", "set", "frozenset", "ordered", "value", "storage", "state", "bytearray"],
)
def test_a_small_pickle_takes_neither_time_nor_memory(tmp_path, data):
    with_pickle(tmp_path / "pytorch_model.bin", data)
    with pytest.raises(WeightError, match=r"pytorch_model\.bin") as error:
        llm_sepweight.open(tmp_path, at_end)
    assert len(str(error.value)) < 500


def test_a_tensor_of_more_dimensions_than_there_can_be_is_refused(tmp_path):
    shape = b"(" + b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f" * 100_000 + b"t"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % b"X\x01\x00\x00\x000" + b"K\x00" + shape * 2 + b"tR"
    with_pickle(tmp_path / "pytorch_model.bin", b"}X\x01\x00\x00\x00a" + tensor + b"s.")
    with pytest.raises(WeightError, match="no valid description of a tensor.*tensor a"):
        llm_sepweight.open(tmp_path, at_end)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_bin_is_refused(tmp_path, keep):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(1000)}, file)
    os.truncate(file, int(keep * file.stat().st_size) if isinstance(keep, float) else keep)
    with pytest.raises(WeightError, match="cut short.*Download"):
        llm_sepweight.open(tmp_path, at_end)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(1000)}, file)
    with zipfile.ZipFile(file) as archive:
        data = archive.read("pytorch_model/data.pkl")
        assert data.count(b"M\xe8\x03") == 2  # 1000, as number of elements of storage and tensor
        with zipfile.ZipFile(tmp_path / "out.bin", "w") as forged:
            forged.writestr("x/data.pkl", data.replace(b"M\xe8\x03", b"M\xe9\x03"))
            forged.writestr("x/data/0", archive.read("pytorch_model/data/0"))
    (tmp_path / "out.bin").replace(file)
    with pytest.raises(WeightError, match="the data ends before the tensor does.*tensor a"):
        llm_sepweight.open(tmp_path, at_end)


def test_a_transposed_tensor_and_the_form_of_old_torch_are_refused_with_the_remedy(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.randn(3, 4).T}, file)
    with pytest.raises(WeightError, match=r"order of its elements.*tensor a.*save_file"):
        llm_sepweight.open(tmp_path, at_end)
    torch.save({"a": torch.randn(3, 4)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightError, match=r"torch < 1\.6.*save_file"):
        llm_sepweight.open(tmp_path, at_end)
