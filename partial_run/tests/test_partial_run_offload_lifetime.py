"""Passes that fail, are interrupted or meet other threads; and a module that is given back as it was."""

from __future__ import annotations

import copy
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest
import torch
from torch import nn

from foreign import HIDDEN, IDS, on_meta
from llm_partial_run import _block_weights, _products


@pytest.mark.parametrize("work", [nn.Module.state_dict, copy.deepcopy, nn.Module.half], ids=["save", "copy", "convert"])
def test_what_takes_all_weights_of_an_offloaded_module_is_told_to_close_it_first(case, work):
    module = on_meta()
    with (
        case.offload(case.smallest(), module),
        pytest.raises(RuntimeError, match=r"is offloaded, and .* close the offload first"),
    ):
        work(module)
    work(module)


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_closing_gives_the_module_its_own_state_back_and_leaves_no_thread_or_file(case, error):
    module = on_meta()
    own = module.head.forward = module.head.forward  # as others do who wrap a module
    before = {name: id(p) for name, p in module.state_dict(keep_vars=True).items()}
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))

    def work():
        with case.offload(case.smallest(), module) as run:
            module(IDS)
            assert threading.active_count() > threads
            assert module.embed.scale.item() == pytest.approx(HIDDEN**0.5)
            if error is not None:
                handle = module.blocks[5].norm.register_forward_hook(fail)
                try:
                    module(IDS)
                finally:
                    handle.remove()
            run.close()

    def fail(*_):
        raise error("in the middle of a pass")

    if error is None:
        work()
    else:
        with pytest.raises(error, match="in the middle"):
            work()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    assert {name: id(p) for name, p in module.state_dict(keep_vars=True).items()} == before
    assert module.embed.scale.is_meta
    assert vars(module.head).pop("forward") is own
    for child in module.modules():
        assert "forward" not in vars(child)
        assert not child._forward_hooks
        assert not child._forward_pre_hooks
    with case.offload(module=module):  # and it serves again
        torch.testing.assert_close(module(IDS), case.resident(IDS), atol=2e-5, rtol=0)


def test_a_second_thread_is_refused_at_once_while_a_pass_runs(case):
    inside, told = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert told.wait(20)

    with case.offload(case.smallest()) as run, ThreadPoolExecutor() as pool:
        expected = run.module(IDS)
        handle = run.module.blocks[5].norm.register_forward_hook(wait)
        first = pool.submit(run.module, IDS)
        assert inside.wait(20)
        for module, x in ((run.module, IDS), (run.module.blocks[0], expected)):
            with pytest.raises(RuntimeError, match=r"a pass of this Model is running in thread 'ThreadPool.*one call"):
                module(x)
        told.set()
        assert torch.equal(first.result(20), expected)
        handle.remove()
        assert torch.equal(run.module(IDS), expected)
        assert torch.equal(pool.submit(run.module, IDS).result(20), expected)
        assert run.stats.passes == 4


@pytest.mark.filterwarnings("ignore:.*not its turn")
def test_what_lies_beside_the_blocks_serves_other_threads_too(case):
    x = torch.randn(1, 3, HIDDEN)
    with case.offload(case.smallest()) as run, ThreadPoolExecutor(8) as pool:
        expected, after = run.module(IDS), run.module.after(x)
        passes = pool.submit(lambda: [run.module(IDS) for _ in range(30)])
        results = list(pool.map(run.module.after, [x] * 300))
        assert all(torch.equal(result, after) for result in results)
        assert all(torch.equal(result, expected) for result in passes.result(20))


@pytest.mark.parametrize("memory", ["smallest", "1GiB"])
def test_closing_waits_for_a_pass_in_another_thread_which_ends_with_an_error(case, memory):
    inside, told = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert told.wait(20)

    run = case.offload(case.smallest() if memory == "smallest" else memory)
    with ThreadPoolExecutor() as pool:
        handle = run.module.blocks[5].norm.register_forward_hook(wait)
        first = pool.submit(run.module, IDS)
        assert inside.wait(20)
        closing = pool.submit(run.close)
        with pytest.raises(FutureTimeoutError):
            closing.result(0.2)
        told.set()
        with pytest.raises(
            RuntimeError, match=r"this Model is offloaded no more: it was closed|the run was closed while"
        ):
            first.result(20)
        closing.result(20)
        handle.remove()
    assert all(type(parameter) is nn.Parameter for parameter in run.module.parameters())
    run.close()


