"""The engine on a real file: whatever the budget, the same bits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import nn

from llm_partial_run import PartialRun

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]


def test_every_budget_from_the_smallest_to_everything_gives_the_same_bits(toy):
    least = toy.smallest()
    with toy.run("1GiB") as run:
        assert run.plan.streamed == 0
        expected = [toy.last(run, PROMPTS), toy.last(run, [[*prompt, 7] for prompt in PROMPTS])]
    streamed = set()
    for memory in range(least, least + 600_000, 30_000):
        with toy.run(memory) as run:
            assert run.plan.used <= memory
            streamed.add(run.plan.streamed)
            assert torch.equal(toy.last(run, PROMPTS), expected[0])
            assert torch.equal(toy.last(run, [[*prompt, 7] for prompt in PROMPTS]), expected[1])
    assert len(streamed) > 8
    assert 0 in streamed


def test_logits_are_those_of_the_plain_modules(toy):
    with toy.run(toy.smallest()) as run:
        for prompt, logits in zip(PROMPTS, toy.last(run, PROMPTS), strict=True):
            torch.testing.assert_close(logits[0], toy.resident_logits(prompt)[-1], atol=2e-5, rtol=0)
        everything = run.forward(torch.tensor([PROMPTS[2]]))[0]
        torch.testing.assert_close(everything, toy.resident_logits(PROMPTS[2]), atol=2e-5, rtol=0)


def test_rows_that_grow_shrink_change_places_and_fan_out_equal_each_row_alone(toy):
    dice = random.Random(0)
    with toy.run(toy.smallest()) as run:
        pool = [[dice.randrange(96) for _ in range(dice.randrange(1, 12))] for _ in range(4)]
        for _ in range(40):
            prompts = []
            for prompt in dice.choices(pool, k=dice.randrange(1, 6)):  # more rows than the caches have, too
                kept = prompt[: dice.randrange(1, len(prompt) + 1)]
                prompts.append((kept + [dice.randrange(96) for _ in range(dice.randrange(4))])[:40])
            pool = (pool + prompts)[-6:]
            n = min(map(len, prompts)) if dice.random() < 0.3 else 1
            for prompt, logits in zip(prompts, toy.last(run, prompts, n), strict=True):
                torch.testing.assert_close(logits, toy.resident_logits(prompt)[-n:], atol=2e-5, rtol=0)


def test_a_known_prefix_is_not_computed_again(toy):
    with toy.run("1GiB") as run:
        toy.last(run, [list(range(20))])
        assert run.stats.tokens == 20
        toy.last(run, [list(range(21))])
        assert run.stats.tokens == 21
        toy.last(run, [[*range(10), 50], [*range(10), 51], [*range(10), 52]])  # one row goes on, two get copies
        assert run.stats.tokens == 24


def test_a_long_prefix_shared_by_new_rows_is_computed_once(toy):
    with toy.run("1GiB", context=400, tokens=400) as run:
        shared = [i % 96 for i in range(300)]
        logits = toy.last(run, [[*shared, 1], [*shared, 2], [*shared, 3]])
        assert run.stats.tokens == 303
        torch.testing.assert_close(logits[2, 0], toy.resident_logits([*shared, 3])[-1], atol=2e-5, rtol=0)


def test_prompts_longer_than_a_pass_go_in_several(toy):
    prompt = [i * 7 % 96 for i in range(40)]
    with toy.run(toy.smallest(tokens=5), tokens=5) as run:
        logits = toy.last(run, [prompt], 8)
        assert run.stats.passes == 8
    torch.testing.assert_close(logits[0], toy.resident_logits(prompt)[-8:], atol=2e-5, rtol=0)


def test_passes_whose_logits_nobody_wants_do_not_read_the_end(toy, monkeypatch):
    prompt, seen, read = [i * 7 % 96 for i in range(40)], [], toy.store.read
    again = [*prompt[:20], 1, 2, 3, 4, 5, 6, 7]
    budget: dict[str, Any] = dict(tokens=5, rows=1)
    with toy.run(toy.smallest(**budget) + 200_000, **budget) as run:
        monkeypatch.setattr(toy.store, "read", lambda part, *rest: seen.append(part) or read(part, *rest))
        logits = [toy.last(run, [prompt]), toy.last(run, [again])]
        assert (run.stats.passes, run.plan.spilled) == (8 + 2, 0)
        embedded = 4 * 32 * sum(len(set(ids)) for ids in (*torch.tensor(prompt).split(5), again[20:25], again[25:]))
        head = 4 * 32 * 96
        assert run.stats.bytes_read == 10 * run.plan.streamed - 8 * head + embedded
    assert seen.count("end") == 2
    for found, ids in zip(logits, (prompt, again), strict=True):
        torch.testing.assert_close(found[0, 0], toy.resident_logits(ids)[-1], atol=2e-5, rtol=0)


def test_a_pass_without_the_end_that_fails_leaves_the_next_one_whole(toy, monkeypatch):
    rows = toy.store.rows
    with toy.run(toy.smallest(tokens=5), tokens=5) as run:
        expected = toy.last(run, [[5]])
        monkeypatch.setattr(toy.store, "rows", lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            toy.last(run, [list(range(20))])  # begins without the end, and takes nothing
        monkeypatch.setattr(toy.store, "rows", rows)
        assert torch.equal(run(torch.tensor([[5]]), caches=run.new_caches()), expected)
        logits = toy.last(run, [list(range(20))])
    torch.testing.assert_close(logits[0, 0], toy.resident_logits(list(range(20)))[-1], atol=2e-5, rtol=0)


def test_micro_batches_share_one_read_of_each_layer(toy):
    rows = [[i * j % 96 for i in range(13)] for j in (3, 5, 7)]
    least = toy.smallest(micro_batch=5)
    results = []
    for memory in (least, least + 50_000, "1GiB"):
        with toy.run(memory, micro_batch=5) as run:
            results.append(toy.last(run, rows))
            assert run.stats.passes == 1
            assert memory == "1GiB" or run.plan.streamed > 0
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for row, logits in zip(rows, results[0], strict=True):
        torch.testing.assert_close(logits[0], toy.resident_logits(row)[-1], atol=2e-5, rtol=0)


def test_parts_run_in_two_runs_equal_the_whole(toy):
    parts = list(toy.parts().items())
    positions = torch.arange(7)[None]
    with toy.run("1GiB") as whole:
        expected = whole(torch.tensor([PROMPTS[0]]))
    first, second = dict(parts[:4]), dict(parts[4:])
    with (
        PartialRun(first, toy.store, memory="1GiB", **toy.BUDGET) as run,
        PartialRun(second, toy.store, memory="1GiB", **toy.BUDGET) as rest,
    ):
        hidden = run(torch.tensor([PROMPTS[0]]), positions, run.new_caches())
        assert torch.equal(rest(hidden, positions, rest.new_caches()), expected)


def test_parts_go_from_begin_to_end_in_whatever_order_they_are_given(toy):
    with toy.run("1GiB") as run:
        expected = toy.last(run, PROMPTS)
    for memory in (toy.smallest(), "1GiB"):
        with PartialRun(dict(reversed(toy.parts().items())), toy.store, memory=memory, **toy.BUDGET) as run:
            assert torch.equal(toy.last(run, PROMPTS), expected)


def test_layers_of_other_names_go_in_the_order_in_which_they_are_given(toy):
    names = [f"block.{i}" for i in range(20)]  # of which "block.10" sorts before "block.2"
    layers = dict(zip(names, [m for part, m in toy.parts().items() if part.startswith("mid")], strict=True))
    weights = {name: toy.weights[f"mid.{i:05d}"] for i, name in enumerate(names)}
    whole = toy.parts()
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with PartialRun(layers, weights.__getitem__, memory="1GiB", **toy.BUDGET) as run:
        found = run(x)
    with PartialRun(
        {p: m for p, m in whole.items() if p.startswith("mid")}, toy.store, memory="1GiB", **toy.BUDGET
    ) as run:
        assert torch.equal(found, run(x))


def test_logits_that_are_masked_leave_the_prefix_cache_as_it_is(toy):
    parts: Any = toy.parts()
    head = parts["end"].forward
    parts["end"].forward = lambda x: head(x).masked_fill(torch.arange(96) >= 90, -torch.inf)
    with PartialRun(parts, toy.store, memory="1GiB", **toy.BUDGET) as run:
        for length in range(3, 23):
            toy.last(run, [list(range(length))])
        assert run.stats.tokens == 22


def test_a_begin_that_names_no_matrix_to_gather_from_has_it_whole(toy):
    with toy.run("1GiB") as run:
        expected = toy.last(run, PROMPTS)

    class Begin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(96, 32, device="meta")

        def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self.embed(input_ids)

    with PartialRun(toy.parts() | {"begin": Begin()}, toy.store, memory=toy.smallest() + 50_000, **toy.BUDGET) as run:
        assert run.plan.streamed
        assert torch.equal(toy.last(run, PROMPTS), expected)


def test_device_tier_with_copies_ahead_gives_the_same_bits(toy):
    grown = [[*prompt, 7] for prompt in PROMPTS]
    with toy.run("1GiB") as run:
        expected = [toy.last(run, PROMPTS), toy.last(run, grown)]
    for device_memory in (900_000, 950_000):
        with toy.run(260_000, device_memory=device_memory) as run:
            assert run.plan.device > 0
            assert run.plan.host > 0
            assert run.plan.streamed > 0
            assert torch.equal(toy.last(run, PROMPTS), expected[0])
            assert torch.equal(toy.last(run, grown), expected[1])


def test_a_plain_load_callable_is_enough(toy):
    with toy.run("1GiB") as run:
        expected = toy.last(run, PROMPTS)
    with PartialRun(toy.parts(), toy.weights.__getitem__, memory="1GiB", **toy.BUDGET) as run:
        assert torch.equal(toy.last(run, PROMPTS), expected)
        least = run.plan.smallest
    with PartialRun(toy.parts(), toy.weights.__getitem__, memory=least, **toy.BUDGET) as run:
        assert torch.equal(toy.last(run, PROMPTS), expected)


def test_another_computing_dtype_streams_the_same_bits_as_it_keeps(toy):
    with toy.run("1GiB", dtype=torch.bfloat16) as run:
        expected = toy.last(run, PROMPTS)
        assert expected.dtype == torch.bfloat16
    with toy.run(toy.smallest(dtype=torch.bfloat16), dtype=torch.bfloat16) as run:
        assert run.plan.streamed
        assert torch.equal(toy.last(run, PROMPTS), expected)


def test_a_row_that_overflowed_is_cleared_before_its_cache_is_used_again(toy):
    toy.weights["begin"]["embed.weight"][13] = float("inf")
    with PartialRun(toy.parts(), toy.weights.__getitem__, memory="1GiB", **(toy.BUDGET | {"rows": 1})) as run:
        assert not toy.last(run, [[5, 6, 13]]).isfinite().all()
        logits = toy.last(run, [[5, 6]])
    torch.testing.assert_close(logits[0, 0], toy.resident_logits([5, 6])[-1], atol=2e-5, rtol=0)


def test_a_row_that_starts_beside_one_that_fills_its_context_is_no_prefill_from_nothing(toy):
    full = [i * 5 % 96 for i in range(40)]
    with toy.run(toy.smallest(tokens=120), tokens=120) as run:
        toy.last(run, [PROMPTS[0]])
        logits = toy.last(run, [[*PROMPTS[0], 8], full])
    torch.testing.assert_close(logits[0, 0], toy.resident_logits([*PROMPTS[0], 8])[-1], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits[1, 0], toy.resident_logits(full)[-1], atol=2e-5, rtol=0)


def test_a_layer_with_one_large_and_many_small_matrices_is_held_whole(toy, monkeypatch):
    from llm_partial_run import _units

    monkeypatch.setattr(_units, "SLICE", 1024)  # 12 slices for qkv and 4 for out
    with toy.run(toy.smallest(micro_batch=5), micro_batch=5) as run:
        for prompt, logits in zip(PROMPTS, toy.last(run, PROMPTS), strict=True):
            torch.testing.assert_close(logits[0], toy.resident_logits(prompt)[-1], atol=2e-5, rtol=0)


def test_what_is_given_to_a_run_stays_as_it_is(toy):
    layers = {part: module for part, module in toy.parts().items() if part.startswith("mid")}
    with PartialRun(layers, toy.store, memory="1GiB", **toy.BUDGET) as run:
        x = torch.randn(1, 5, 32)
        before = x.clone()
        first = run(x)
        assert torch.equal(x, before)
        assert torch.equal(run(x), first)


def test_a_draft_tree_sees_by_its_mask(toy):
    prompt, drafts = PROMPTS[0], [7, 8, 9]  # three continuations of one prompt, in one pass
    with toy.run(toy.smallest()) as run:
        caches = run.new_caches(1, 16)
        run(torch.tensor([prompt]), None, caches)
        mask = torch.zeros(1, 3, 10, dtype=torch.bool)
        mask[:, :, :7] = True
        mask[0, range(3), range(7, 10)] = True
        logits = run(torch.tensor([drafts]), torch.full((1, 3), 7), caches, slots=torch.arange(7, 10)[None], mask=mask)
    for draft, row in zip(drafts, logits[0], strict=True):
        torch.testing.assert_close(row, toy.resident_logits([*prompt, draft])[-1], atol=2e-5, rtol=0)


def test_a_device_converts_what_it_gets_from_pinned_memory(toy):
    changes: dict[str, Any] = dict(dtype=torch.float64)
    with toy.run("1GiB", **changes) as run:
        expected = toy.last(run, PROMPTS)
    with toy.run("2MiB", device_memory=1_900_000, **changes) as run:
        assert run.plan.host > 0
        assert run.plan.device > 0
        assert torch.equal(toy.last(run, PROMPTS), expected)
