from __future__ import annotations

import gc
import json
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llm_sepweight
from llm_sepweight import TensorInfo, WeightError
from llm_sepweight._header import DTYPES


def memory(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def assert_holds(found, expected) -> None:
    assert list(found) == list(expected) or set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def at_end(key, config):
    return [("end", key)]


def test_a_sharded_checkpoint_is_a_store_in_place(checkpoint, layout, expected):
    with llm_sepweight.open(checkpoint, layout) as weights:
        assert weights.parts == ("begin", "mid.00000", "mid.00001", "mid.00002", "end")
        assert weights.config["rope_theta"] == 1e4
        for part, tensors in expected.items():
            assert_holds(weights.load(part), tensors)
            assert weights.nbytes(part) == sum(t.nbytes for t in tensors.values())
            infos = {name: TensorInfo(t.dtype, tuple(t.shape), t.nbytes) for name, t in tensors.items()}
            assert dict(weights.tensors(part)) == infos


def test_a_single_file_needs_no_index_and_no_config(tmp_path):
    save_file({"a": torch.arange(5)}, tmp_path / "model.safetensors")
    with llm_sepweight.open(str(tmp_path), at_end) as weights:
        assert weights.config == {}
        assert_holds(weights.load("end"), {"a": torch.arange(5)})


def test_the_index_comes_before_the_single_file_and_safetensors_before_bin(checkpoint, layout, expected):
    save_file({"other": torch.zeros(1)}, checkpoint / "model.safetensors")
    torch.save({"other": torch.zeros(1)}, checkpoint / "pytorch_model.bin")
    with llm_sepweight.open(checkpoint, layout) as weights:
        assert_holds(weights.load("mid.00001"), expected["mid.00001"])


def test_files_may_be_links_as_in_the_cache_of_the_hub_but_lead_nowhere_else(checkpoint, layout, expected, tmp_path):
    blobs, snapshot = tmp_path / "model" / "blobs", tmp_path / "model" / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        file.rename(blobs / file.stem)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.stem}")
    with llm_sepweight.open(snapshot, layout) as weights:
        assert_holds(weights.load("mid.00001"), expected["mid.00001"])
    shard = next(snapshot.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to((blobs / shard.stem).rename(tmp_path / "elsewhere"))
    with pytest.raises(WeightError, match=f"leads out of its directory.*{shard.name}"):
        llm_sepweight.open(snapshot, layout)


@pytest.mark.parametrize("skip", [0, 1, 4000])
def test_load_fills_the_callers_memory(checkpoint, layout, expected, skip):
    with llm_sepweight.open(checkpoint, layout) as weights:
        nbytes = weights.buffer_nbytes("mid.00001")
        into = memory(nbytes + 8192)[skip:]
        found = weights.load("mid.00001", into=into)
        assert_holds(found, expected["mid.00001"])
        begin = into.data_ptr()
        for tensor in found.values():
            assert tensor.numel() == 0 or begin <= tensor.data_ptr() <= begin + len(into) - tensor.nbytes


def test_load_also_fills_a_plain_buffer(checkpoint, layout, expected):
    with llm_sepweight.open(checkpoint, layout) as weights:
        into = mmap.mmap(-1, weights.buffer_nbytes("begin"))
        found = weights.load("begin", into=into)
        assert_holds(found, expected["begin"])
        into[:] = bytes(len(into))
        assert not found["embed.weight"].any()


@pytest.mark.parametrize("into", [memory(4096), b"\0" * 99999, torch.zeros(99999)], ids=["small", "readonly", "floats"])
def test_memory_that_will_not_do_is_refused(checkpoint, layout, into):
    with llm_sepweight.open(checkpoint, layout) as weights, pytest.raises(ValueError, match="into: .* needed"):
        weights.load("begin", into=into)


def test_tensors_outlive_the_store(checkpoint, layout, expected):
    with llm_sepweight.open(checkpoint, layout) as weights:
        found = weights.load("mid.00001")
    gc.collect()
    assert_holds(found, expected["mid.00001"])


def test_addresses_are_those_of_the_file_modulo_a_page(tmp_path):
    """So the same rows come with the same alignment, whether read alone or with all others."""
    save_file({"a": torch.randn(1001, 1001), "b": torch.randn(999, 77)}, tmp_path / "model.safetensors")
    with llm_sepweight.open(tmp_path, at_end) as weights:
        offsets = {name: entry.extents[0].offset for name, entry in weights._part("end").items()}
        for name, tensor in weights.load("end").items():
            assert tensor.data_ptr() % 4096 == offsets[name] % 4096
            into = memory(tensor.nbytes + 8192)
            for start, stop in ((0, 3), (5, 900), (998, 999)):
                rows = weights.read("end", name, start, stop, into)
                assert rows.data_ptr() % 4096 == tensor[start:].data_ptr() % 4096


def test_read_gives_rows_of_any_tensor(checkpoint, layout, expected):
    into = memory(1 << 17)
    with llm_sepweight.open(checkpoint, layout) as weights:
        for part, tensors in expected.items():
            for name, tensor in tensors.items():
                for start in range(0, len(tensor) if tensor.dim() else 0, 7):
                    stop = min(start + 13, len(tensor))
                    rows = weights.read(
                        part, name, start, stop, into[: tensor[start:stop].nbytes // 4096 * 4096 + 8192]
                    )
                    assert torch.equal(rows, tensor[start:stop])


@pytest.mark.parametrize(
    ("name", "start", "stop"), [("up.weight", 0, 97), ("up.weight", -1, 2), ("up.weight", 3, 2), ("scale", 0, 1)]
)
def test_read_refuses_rows_that_are_not_there(checkpoint, layout, name, start, stop):
    with (
        llm_sepweight.open(checkpoint, layout) as weights,
        pytest.raises(WeightError, match=f"part mid.00000, .*{name}"),
    ):
        weights.read("mid.00000", name, start, stop, memory(1 << 16))


@pytest.mark.parametrize("ids", [[], [5], [5, 5], [999, 0, 500, 0], list(range(1000)), torch.tensor([3, 1, 2])])
def test_rows_come_in_the_order_asked_for(checkpoint, layout, tensors, ids):
    with llm_sepweight.open(checkpoint, layout) as weights:
        wanted = torch.as_tensor(ids, dtype=torch.int64)
        assert torch.equal(weights.rows("begin", "embed.weight", ids), tensors["embed.weight"][wanted])


def test_rows_of_a_large_sparse_choice_are_found(tmp_path):
    table = torch.randn(4000, 3000)
    save_file({"table": table}, tmp_path / "model.safetensors")
    ids = torch.randint(0, 4000, (500,))
    with llm_sepweight.open(tmp_path, at_end) as weights:
        assert torch.equal(weights.rows("end", "table", ids), table[ids])


def test_rows_of_vectors_stacks_and_nothing(checkpoint, layout, expected):
    with llm_sepweight.open(checkpoint, layout) as weights:
        stack = expected["mid.00002"]["experts.weight"]
        assert torch.equal(weights.rows("mid.00002", "experts.weight", [1, 0, 1]), stack[[1, 0, 1]])
        assert torch.equal(weights.rows("end", "norm.weight", [7, 3]), expected["end"]["norm.weight"][[7, 3]])
        assert weights.rows("mid.00000", "nothing", []).shape == (0, 24)


@pytest.mark.parametrize("ids", [[1000], [-1], [[1]]])
def test_rows_that_are_not_there_are_refused(checkpoint, layout, ids):
    with (
        llm_sepweight.open(checkpoint, layout) as weights,
        pytest.raises(WeightError, match=r"row.*tensor embed.weight"),
    ):
        weights.rows("begin", "embed.weight", ids)


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "F8_E8M0"])
def test_every_dtype_is_read(tmp_path, name):
    raw = torch.arange(48, dtype=torch.uint8).reshape(6, 8) % 2
    tensor = raw.clone().view(DTYPES[name])
    try:
        save_file({"a": tensor}, tmp_path / "model.safetensors")
    except KeyError:
        pytest.skip("this safetensors does not write it")
    with llm_sepweight.open(tmp_path, at_end) as weights:
        found = weights.load("end")["a"]
        assert found.dtype == tensor.dtype
        assert torch.equal(found.contiguous().view(torch.uint8), raw)


