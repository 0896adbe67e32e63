"""What a run is given and cannot take is named, before anything is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_partial_run import BudgetError, PartialRun

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6]]


def test_less_than_the_smallest_budget_is_refused_before_anything_is_read(toy):
    least = toy.smallest()
    toy.store.reads = 0
    with pytest.raises(BudgetError, match=f"smallest that works is {least} bytes"):
        toy.run(least - 1)
    assert toy.store.reads == 0


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([[1, 96]], [2], "the id 96; the vocabulary has 0 to 95"),
        ([[-1, 5]], [2], "the id -1"),
        ([[1, 2]], [0], r"lengths=\[0\]"),
        ([[1, 2]], [3], r"lengths=\[3\]"),
        ([[1, 2]], [2, 2], r"give a whole number for each row"),
        ([[1, 2]], [1.5], r"give a whole number for each row"),
        ([1, 2], [1], r"input_ids have to be integers \[rows, tokens\]"),
        ([[1] * 41], [41], "at most context=40"),
        ([[]], [0], "at least one"),
    ],
)
def test_wrong_ids_are_named(toy, ids, lengths, message):
    with toy.run("1GiB") as run, pytest.raises(ValueError, match=message):
        run.forward.last_logits(torch.tensor(ids, dtype=torch.long), torch.tensor(lengths), 1)


@pytest.mark.parametrize("n", [0, -1, 1.0])
def test_a_number_of_positions_that_is_none_is_named(toy, n):
    with toy.run("1GiB") as run, pytest.raises(ValueError, match=f"n={n!r} has to be a whole number"):
        run.forward.last_logits(torch.tensor([[1, 2]]), torch.tensor([2]), n)


def test_a_pass_larger_than_planned_is_refused(toy):
    with toy.run("1GiB") as run, pytest.raises(ValueError, match="more than the 48 that a pass is planned for"):
        run(torch.zeros(7, 7, dtype=torch.long))


def test_weights_that_do_not_fit_the_modules_are_named(toy):
    weights = {part: dict(tensors) for part, tensors in toy.weights.items()}
    weights["mid.00003"]["out.weight"] = torch.zeros(5, 5)
    with pytest.raises(
        ValueError, match=r"mid.00003: out.weight is \[5, 5\] in the weights and \[32, 32\] in the model"
    ):
        PartialRun(toy.parts(), weights.__getitem__, memory="1GiB", **toy.BUDGET)
    del weights["mid.00003"]["out.weight"]
    with pytest.raises(ValueError, match=r"mid.00003: the weights have no 'out.weight'"):
        PartialRun(toy.parts(), weights.__getitem__, memory="1GiB", **toy.BUDGET)
    weights["mid.00003"]["out.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"mid.00003: out.weight is stored as torch.int8"):
        PartialRun(toy.parts(), weights.__getitem__, memory="1GiB", **toy.BUDGET)


def test_weights_from_elsewhere_are_named_by_their_directory_with_the_remedy(toy, monkeypatch):
    def tensors(part):
        raise ValueError(f"there is no part {part!r} (file /model)")

    toy.store.path = "/model"
    toy.store._at["mid.00003", "out.weight"] = toy.store._at["mid.00003", "qkv.weight"]
    with pytest.raises(ValueError, match=r"in the weights in /model and \[32, 32\] .* from the same checkpoint"):
        toy.run("1GiB")
    del toy.store._at["mid.00003", "out.weight"]
    with pytest.raises(ValueError, match=r"the weights in /model have no 'out.weight'.* from the same checkpoint"):
        toy.run("1GiB")
    monkeypatch.setattr(toy.store, "tensors", tensors)
    with pytest.raises(ValueError, match=r"no part 'begin' \(file /model\)\. Take .* or only parts that are there"):
        toy.run("1GiB")


@pytest.mark.parametrize(("part", "name"), [("begin", "embed.weight"), ("mid.00003", "out.weight")])
def test_weights_in_eight_bits_are_refused_as_quantized(toy, part, name):
    toy.weights[part][name] = toy.weights[part][name].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"{part}: {name} is stored as torch.float8_e4m3fn.*quantized weights cannot"):
        PartialRun(toy.parts(), toy.weights.__getitem__, memory="1GiB", **toy.BUDGET)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_nothing_can_be_computed_in_is_refused(toy, dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype!r} is none to compute in: give one of torch.bfloat16"):
        toy.run("1GiB", dtype=dtype)
    assert toy.store.reads == 0


def test_a_module_that_calls_its_linears_in_another_order_is_refused_not_computed_wrongly(toy):
    parts = toy.parts()
    layer = parts["mid.00002"]
    layer.forward = lambda x, *_, **__: layer.qkv(layer.out(x))[..., :32]
    with (
        PartialRun(parts, toy.store, memory=toy.smallest(), **toy.BUDGET) as run,
        pytest.raises(RuntimeError, match="order"),
    ):
        toy.last(run, PROMPTS)


def test_more_logits_than_the_plan_has_memory_for_are_refused(toy):
    long = torch.zeros(9, 2000, dtype=torch.long)
    with (
        toy.run("5MiB", context=2000, tokens=10) as run,
        pytest.raises(ValueError, match="ask for fewer at a time"),
    ):
        run.forward(long)


def test_more_logits_than_there_is_memory_for_are_refused_before_the_pass(toy):
    with toy.run(toy.smallest(tokens=120, context=400), tokens=120, context=400) as run:
        caches = run.new_caches(3, 400)
        with pytest.raises(ValueError, match="logits of 1200 positions take"):
            run.forward(torch.ones(3, 400, dtype=torch.long))
        assert run(torch.ones(3, 1, dtype=torch.long), caches=caches).shape == (3, 1, 96)


def test_more_rows_than_there_is_memory_for_their_logits_are_refused(toy):
    with toy.run(toy.smallest()) as run:
        with pytest.raises(ValueError, match="logits of 5000 positions take"):
            run.forward.last_logits(torch.ones(5000, 2, dtype=torch.long), torch.full((5000,), 2), 1)
        assert toy.last(run, [[1, i] for i in range(7)]).shape == (7, 1, 96)


def test_a_long_row_without_a_cache_is_refused(toy):
    with toy.run("1GiB", micro_batch=5) as run, pytest.raises(ValueError, match="give caches"):
        run(torch.zeros(1, 6, dtype=torch.long))


@pytest.mark.parametrize(
    ("x", "given", "message"),
    [
        (
            [[1, 2]],
            dict(positions=[[15, 16]]),
            r"mid.00000: caches of 2 rows and 16 slots are too few.*slot 16.*new_caches",
        ),
        ([[1, 2]], dict(positions=[[0, 1]], slots=[[0, 99]]), "slot 99"),
        ([[1, 2]], dict(positions=[[0, -1]]), "a position or slot is -1"),
        ([[1]] * 3, dict(positions=[[0]] * 3), "too few for 3 rows"),
        ([[1]], dict(positions=[[3]], mask=[[[True] * 17]]), "slot 16"),
        ([[1, 2]], dict(positions=[[0]]), r"positions= has the shape \[1, 1\], and has to have \[1, 2\]"),
        ([[1, 2]], dict(positions=[0, 1]), r"positions= has the shape \[2\]"),
        ([[1, 2]], dict(slots=[[0, 1, 2]]), r"slots= has the shape \[1, 3\]"),
        (
            [[1, 2]],
            dict(mask=[[True, True]]),
            r"mask= has the shape \[1, 2\], and has to have \[1, 2, 'slots in use'\]",
        ),
        ([[1, 2]], dict(positions=[[0.0, 1.0]]), "positions= has to be integers, and is torch.float32"),
        ([[1, 2]], dict(slots=[[True, False]]), "slots= has to be integers, and is torch.bool"),
        ([[1]], dict(mask=[[[0.0, -1.0]]]), "mask= has to be True where a position is seen, and is torch.float32"),
        ([1, 2], {}, r"input_ids have to be integers \[rows, tokens\]"),
    ],
)
def test_what_the_caches_have_no_place_for_is_refused_before_anything_is_read(toy, x, given, message):
    with toy.run("1GiB") as run:
        caches, before = run.new_caches(2, 16), toy.store.reads
        tensors: dict[str, Any] = {name: torch.tensor(value) for name, value in given.items()}
        with pytest.raises(ValueError, match=message):
            run(torch.tensor(x), caches=caches, **tensors)
        assert (run.stats.passes, toy.store.reads) == (0, before)


def test_caches_of_another_model_are_refused(toy, tmp_path):
    with toy.run(toy.smallest(), spill=tmp_path) as run:
        caches: dict[str, Any] = dict(run.new_caches(3, 41))
        for wrong in ((), caches["mid.00003"][:1], tuple(t.double() for t in caches["mid.00003"])):
            with pytest.raises(
                ValueError, match=r"mid.00003: its caches are \[.*have to be \['\[rows, slots, 32\] float32'"
            ):
                run(torch.tensor([[1]]), caches=caches | {"mid.00003": wrong})
        with pytest.raises(ValueError, match="too few for 4 rows and slot 0"):
            run(torch.zeros(4, 1, dtype=torch.long), caches=run.new_caches())


def test_hidden_states_are_what_parts_without_a_begin_take(toy):
    layers = {part: module for part, module in toy.parts().items() if part.startswith("mid")}
    with PartialRun(layers, toy.store, memory="1GiB", **toy.BUDGET) as run:
        for wrong in (torch.tensor([[1, 2]]), torch.zeros(2, 32), torch.zeros(1, 0, 32)):
            with pytest.raises(ValueError, match="x has to be hidden states"):
                run(wrong)
