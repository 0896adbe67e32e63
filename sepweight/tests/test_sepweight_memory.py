"""What work takes in memory does not depend on the model: no more than its windows, and what they need."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llm_sepweight
from llm_sepweight import _copying
from llm_sepweight._dump import piece_of

MIB = 1 << 20
RESET = Path("/proc/self/clear_refs")

pytestmark = pytest.mark.skipif(not RESET.exists(), reason="the system does not tell how much was resident at most")


def taken(work: Callable[[], object]) -> int:
    """The most memory, in bytes, that this process had in use at once meanwhile, beyond what it had before."""

    def resident(which: str) -> int:
        return int(re.findall(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10

    RESET.write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def layout(key, config):
    return [("begin", key), *([("end", key)] if key == "tied" else [])]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_a_split_takes_its_windows_also_where_it_converts(tmp_path, dtype):
    save_file({"large": torch.ones(32 * MIB)}, tmp_path / "model.safetensors")
    assert taken(lambda: llm_sepweight.split(tmp_path, tmp_path / "split", layout=layout, dtype=dtype)) < 64 * MIB


@pytest.mark.parametrize(("dtype", "to"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)])
def test_a_conversion_may_begin_and_end_within_a_value(monkeypatch, dtype, to):
    monkeypatch.setattr(_copying, "SLICE", 64)
    values = torch.randn(100).to(dtype)
    piece = _copying.converted(piece_of(values.view(torch.uint8)), dtype, to)
    whole = values.to(to).view(torch.uint8).numpy().tobytes()
    assert piece.nbytes == len(whole)
    for start in range(0, len(whole), 7):
        for stop in range(start + 1, len(whole) + 1, 5):
            out = bytearray(stop - start)
            piece.copy(start, memoryview(out))
            assert out == whole[start:stop]


def test_a_tied_tensor_at_the_end_of_a_large_file_is_checked_without_what_is_before_it(tmp_path):
    save_file({"large": torch.ones(24 * MIB), "tied": torch.ones(3)}, tmp_path / "model.safetensors")
    llm_sepweight.split(tmp_path, tmp_path / "split", layout=layout)
    with llm_sepweight.open(tmp_path / "split", verify="lazy") as weights:
        found = []
        assert taken(lambda: found.append(weights.load("end"))) < 48 * MIB
    assert torch.equal(found[0]["tied"], torch.ones(3))