def test_closing_within_a_pass_is_refused_and_harms_nothing(case):
    run = case.offload(case.smallest())
    expected = run.module(IDS)
    handle = run.module.blocks[5].norm.register_forward_hook(lambda *_: run.close())
    with pytest.raises(
        RuntimeError, match="a pass of this Model is running in this very thread: close it after the pass"
    ):
        run.module(IDS)
    handle.remove()
    assert torch.equal(run.module(IDS), expected)
    run.close()
    assert all(type(parameter) is nn.Parameter for parameter in run.module.parameters())


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_interrupted_pass_hinders_no_other_thread(case, by_hand):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with case.offload(case.smallest()) as run, ThreadPoolExecutor() as pool:
        expected = run.module(IDS)
        handle = run.module.blocks[0].up.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.module.blocks[0](torch.ones(1, 2, HIDDEN)) if by_hand else run.module(IDS)
        handle.remove()
        assert torch.equal(pool.submit(run.module, IDS).result(20), expected)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pass_that_a_thread_has_died_in_hinders_no_other(case):
    with case.offload(case.smallest()) as run:
        expected = run.module(IDS)
        handle = run.module.blocks[5].norm.register_forward_hook(leave)
        thread = threading.Thread(target=run.module, args=(IDS,))
        thread.start()
        thread.join(20)
        handle.remove()
        assert torch.equal(run.module(IDS), expected)


def leave(*_: object) -> None:
    raise SystemExit


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_pass_left_in_the_middle_is_started_over(case, error):
    with case.offload(case.smallest()) as run:
        expected = run.module(IDS)

        def fail(*_):
            raise error

        handle = run.module.blocks[7].up.register_forward_pre_hook(fail)
        with pytest.raises(error):
            run.module(IDS)
        handle.remove()
        assert torch.equal(run.module(IDS), expected)
        assert run.stats.passes == 2


def test_errors_in_the_last_slice_of_a_pass_take_no_slot_from_the_ring(case, monkeypatch):
    product, weights = _products.product, []
    monkeypatch.setattr(
        _block_weights, "product", lambda x, weight, bias: weights.append(weight) or product(x, weight, bias)
    )

    def fail_at_the_end(x, weight, bias):
        weights.append(weight)
        if len(weights) == count:
            raise OSError("the last one")
        return product(x, weight, bias)

    with case.offload(case.smallest()) as run:
        expected = run.module(IDS)
        count = len(weights)
        monkeypatch.setattr(_block_weights, "product", fail_at_the_end)
        for _ in range(run.plan.slots + 1):
            weights.clear()
            with pytest.raises(OSError, match="the last one"):
                run.module(IDS)
            assert run._weights._stream._released >= run._weights._stream._taken - 1
        monkeypatch.setattr(_block_weights, "product", product)
        assert torch.equal(run.module(IDS), expected)


def test_a_read_error_surfaces_as_itself_and_the_next_pass_is_right(case):
    with case.offload(case.smallest()) as run:
        expected = run.module(IDS)
        case.store.fail_after = case.store.reads + 4
        with pytest.raises(OSError, match="the disk is gone"):
            run.module(IDS)
        case.store.fail_after = None
        assert torch.equal(run.module(IDS), expected)


def test_a_read_error_while_loading_leaves_the_module_as_it_was(case):
    module, threads = on_meta(), threading.active_count()
    case.store.fail_after = 40
    with pytest.raises(OSError, match="the disk is gone"):
        case.offload(module=module)
    assert all(type(parameter) is nn.Parameter and parameter.is_meta for parameter in module.parameters())
    assert threading.active_count() == threads


def test_a_module_is_offloaded_once_at_a_time(case):
    module = on_meta()
    with case.offload(module=module), pytest.raises(ValueError, match="offloaded already"):
        case.offload(module=module)
