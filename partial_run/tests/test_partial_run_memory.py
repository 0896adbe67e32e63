"""Sizes as people write them, and what the machine and its cgroups leave, read from a root of real files laid out as the kernel does."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
import torch

from llm_partial_run import _memory, available, format_bytes, parse_bytes
from llm_partial_run._memory import measured_runtime, peak_resident_set, resident_set

MIB = 1 << 20
OWN = 300 * MIB  # what the process itself has in use, below
LIBRARY = 500 * MIB  # the file that it maps


def test_sizes_are_read_as_people_write_them():
    assert parse_bytes("4GiB") == parse_bytes("4 gib") == 4 << 30
    assert parse_bytes("1.5GB") == 1_500_000_000
    assert parse_bytes(123) == parse_bytes("123") == 123
    assert format_bytes(3 << 30) == "3.00 GiB"
    for wrong in ("4 apples", "", "-1GiB", "GiB"):
        with pytest.raises(ValueError, match="is no size"):
            parse_bytes(wrong)
    with pytest.raises(ValueError, match="memory='9+GiB' is more than any machine has"):
        parse_bytes("9" * 400 + "GiB", "memory")


def test_memory_in_use_is_within_its_peak_and_what_is_available():
    assert 50 << 20 < resident_set() <= peak_resident_set() + (4 << 20)  # the kernel counts both with a delay
    assert resident_set() < available()
    assert measured_runtime(1 << 40, torch.float32) >= resident_set() - (8 << 20)


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """`kernel(lines of /proc/self/cgroup, {file below /sys/fs/cgroup: content})`."""

    def write(own: str, files: dict[str, object]) -> None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/statm").write_text(f"9999999 {OWN // mmap.PAGESIZE} 0 0 0 0 0")
        (tmp_path / "proc/cgroup").write_text(own + "\n")
        with (tmp_path / "library.so").open("wb") as library:
            library.truncate(LIBRARY)
        (tmp_path / "proc/maps").write_text(
            f"7f00-7f40 r-xp 00000000 fe:00 42   {tmp_path}/library.so\n7f40-7f60 r--p 00000000 fe:00 42   {tmp_path}/library.so\n"
            "7f60-7f80 rw-p 00000000 00:00 0 \n7f80-7fa0 rw-s 00000000 00:01 43   /dev/gone (deleted)\n7fa0-7fc0 rw-p 00000000 00:00 0   [heap]\n"
        )
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")
        monkeypatch.setattr(_memory, "_PROC", tmp_path / "proc")
        monkeypatch.setattr(_memory, "_CGROUPS", tmp_path / "cgroup")

    return write


def group(
    path: str,
    *,
    limit: object = "max",
    high: object = "max",
    usage: int,
    cache: tuple[int, int] = (0, 0),
    procs: str = "",
):
    """The files of a version 2 group; `cache`: its inactive and active pages of files."""
    stat = f"anon 1\nfile {sum(cache)}\ninactive_anon 7\nactive_anon 8\ninactive_file {cache[0]}\nactive_file {cache[1]}\nslab 9"
    files = {
        "memory.max": limit,
        "memory.high": high,
        "memory.current": usage,
        "memory.stat": stat,
        "cgroup.procs": procs,
    }
    return {str(Path(path) / name): content for name, content in files.items()}


NESTED = "0::/user.slice/user@0.service/run.scope"
USER, SERVICE, SCOPE = "user.slice", "user.slice/user@0.service", "user.slice/user@0.service/run.scope"


def test_a_group_leaves_what_its_limit_does_beside_what_others_use_and_the_page_cache_can_go(kernel):
    kernel(NESTED, group(USER, usage=5000 * MIB) | group(SERVICE, usage=4000 * MIB)
           | group(SCOPE, limit=2000 * MIB, usage=1500 * MIB, cache=(600 * MIB, 100 * MIB)))  # fmt: skip
    assert available() == OWN + 2000 * MIB - 800 * MIB


def test_the_tightest_of_nested_groups_counts(kernel):
    kernel(NESTED, group(USER, limit=1200 * MIB, usage=1000 * MIB) | group(SERVICE, limit=1000 * MIB, usage=700 * MIB)
           | group(SCOPE, limit=4000 * MIB, usage=OWN))  # fmt: skip
    assert available() == OWN + 200 * MIB


def test_a_process_stays_below_where_its_group_would_be_slowed_down(kernel):
    kernel(NESTED, group(SCOPE, limit=4000 * MIB, high=1000 * MIB, usage=OWN))
    assert available() == 1000 * MIB


def test_a_group_above_counts_where_the_own_one_does_not_count_memory(kernel):
    kernel(NESTED, group(SERVICE, limit=1000 * MIB, usage=500 * MIB) | {f"{SCOPE}/cgroup.procs": os.getpid()})
    assert available() == OWN + 500 * MIB
    assert measured_runtime(1 << 40, torch.float32) == OWN


@pytest.mark.parametrize("own", ["0::/", "0::/system.slice/docker-8f3a.scope"])
def test_in_a_container_the_root_is_its_group(kernel, own):
    kernel(own, group("", limit=1000 * MIB, usage=OWN))
    assert available() == 1000 * MIB


def test_the_root_of_the_machine_has_no_limit(kernel):
    kernel("0::/", {"cgroup.controllers": "cpu memory", "memory.stat": "anon 1"})
    assert available() > OWN
    assert measured_runtime(1 << 40, torch.float32) == OWN


def test_a_full_group_leaves_what_the_process_has(kernel):
    kernel(NESTED, group(SCOPE, limit=1000 * MIB, usage=1100 * MIB))
    assert available() == OWN


def test_version_1_counts_where_it_has_the_memory_and_version_2_other_things(kernel):
    stat = f"inactive_file 1\nactive_file 1\ntotal_inactive_file {100 * MIB}\ntotal_active_file {50 * MIB}"
    no_limit = (1 << 63) - mmap.PAGESIZE
    kernel("4:cpu,cpuacct:/job\n3:memory:/job\n0::/job", {
        "memory/memory.limit_in_bytes": no_limit, "memory/memory.usage_in_bytes": 9000 * MIB, "memory/memory.stat": stat,
        "memory/job/memory.limit_in_bytes": 2000 * MIB, "memory/job/memory.usage_in_bytes": 1000 * MIB,
        "memory/job/memory.stat": stat, "unified/job/cgroup.procs": "",
    })  # fmt: skip
    assert available() == OWN + 2000 * MIB - 850 * MIB


@pytest.mark.parametrize(
    ("limit", "procs", "counted"),
    [
        ("max", str(os.getpid()), True),
        (8000 * MIB, str(os.getpid()), True),
        (4000 * MIB, str(os.getpid()), False),  # the kernel takes the page cache back before the process is there
        ("max", f"1\n{os.getpid()}", False),  # it is not this process's alone
    ],
)
def test_page_cache_counts_as_runtime_where_nothing_would_take_it_back(kernel, limit, procs, counted):
    kernel(NESTED, group(SCOPE, limit=limit, usage=700 * MIB, cache=(400 * MIB, 0), procs=procs))
    assert measured_runtime(4000 * MIB, torch.float32) == (700 * MIB if counted else OWN)


def test_page_cache_of_files_that_were_only_read_does_not_count_as_runtime(kernel):
    kernel(NESTED, group(SCOPE, usage=9000 * MIB, cache=(8500 * MIB, 0), procs=str(os.getpid())))
    assert measured_runtime(4000 * MIB, torch.float32) == OWN + LIBRARY
