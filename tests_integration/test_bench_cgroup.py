"""The benchmark's groups of version 2, in a directory laid out as the kernel does: no machine here has to have them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import cgroup

SCOPE = "user.slice/user@0.service/app.slice/run.scope"


@pytest.fixture
def hierarchy(tmp_path, monkeypatch):
    """`hierarchy(own, {group: cgroup.subtree_control}, root)`: the mount, of which processes see what is below `root`."""

    def write(own: str, given: dict[str, str], root: str = "/") -> Path:
        mount, proc = tmp_path / "cgroup", tmp_path / "proc"
        for path, controllers in given.items():
            (mount / path).mkdir(parents=True, exist_ok=True)
            (mount / path / "cgroup.subtree_control").write_text(controllers + "\n")
        proc.mkdir()
        (proc / "cgroup").write_text(f"0::{own}\n")
        (proc / "mountinfo").write_text(
            "22 29 0:20 / /proc rw,nosuid shared:12 - proc proc rw\n"
            f"31 25 0:26 {root} {mount} rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
        )
        monkeypatch.setattr(cgroup, "PROC", proc)
        return mount

    return write


def test_a_group_is_made_below_the_nearest_one_that_hands_out_memory_limits(hierarchy):
    given = {"": "cpu memory", "user.slice": "cpu memory", "user.slice/user@0.service": "memory pids",
             "user.slice/user@0.service/app.slice": "cpu pids", SCOPE: ""}  # fmt: skip
    mount = hierarchy(f"/{SCOPE}", given)
    with cgroup._group(1 << 30) as group:
        assert group.path == mount / f"user.slice/user@0.service/bench-{os.getpid()}"
        assert (group.path / "memory.max").read_text() == str(1 << 30)
        assert (group.path / "memory.swap.max").read_text() == "0"
        assert (group.peak, group.killed) == (None, False)  # a kernel that does not tell its peak
        (group.path / "memory.peak").write_text("123456789\n")
        (group.path / "memory.events").write_text("low 0\nhigh 0\nmax 71\noom 1\noom_kill 1\noom_group_kill 0\n")
        assert (group.peak, group.killed) == (123456789, True)
        (group.path / "memory.events").write_text("low 0\nhigh 0\nmax 71\noom 0\noom_kill 0\noom_group_kill 0\n")
        assert not group.killed
        for file in group.path.iterdir():  # a real group's files go with it
            file.unlink()
    assert not group.path.exists()


def test_where_the_mount_shows_a_part_of_the_hierarchy_paths_begin_there(hierarchy):
    mount = hierarchy("/docker/8f3a/job", {"": "memory", "job": ""}, root="/docker/8f3a")
    assert cgroup._parent() == (mount, 2)


def test_a_process_in_the_root_finds_it(hierarchy):
    mount = hierarchy("/", {"": "cpu memory"})
    assert cgroup._parent() == (mount, 2)


def test_where_no_group_hands_out_memory_limits_it_is_said_how_to_get_one(hierarchy):
    hierarchy(f"/{SCOPE}", {"": "cpu", SCOPE: ""})
    with pytest.raises(
        cgroup.NotPermittedError, match=r"no group above .*run.scope hands out memory limits: .*systemd-run"
    ):
        cgroup._parent()
    assert "systemd-run" in (cgroup.why_not() or "")
