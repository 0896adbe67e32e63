"""What this process uses, and what the machine and its cgroup would let it use."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_PROC = Path("/proc/self")
_CGROUPS = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
_LEAST, _LARGE = 1 << 17, 1 << 20  # bytes: between them lies the size from which a tensor has pages of its own


def parse_bytes(size: int | str, name: str = "size") -> int:
    """Bytes in `"4GiB"`, `"1.5 GB"`, `"800MiB"` or a plain number of bytes; an error calls what it is about by `name`.

    >>> parse_bytes("4GiB"), parse_bytes("1.5 GB"), parse_bytes(4096)
    (4294967296, 1500000000, 4096)
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]*)\s*", size.lower()) if isinstance(size, str) else None
    if not found or found[2] not in _UNITS:
        raise ValueError(f"{name}={size!r} is no size: write it like '4GiB', '800MiB' or a number of bytes")
    try:
        return int(float(found[1]) * _UNITS[found[2]])
    except OverflowError:
        raise ValueError(f"{name}={size!r} is more than any machine has: write it like '4GiB'") from None


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
    for group in _cgroups()[:1]:
        limit, usage = group.limit, group.usage
        alone = usage is not None and (group.directory / "cgroup.procs").read_text().split() == [str(os.getpid())]
        if usage is not None and alone and (limit is None or limit > memory):
            return max(resident_set(), min(usage, resident_set() + _mapped_files()))
    return resident_set()


def give_freed_memory_back(largest: int) -> None:
    """Fix the size from which glibc gives a tensor pages of its own, for the whole process. Elsewhere it does nothing.

    glibc raises it, up to 32 MiB, with each larger tensor that is freed. Keys and values below it that grow, or follow
    their beams, leave holes in the heap that are too small for the next: half as much memory as they need was seen.

    :param largest: bytes that a tensor of keys, or values, grows to. It is in the heap for an eighth of that at most.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        threshold = max(_LEAST, min(largest // 8, _LARGE))
        mallopt(_M_MMAP_THRESHOLD, threshold)
        mallopt(_M_TRIM_THRESHOLD, threshold)


def _mapped_files() -> int:
    """Bytes of the files that this process maps, its libraries: as much page cache as they may have, but for what was read."""
    paths = {line.split(maxsplit=5)[5] for line in (_PROC / "maps").read_text().splitlines() if " /" in line}
    return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))


def available() -> int:
    """Bytes that this process may use in all: what it has, and what the machine and its cgroups have free."""
    own = resident_set()
    try:
        free = int(re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    except (FileNotFoundError, IndexError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    limits = [own + free]
    for group in _cgroups():
        if group.limit is not None and group.usage is not None:
            evictable = _page_cache(group.directory / "memory.stat")
            limits.append(own + max(0, group.limit - max(own, group.usage - evictable)))
    return min(limits)


@dataclass(frozen=True)
class _Cgroup:
    directory: Path
    limits: tuple[str, ...]  # its files; in version 2 a process above memory.high is slowed down until it is below
    used: str

    @property
    def limit(self) -> int | None:
        """Bytes; None where there is no limit, as in the root of all groups."""
        return min((n for name in self.limits if (n := _number(self.directory / name)) is not None), default=None)

    @property
    def usage(self) -> int | None:
        """Bytes, page cache counted; None where this group does not count memory, but one above may."""
        return _number(self.directory / self.used)


def _cgroups() -> list[_Cgroup]:
    """This process's memory cgroup, version 1 or 2, and those above it: each limits what is below it."""
    try:
        lines = (_PROC / "cgroup").read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in sorted(
        lines, key=lambda line: ":memory:" not in line
    ):  # beside version 1, version 2 may do other things
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, limits, used = _CGROUPS / "memory", ("memory.limit_in_bytes",), "memory.usage_in_bytes"
        elif not controllers:
            root, limits, used = _CGROUPS, ("memory.max", "memory.high"), "memory.current"
        else:
            continue
        own = root / path.lstrip("/")
        if not own.is_dir():  # inside a container the host's path is not there, and the root is the container's group
            own = root
        groups = [_Cgroup(at, limits, used) for at in (own, *own.parents) if at.is_relative_to(root)]
        if any((group.directory / used).exists() for group in groups):
            return groups
    return []


def _page_cache(stat: Path) -> int:
    found = (
        re.findall(r"^(?:total_)?(?:in)?active_file (\d+)$", stat.read_text(), re.MULTILINE) if stat.exists() else []
    )
    return sum(map(int, found[-2:]))


def _number(path: Path) -> int | None:
    """The number in a cgroup file; None where there is none, and for "max" in either version's spelling."""
    text = path.read_text().strip() if path.exists() else "max"
    return None if text == "max" or int(text) >= 1 << 60 else int(text)
