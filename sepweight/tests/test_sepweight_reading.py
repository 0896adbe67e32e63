from __future__ import annotations

import errno
import itertools
import linecache
import os
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llm_sepweight
from llm_sepweight import WeightError, _reading


def at_end(key, config):
    return [("end", key)]


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """One tensor of 40 MB: three reads of 16 MiB."""
    table = torch.arange(10_000_000, dtype=torch.int32).reshape(1000, -1)
    save_file({"table": table}, tmp_path / "model.safetensors")
    return tmp_path, table


def failing(monkeypatch: pytest.MonkeyPatch, beyond: int, number: int) -> list[int]:
    """Make the disk fail from byte `beyond` on; gives the offsets of all reads tried."""
    tried = []
    real = os.preadv

    def preadv(descriptor, buffers, offset):
        tried.append(offset)
        if offset + len(buffers[0]) > beyond:
            raise OSError(number, os.strerror(number))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return tried


@pytest.mark.parametrize("form", ["flag refused", "read refused", "no flag"])
def test_without_direct_reads_all_is_the_same_and_said_once(large, monkeypatch, form):
    path, table = large
    if form == "no flag":
        monkeypatch.setattr(_reading, "O_DIRECT", 0)
    elif form == "flag refused":
        real_open = os.open

        def refusing(file, flags, *rest, **more):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real_open(file, flags, *rest, **more)

        monkeypatch.setattr(os, "open", refusing)
    else:
        real_preadv, calls = os.preadv, []

        def first_fails(descriptor, buffers, offset):
            calls.append(offset)
            if len(calls) == 1:
                raise OSError(errno.EINVAL, "Invalid argument")
            return real_preadv(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", first_fails)
    with llm_sepweight.open(path, at_end) as weights, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(weights.load("end")["table"], table)
        assert torch.equal(weights.rows("end", "table", [999, 3]), table[[999, 3]])
    assert [str(warning.message) for warning in said] == [
        f"{path / 'model.safetensors'}: no direct reads on this file system; reading through the page cache"
    ]


def test_buffered_reads_leave_nothing_in_the_page_cache(large, monkeypatch):
    path, _ = large
    monkeypatch.setattr(_reading, "O_DIRECT", 0)
    dropped = []
    real = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: dropped.append(args[1:]) or real(*args))
    with llm_sepweight.open(path, at_end) as weights, pytest.warns(UserWarning, match="no direct reads"):
        weights.load("end")
    assert sorted(start for start, _, _ in dropped) == [0, 16 << 20, 32 << 20]
    assert sum(length for _, length, _ in dropped) == (path / "model.safetensors").stat().st_size
    assert {advice for _, _, advice in dropped} == {os.POSIX_FADV_DONTNEED}


def test_a_disk_error_in_the_middle_names_file_part_tensor_and_place(large, monkeypatch):
    path, _ = large
    with llm_sepweight.open(path, at_end) as weights:
        failing(monkeypatch, 20 << 20, errno.EIO)
        with pytest.raises(WeightError) as caught:
            weights.load("end")
    message = str(caught.value)
    for word in ("at byte 16777216", "model.safetensors", "part end", "tensor table", "Check the disk"):
        assert word in message
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_comes_only_when_no_read_touches_the_callers_memory_any_more(large, monkeypatch):
    path, _ = large
    under_way, ended = threading.Event(), threading.Event()
    real = os.preadv

    def preadv(descriptor, buffers, offset):
        if len(buffers[0]) <= 4096:  # the one that finds out whether direct reads work
            return real(descriptor, buffers, offset)
        if offset:
            under_way.set()
            threading.Event().wait(0.2)
            ended.set()
            return real(descriptor, buffers, offset)
        assert under_way.wait(5)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    with llm_sepweight.open(path, at_end) as weights:
        with pytest.raises(WeightError, match="Input/output error"):
            weights.load("end")
        assert ended.is_set()


def test_a_file_cut_short_while_open_is_an_error_not_old_memory(large):
    path, table = large
    file = path / "model.safetensors"
    with llm_sepweight.open(path, at_end) as weights:
        assert torch.equal(weights.load("end")["table"], table)
        os.truncate(file, 20_000_000)
        with pytest.raises(WeightError, match=r"ends too early, at byte 19\d+ \(file .*part end, tensor table"):
            weights.load("end")
        with pytest.raises(WeightError, match="ends too early"):
            weights.rows("end", "table", [999])
        with pytest.raises(WeightError, match="ends too early.*part end, tensor table"):
            weights.read("end", "table", 600, 700, torch.zeros(8_000_000, dtype=torch.uint8))


def test_a_file_changed_between_opening_and_reading_is_noticed(large):
    path, _ = large
    with llm_sepweight.open(path, at_end) as weights:
        os.truncate(path / "model.safetensors", 20_000_000)
        with pytest.raises(WeightError, match="the file was changed: 40.* bytes .*model.safetensors, part end"):
            weights.load("end")


def test_a_file_that_vanished_is_named(large):
    path, _ = large
    with llm_sepweight.open(path, at_end) as weights:
        (path / "model.safetensors").unlink()
        with pytest.raises(WeightError, match="cannot be opened: No such file.*model.safetensors, part end"):
            weights.load("end")


def test_closing_waits_for_reads_under_way(large, monkeypatch):
    path, table = large
    begun, go = threading.Event(), threading.Event()
    real = os.preadv

    def slow(descriptor, buffers, offset):
        if offset:
            begun.set()
            go.wait(5)
        return real(descriptor, buffers, offset)

    weights = llm_sepweight.open(path, at_end)
    found = {}
    into = torch.zeros(2_000_000, dtype=torch.uint8)
    monkeypatch.setattr(os, "preadv", slow)
    reader = threading.Thread(target=lambda: found.update(rows=weights.read("end", "table", 900, 910, into)))
    reader.start()
    assert begun.wait(5)
    closer = threading.Thread(target=weights.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    go.set()
    reader.join(5)
    closer.join(5)
    assert not closer.is_alive()
    assert torch.equal(found["rows"], table[900:910])


def test_an_interrupt_at_any_step_of_a_read_hangs_neither_the_next_one_nor_closing(large):
    path, files = large[0] / "model.safetensors", {_reading.__file__, threading.__file__}
    memory, done = _reading.pages(4096), []

    def interrupted(at):
        steps = itertools.count()

        def step(frame, event, _):
            here = frame.f_code.co_filename in files and event in ("line", "return")
            leaving = (
                linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with ")
            )  # in one step
            if here and not leaving and next(steps) == at:
                raise KeyboardInterrupt
            return step

        file = _reading.WeightFile(str(path), path.stat().st_size, warnings.warn)
        sys.settrace(step)
        try:
            file.read(memory, 0, 4096)
            return False
        except KeyboardInterrupt:
            sys.settrace(None)
            file.read(memory, 0, 4096)
            return True
        finally:
            sys.settrace(None)
            file.close()

    def read_again_and_again():
        done.append(next(at for at in itertools.count() if not interrupted(at)))

    thread = threading.Thread(target=read_again_and_again, daemon=True)  # given up where it hangs
    thread.start()
    thread.join(timeout=20)
    assert done
    assert done[0] > 20