def test_a_tensor_that_lies_askew_in_the_file_is_copied_to_aligned_memory(tmp_path):
    skewed, matrix = torch.arange(3, dtype=torch.uint8), torch.randn(300, 70)
    text = (
        b'{"skewed":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
        b'"matrix":{"dtype":"F32","shape":[300,70],"data_offsets":[3,84003]}}'
    )
    text += b" " * (-len(text) % 8)  # so the matrix starts three bytes beyond a multiple of eight
    data = len(text).to_bytes(8, "little") + text + skewed.numpy().tobytes() + matrix.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    with llm_sepweight.open(tmp_path, at_end) as weights:
        found = weights.load("end")
        rows = weights.read("end", "matrix", 17, 150, memory(1 << 17))
        assert torch.equal(weights.rows("end", "matrix", [299, 2]), matrix[[299, 2]])
    assert torch.equal(found["matrix"], matrix)
    assert torch.equal(rows, matrix[17:150])
    assert found["matrix"].data_ptr() % 64 == 0
    assert rows.data_ptr() % 4096 == found["matrix"][17:].data_ptr() % 4096


def test_many_threads_read_at_once(tmp_path):
    table = torch.randn(3000, 257)
    save_file({"table": table}, tmp_path / "model.safetensors")
    with llm_sepweight.open(tmp_path, at_end) as weights:

        def read(seed: int) -> bool:
            into = memory(1 << 21)
            start = seed * 37 % 2000
            for stop in range(start + 1, start + 900, 90):
                if not torch.equal(weights.read("end", "table", start, stop, into), table[start:stop]):
                    return False
            return torch.equal(weights.rows("end", "table", [seed, start]), table[[seed, start]])

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(read, range(100)))


