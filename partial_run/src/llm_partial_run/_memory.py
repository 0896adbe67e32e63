"""What this process uses, and what the machine and its cgroup would let it use."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_PROC = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")


def parse_bytes(size: int | str) -> int:
    """Bytes in `"4GiB"`, `"1.5 GB"`, `"800MiB"` or a plain number of bytes.

    >>> parse_bytes("4GiB"), parse_bytes("1.5 GB"), parse_bytes(4096)
    (4294967296, 1500000000, 4096)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", str(size).lower())
    if not found or found[2] not in _UNITS:
        raise ValueError(f"{size!r} is no size: write it like '4GiB', '800MiB' or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def format_bytes(size: float) -> str:
    """`size` in the unit that people read: `"3.71 GiB"`, `"80.0 MiB"`, `"512 B"`."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if abs(size) >= 1 << power:
            return f"{size / (1 << power):.2f} {unit}" if unit == "GiB" else f"{size / (1 << power):.1f} {unit}"
    return f"{size:.0f} B"


def resident_set() -> int:
    """Bytes of memory that this process has in use now (its peak where the system has no /proc)."""
    try:
        return int((_PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return peak_resident_set()


def peak_resident_set() -> int:
    """The most bytes that this process has had in use at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measured_runtime(memory: int, dtype: torch.dtype) -> int:
    """Bytes that Python, torch and its kernels take before any weight is loaded.

    The kernels are run once first, so that their code and threads are counted. In a cgroup of its own that would
    let the process grow past `memory`, the page cache charged to it counts too; below a limit the system evicts it.
    """
    x = torch.ones(2, 64, dtype=dtype)
    q = x.view(1, 2, 2, 32).transpose(1, 2)
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
    for rows in (x[:1], x):
        torch.softmax(F.silu(F.linear(rows, torch.ones(64, 64, dtype=dtype))).float(), dim=-1).cumsum(-1)
    group = _own_cgroup()
    if group is None:
        return resident_set()
    directory, limit_file, usage_file = group
    alone = (directory / "cgroup.procs").read_text().split() == [str(os.getpid())]
    limit = _number(directory / limit_file)
    counted = alone and (limit is None or limit > memory)
    return max(resident_set(), (_number(directory / usage_file) or 0) if counted else 0)


def available() -> int:
    """Bytes that this process may use in all: what it has, and what the machine and its cgroups have free."""
    own = resident_set()
    try:
        free = int(re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    except (FileNotFoundError, IndexError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limits = [own + free]
    group = _own_cgroup()
    if group is not None:
        directory, limit_file, usage_file = group
        while directory.is_relative_to(_CGROUPS) and directory != _CGROUPS:
            limit, used = _number(directory / limit_file), _number(directory / usage_file)
            if limit is not None and used is not None:
                evictable = _page_cache(directory / "memory.stat")
                limits.append(own + max(0, limit - max(own, used - evictable)))
            directory = directory.parent
    return min(limits)


def _own_cgroup() -> tuple[Path, str, str] | None:
    """The directory of this process's memory cgroup and its files for limit and usage, version 1 or 2."""
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
    except FileNotFoundError:
        return None
    for line in sorted(lines, key=lambda line: ":memory:" not in line):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        elif not controllers:
            root, names = _CGROUPS, ("memory.max", "memory.current")
        else:
            continue
        for directory in (root / path.lstrip("/"), root):  # inside a container the host's path is not there
            if (directory / names[1]).exists():
                return directory, *names
    return None


def _page_cache(stat: Path) -> int:
    found = (
        re.findall(r"^(?:total_)?(?:in)?active_file (\d+)$", stat.read_text(), re.MULTILINE) if stat.exists() else []
    )
    return sum(map(int, found[-2:]))


def _number(path: Path) -> int | None:
    """The number in a cgroup file; None where there is none, and for "max" in either version's spelling."""
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" or int(text) >= 1 << 60 else int(text)
