"""Run a command in a memory cgroup of its own (version 1 or 2), below this process's one, and read what it used at most."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self")
HOW_TO_BE_ALLOWED = "run as root, or in a shell started by `systemd-run --user --scope -p Delegate=yes`"


class NotPermittedError(Exception):
    """No memory cgroup can be made here; the message says why."""


@dataclass(frozen=True)
class Finished:
    """What a command left behind: its output, and the peak of its group in bytes, page cache counted."""

    returncode: int
    stdout: str
    stderr: str
    peak: int | None = None  # None: it had no group
    killed: bool = False  # the kernel killed it for want of memory


def run(command: Sequence[str], *, limit: int | None, timeout: float) -> Finished:
    """Run `command` within `limit` bytes (None: no group). Raises NotPermittedError, and TimeoutError after `timeout` seconds."""
    if limit is None:
        return _run(command, timeout)
    with _group(limit) as group:
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.path / "cgroup.procs")]
        done = _run([*enter, *command], timeout)
        # read the peak last: nothing of the command may still be running
        return Finished(done.returncode, done.stdout, done.stderr, group.peak, group.killed)


def why_not() -> str | None:
    """None where groups can be made, else the reason."""
    try:
        with _group(1 << 30):
            return None
    except NotPermittedError as error:
        return str(error)


def _run(command: Sequence[str], timeout: float) -> Finished:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{' '.join(command)} took longer than {timeout:.0f} s") from None
    finally:
        if process.poll() is None:  # a time-out or Ctrl-C: end it and whatever it started
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Finished(process.returncode, stdout, stderr)


@dataclass(frozen=True)
class _Group:
    path: Path
    version: int

    @property
    def peak(self) -> int | None:
        with suppress(OSError):  # version 2 has it from Linux 5.19 on
            return int(self._read("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"))
        return None

    @property
    def killed(self) -> bool:
        with suppress(OSError):
            events = self._read("memory.oom_control" if self.version == 1 else "memory.events")
            return _table(events).get("oom_kill", 0) > 0
        return False

    def set_limit(self, limit: int) -> None:
        if self.version == 1:
            self._write("memory.limit_in_bytes", limit)
            with suppress(OSError):  # absent where swap is not accounted
                self._write("memory.memsw.limit_in_bytes", limit)
        else:
            self._write("memory.max", limit)
            with suppress(OSError):
                self._write("memory.swap.max", 0)

    def remove(self) -> None:
        if self.version == 1:
            with suppress(OSError):
                self._write("memory.force_empty", 0)
        for _ in range(50):  # the last process may take a moment to be gone
            with suppress(FileNotFoundError):
                try:
                    self.path.rmdir()
                except OSError:
                    time.sleep(0.1)
                    continue
            return

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def _write(self, name: str, value: int) -> None:
        (self.path / name).write_text(str(value))


@contextmanager
def _group(limit: int) -> Iterator[_Group]:
    parent, version = _parent()
    group = _Group(parent / f"bench-{os.getpid()}", version)
    try:
        group.path.mkdir()
    except OSError as error:
        raise NotPermittedError(f"cannot make {group.path} ({error.strerror}): {HOW_TO_BE_ALLOWED}") from error
    try:
        try:
            group.set_limit(limit)
        except OSError as error:
            raise NotPermittedError(f"cannot limit {group.path} ({error.strerror}): {HOW_TO_BE_ALLOWED}") from error
        yield group
    finally:
        group.remove()


def _parent() -> tuple[Path, int]:
    """The directory below which a group can be made, and the version of cgroups there."""
    own: dict[str, str] = {}  # controllers -> path; version 2 has the empty name
    for line in _lines(PROC / "cgroup"):
        _, controllers, path = line.split(":", 2)
        own.update({name: path for name in controllers.split(",")})
    for line in _lines(PROC / "mountinfo"):
        fields, _, system = line.partition(" - ")
        root, mount = fields.split()[3:5]
        kind, _, options = system.split(" ", 2)
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in own:
            return _below(mount, root, own["memory"]), 1
        if kind == "cgroup2" and "" in own and "memory" not in own:
            # a version 2 group that holds processes can have none of its own limits: take the nearest one above that gives them
            start = _below(mount, root, own[""])
            for path in (start, *start.parents):
                if "memory" in _words(path / "cgroup.subtree_control"):
                    return path, 2
                if path == Path(mount):
                    break
            raise NotPermittedError(f"no group above {start} hands out memory limits: {HOW_TO_BE_ALLOWED}")
    raise NotPermittedError("this kernel has no memory cgroups mounted")


def _below(mount: str, root: str, path: str) -> Path:
    """Where `path` is found when the mount shows the hierarchy from `root` on."""
    inside = path.removeprefix(root.rstrip("/")) if root != "/" else path
    return Path(mount + inside) if inside != "/" else Path(mount)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError as error:
        raise NotPermittedError(f"{path}: {error.strerror}") from error


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _table(text: str) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in text.splitlines())}