def test_closing_leaves_no_file_and_no_thread(checkpoint, layout):
    def files_of() -> list[str]:
        links = (f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd"))
        return [os.readlink(link) for link in links if os.path.islink(link)]

    threads = threading.active_count()
    weights = llm_sepweight.open(checkpoint, layout)
    for part in weights.parts:
        weights.load(part)
    assert sum(str(checkpoint) in file for file in files_of()) == 2
    weights.close()
    weights.close()
    assert not any(str(checkpoint) in file for file in files_of())
    assert threading.active_count() == threads
    for use in (
        lambda: weights.load("mid.00001"),
        lambda: weights.read("begin", "embed.weight", 0, 1, memory(1 << 16)),
    ):
        with pytest.raises(WeightError, match="this store is closed"):
            use()


def test_few_files_are_open_at_a_time_however_many_parts_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_sepweight._reader.OPEN_FILES", 3)
    state = {str(layer): torch.full((9,), layer) for layer in range(12)}
    llm_sepweight.dump(state, tmp_path, config={}, layout=lambda key, config: [(f"mid.{int(key):05d}", "x")])
    with llm_sepweight.open(tmp_path, verify="lazy") as weights, ThreadPoolExecutor(4) as pool:
        parts = [*weights.parts, *reversed(weights.parts)] * 5
        for part, found in zip(parts, pool.map(weights.load, parts), strict=True):
            assert torch.equal(found["x"], state[str(int(part[4:]))])
        for part in weights.parts:
            weights.load(part)
        links = (f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd"))
        assert sum(str(tmp_path) in os.readlink(link) for link in links if os.path.islink(link)) <= 3 + 4


def test_what_is_not_there_is_named(checkpoint, layout):
    with llm_sepweight.open(checkpoint, layout) as weights:
        with pytest.raises(WeightError, match="no part 'mid.00003'; there are begin, mid.00000"):
            weights.load("mid.00003")
        with pytest.raises(WeightError, match="no tensor 'bias'; there are embed.weight"):
            weights.rows("begin", "bias", [0])


def test_a_missing_part_is_named_beside_a_few_of_thousands(tmp_path):
    def layout(key, config):
        layer, _, expert = key.partition(".")
        return [(f"mid.{int(layer):05d}" + (f"/experts.{int(expert):05d}" if expert else ""), "x")]

    keys = [f"{layer}{expert}" for layer in range(48) for expert in ("", *(f".{n}" for n in range(128)))]
    keys.remove("1.3")
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "model.safetensors")
    shown = {
        "mid.00001/experts.00003": "mid.00001/experts.00000, mid.00001/experts.00001, 123 others, "
        "mid.00001/experts.00126, mid.00001/experts.00127",
        "mid.00048": "mid.00000, mid.00001, 44 others, mid.00046, mid.00047",
        "mid.00048/experts.00000": "mid.00000, mid.00001, 44 others, mid.00046, mid.00047",
    }
    with llm_sepweight.open(tmp_path, layout) as weights:
        for part, beside in shown.items():
            with pytest.raises(WeightError) as caught:
                weights.tensors(part)
            assert str(caught.value) == f"there is no part {part!r}; there are {beside} (file {tmp_path})"


def test_a_checkpoint_without_layout_is_refused_with_the_remedy(checkpoint: Path):
    with pytest.raises(WeightError, match="Pass layout="):
        llm_sepweight.open(checkpoint)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([("end", "a")], "another tensor already is"),
        ([("head", "a")], "a part 'head'"),
        ([("../end", "a")], "a part '../end'"),
        ([("end", "a", slice(0, 1))], r"index slice\(0, 1, None\)"),
        ([("end", "a", -1)], "index -1"),
        ([("end", "a", 1)], "another tensor already is"),
        (None, "the layout fails"),
    ],
)
def test_a_layout_that_cannot_be_followed_is_refused(tmp_path, answer, message):
    save_file({"x": torch.zeros(2), "y": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=f"{message}.*model.safetensors"):
        llm_sepweight.open(tmp_path, lambda key, config: answer)


def test_an_unknown_key_surfaces_as_the_layouts_error_with_the_file(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")

    def strict(key, config):
        raise ValueError(f"unknown key {key!r}")

    with pytest.raises(WeightError, match="unknown key 'x'.*model.safetensors, tensor x") as caught:
        llm_sepweight.open(tmp_path, strict)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(("config", "advice"), [({"act": "gelu"}, "look at both"), (None, "there is none")])
def test_where_a_layout_fails_the_config_that_it_goes_by_is_named_beside_the_key(tmp_path, config, advice):
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))

    def strict(key, config):
        raise ValueError(f"act {config.get('act')!r} is not supported")

    with pytest.raises(WeightError, match=f"tensor x.* by the key and by the model's config.json: {advice}"):
        llm_sepweight.open(tmp_path, strict)


def test_missing_slices_and_slices_that_differ_are_refused(tmp_path):
    save_file({"0": torch.zeros(2), "2": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"only \[0, 2\] found"):
        llm_sepweight.open(tmp_path, lambda key, config: [("end", "w", int(key))])
    with pytest.raises(WeightError, match="differs in dtype or shape"):
        llm_sepweight.open(tmp_path, lambda key, config: [("end", "w", int(key) // 2)])
