"""Every family through partial_run: transformers' logits, and the same bits whatever the budget; also split first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llm_bloom_model
import llm_falcon_model
import llm_partial_run
import llm_sepweight
from families import VARIANTS, assert_near, family_of, save, theirs
from llm_bloom_model._presets import PRESETS as BLOOMS
from llm_falcon_model._presets import PRESETS as FALCONS

BUDGET: dict[str, Any] = dict(rows=3, context=48, tokens=144, runtime=0)
RESIDENT = 1 << 30


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS[request.param]()
    config.num_hidden_layers = 12  # more than the slots that they are streamed through
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types * 6
    return save(config, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 96, (3, 48), generator=torch.Generator().manual_seed(1))


def logits_and_bytes(path: Path, ids: Tensor, memory: int, layout: Any = None) -> tuple[Tensor, int]:
    """Logits of a prompt, and then of each row's last tokens with the cached rest; and what was read for them."""
    family = family_of(path)
    with llm_sepweight.open(path, layout=layout or family.layout) as weights:
        parts = family.parts(family.Config.from_hf(weights.config))
        with llm_partial_run.PartialRun(parts, weights, memory=memory, **BUDGET) as run:
            first = run.forward(ids[:, :40])
            last = run.forward.last_logits(ids, torch.tensor([48, 41, 44]), n=1)
            assert memory == RESIDENT or run.plan.streamed or run.plan.wanted, "all weights stay"
            return torch.cat([first, last], dim=1), run.stats.bytes_read


def smallest(path: Path) -> int:
    family = family_of(path)
    with llm_sepweight.open(path, layout=family.layout) as weights:
        parts = family.parts(family.Config.from_hf(weights.config))
        with pytest.raises(llm_partial_run.BudgetError) as refused:
            llm_partial_run.plan(parts, weights, memory=1, **BUDGET)
    return refused.value.smallest


def test_streamed_logits_are_transformers_and_the_same_bits_at_every_budget(checkpoint: Path, ids: Tensor) -> None:
    expected = theirs(checkpoint, ids)
    resident, read = logits_and_bytes(checkpoint, ids, RESIDENT)
    assert_near(resident[:, :40], expected[:, :40])
    for row, length in enumerate((48, 41, 44)):
        assert_near(resident[row, -1], expected[row, length - 1])
    for memory in (smallest(checkpoint), smallest(checkpoint) + (20 << 10)):
        streamed, read_then = logits_and_bytes(checkpoint, ids, memory)
        assert torch.equal(streamed, resident)
        assert read_then > read


def test_a_split_checkpoint_gives_the_same_logits(checkpoint: Path, ids: Tensor, tmp_path: Path) -> None:
    llm_sepweight.split(checkpoint, tmp_path / "split", layout=family_of(checkpoint).layout)
    whole, _ = logits_and_bytes(checkpoint, ids, RESIDENT)
    split, _ = logits_and_bytes(tmp_path / "split", ids, smallest(checkpoint) + (64 << 10))
    assert_near(split, whole)  # not the same bits: its tensors lie otherwise in their pages, and kernels tell


@pytest.mark.parametrize(("family", "presets"), [(llm_bloom_model, BLOOMS), (llm_falcon_model, FALCONS)])
def test_keys_of_a_token_of_published_models_are_multiples_of_64_bytes(family: Any, presets: Any) -> None:
    for name in presets:  # so that rows begin at the start of a vector, on disk as in memory
        layer = family.parts(family.Config.preset(name), "0:1")["mid.00000"]
        for cache in layer.new_cache(1, 1, dtype=torch.bfloat16, device="meta"):
            assert cache.nbytes % 64 == 0, name
