"""What tests of several topics of `offload` take."""

from __future__ import annotations

import pytest

from llm_partial_run import _kinds, _units
from offloading import CONFIGS, save


@pytest.fixture
def small_slices(monkeypatch):
    """Several slices a matrix, and nothing too small to be streamed, as in a model of real size."""
    monkeypatch.setattr(_units, "SLICE", 2048)
    monkeypatch.setattr(_kinds, "SMALL", 512)
    monkeypatch.setattr(_kinds, "TABLE", 4096)


@pytest.fixture(params=CONFIGS)
def checkpoint(request, tmp_path):
    return save(CONFIGS[request.param], tmp_path)
