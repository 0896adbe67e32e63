"""Seconds per token of a Llama that is larger than memory: ours, its peers, and the limit that the disk sets. See README.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cgroup
import checkpoint
import peers
import rates
from checkpoint import Shape
from peers import Peer
from worker import Job

HERE = Path(__file__).parent
OURS = "llm_partial_run"
PROMPT_TOKENS = 8
COLUMNS = ("memory", "runner", "s/token", "limit", "of limit", "x ours", "peak GiB", "read GB")
COLUMNS += ("computing", "waiting", "else", "first pass", "load", "same tokens")


@dataclass
class Measured:
    """All that is known of one runner under one cap; several rounds of it are pooled."""

    runner: str
    memory: int | None  # the cap in bytes; None: none, all may be resident
    error: str | None = None
    capped: bool = False  # ran within a memory cgroup of that size
    peak: int | None = None  # bytes: of the cgroup, page cache counted, or else of the process's resident set
    seconds: list[float] = field(default_factory=list)
    disk_rates: list[float] = field(default_factory=list)  # measured right before and right after
    limit: float | None = None  # seconds per pass that the hardware allows
    of_limit: float | None = None
    slower_than_ours: float | None = None
    same_tokens: str | None = None  # passes until the first one that differs from ours, of all compared
    last: dict[str, Any] = field(default_factory=dict)  # what the worker said in the last round

    @property
    def seconds_per_token(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


class Bench:
    """One checkpoint on one machine."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.shape: Shape = checkpoint.shape_from(arguments)
        self.path = checkpoint.write(self.shape, arguments.dir)
        self.files = sorted(self.path.glob("*.safetensors"))
        self.refused = cgroup.why_not()
        if self.refused:
            print(f"cgroup      none, so nothing holds the runners to their memory: {self.refused}")
        self.memory_rate = _memory_rate(min(1 << 30, 8 * self.shape.nbytes))
        print(f"memory      reading {self.memory_rate / 1e9:.1f} GB/s", flush=True)
        self.disk_rates: list[rates.DiskRate] = []
        self.measured: dict[tuple[int | None, str], Measured] = {}
        self.peers = self._prepared_peers()

    def run(self) -> None:
        for cap in [self._cap(memory) for memory in self.arguments.memory]:
            for _ in range(self.arguments.rounds):
                before = self._disk_rate()
                for peer in (None, *self.peers):
                    name = OURS if peer is None else peer.name if cap else peer.resident
                    if name is None:
                        continue
                    measured = self.measured.setdefault((cap, name), Measured(name, cap))
                    if measured.error is None:
                        self._measure(measured, peer)
                        after = self._disk_rate()
                        measured.disk_rates += [before.rate, after.rate]
                        before = after
                        said = measured.error or f"{measured.seconds_per_token:.3f} s/token"
                        print(f"{_cap_text(cap):<12}{name}: {said}", flush=True)
            self._compare(cap)

    def _measure(self, measured: Measured, peer: Peer | None) -> None:
        shares = peer.shares if peer and measured.memory else (1.0,)
        for share in shares:
            job = self._job(measured.memory, peer, share)
            limit = None if self.refused else measured.memory
            python = self._python(peer)
            checkpoint.drop_page_cache([*self.files, *_files_below(job.copy), *_torch_libraries(python)])
            command = [python, str(HERE / (peer.worker if peer else "ours.py")), job.to_json()]
            try:
                done = cgroup.run(command, limit=limit, timeout=self.arguments.timeout)
            except TimeoutError:
                measured.error = f"took longer than {self.arguments.timeout:.0f} s"
                return
            if done.returncode == 0:
                break
            if not done.killed:
                measured.error = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                return
        else:
            measured.error = "killed: out of memory"
            return
        measured.last = result = json.loads(done.stdout.strip().splitlines()[-1])
        measured.seconds += result["seconds_per_token"]
        measured.capped = limit is not None
        measured.peak = max(measured.peak or 0, done.peak or result["resident_set"])

    def _compare(self, cap: int | None) -> None:
        ours = self.measured[cap, OURS]
        for measured in self.measured.values():
            if measured.memory != cap or measured.seconds_per_token is None or ours.seconds_per_token is None:
                continue
            seconds = measured.seconds_per_token
            measured.limit = self._limit(cap, ours.last["runtime"], statistics.mean(measured.disk_rates))
            measured.of_limit = measured.limit / seconds
            measured.slower_than_ours = seconds / ours.seconds_per_token
            pairs = list(zip(measured.last["tokens"], ours.last["tokens"], strict=False))
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            measured.same_tokens = f"{same}/{len(pairs)}"

    def _limit(self, cap: int | None, runtime: int, disk_rate: float) -> float:
        """Seconds that a pass takes at least: what cannot stay comes from disk, and every byte through memory."""
        from_disk = 0 if cap is None else max(0, self.shape.touched - max(0, cap - runtime))
        return max(from_disk / disk_rate, self.shape.touched / self.memory_rate)

    def _job(self, memory: int | None, peer: Peer | None, share: float = 1.0) -> Job:
        rows, vocab = self.arguments.rows, self.shape.vocab
        return Job(
            checkpoint=str(self.path),
            copy=str(self.path.with_name(f"{self.path.name}-{peer.name}")) if peer else "",
            memory=memory,
            prompts=[[(31 * row + 17 * i + 5) % vocab for i in range(PROMPT_TOKENS)] for row in range(rows)],
            context=self.arguments.context,
            tokens=self.arguments.tokens,
            seconds=self.arguments.seconds,
            share=share,
        )

    def _cap(self, memory: str) -> int | None:
        if memory == "all":
            return None
        if memory != "smallest":
            return _parse_bytes(memory)
        command = [sys.executable, str(HERE / "ours.py"), self._job(None, None).to_json(), "smallest"]
        checkpoint.drop_page_cache(_torch_libraries(sys.executable))
        done = cgroup.run(command, limit=None if self.refused else 1 << 40, timeout=self.arguments.timeout)
        if done.returncode:
            sys.exit(done.stderr)
        return int(done.stdout.strip().splitlines()[-1])

    def _prepared_peers(self) -> list[Peer]:
        """Those that are installed, with their own copies of the checkpoint made."""
        ready = []
        for peer in peers.PEERS:
            if peer.name not in self.arguments.peers:
                continue
            if not peer.installed(self.arguments.peers_dir):
                print(f"peers       {peer.name} is not installed: make bench-peers")
                continue
            start = time.perf_counter()
            command = [self._python(peer), HERE / peer.worker, self._job(None, peer).to_json(), "prepare"]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                print(f"peers       {peer.name} cannot take the checkpoint: {done.stderr.strip().splitlines()[-1]}")
                continue
            print(f"peers       {peer.name} ready, its copy of the checkpoint took {time.perf_counter() - start:.0f} s")
            ready.append(peer)
        return ready

    def _python(self, peer: Peer | None) -> str:
        return str(peer.python(self.arguments.peers_dir)) if peer else sys.executable

    def _disk_rate(self) -> rates.DiskRate:
        rate = rates.disk(self.files, sample=min(rates.BYTES_PER_SAMPLE, self.shape.nbytes))
        self.disk_rates.append(rate)
        print(f"disk        reading {rate}", flush=True)
        return rate

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.arguments).items()}
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
            "arguments": arguments,
            "shape": asdict(self.shape) | {"nbytes": self.shape.nbytes, "touched": self.shape.touched},
            "cgroup": self.refused or "used",
            "memory_rate": self.memory_rate,
            "disk_rates": [asdict(rate) for rate in self.disk_rates],
            "runs": [asdict(m) | {"seconds_per_token": m.seconds_per_token} for m in self.measured.values()],
        }

    def table(self) -> str:
        """One line for each runner and cap, as README.md explains them."""
        rows: list[tuple[str, ...]] = [COLUMNS]
        for measured in self.measured.values():
            start = (_cap_text(measured.memory), measured.runner)
            if measured.error:
                rows.append((*start, measured.error))
                continue
            last, stats = measured.last, measured.last.get("stats", {})
            peak = (measured.peak or 0) / 2**30
            rows.append(
                (
                    *start,
                    number(measured.seconds_per_token, 3),
                    number(measured.limit, 3),
                    number(measured.of_limit, 2),
                    number(measured.slower_than_ours, 2),
                    number(peak, 2) + ("" if measured.capped else "*"),
                    number(stats.get("bytes_read"), 2, 1e-9),
                    number(stats.get("seconds_computing"), 3),
                    number(stats.get("seconds_waiting"), 3),
                    number(stats.get("seconds_else"), 3),
                    number(last["seconds_first_pass"], 2),
                    number(last["seconds_load"], 1),
                    measured.same_tokens or "",
                )
            )
        note = "" if all(m.capped for m in self.measured.values()) else "\n* resident set of the process, no cgroup"
        return aligned(rows) + note


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    whole = [row for row in rows if len(row) > 3]  # a line with an error is as long as it likes
    widths = [max(len(row[i]) for row in whole) for i in range(len(whole[0]))]
    widths[:2] = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = []
    for row in rows:
        cells = [f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"


def _cap_text(cap: int | None) -> str:
    return "all" if cap is None else f"{cap / 2**30:.2f} GiB"


def _parse_bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB|GB|MB)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory: write 4GiB, 500MiB or bytes")
    return int(float(found[1]) * {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, None: 1}[found[2]])


def _memory(text: str) -> str:
    if text not in ("all", "smallest"):
        _parse_bytes(text)
    return text


def _memory_rate(nbytes: int) -> float:
    """In a process of its own, so that no page of torch is held by this one when a runner starts cold."""
    command = [sys.executable, "-c", f"import rates; print(rates.memory({nbytes}))"]
    return float(subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout)


def _files_below(folder: str) -> list[Path]:
    return [path for path in Path(folder).rglob("*") if path.is_file()] if folder else []


def _torch_libraries(python: str) -> list[Path]:
    """Its shared libraries: dropped from the page cache, they count against the runner's memory as on a fresh machine."""
    if python == sys.executable:
        found = importlib.util.find_spec("torch")
        roots = [Path(found.origin).parent] if found and found.origin else []
    else:
        roots = list(Path(python).parent.parent.glob("lib/python*/site-packages/torch"))
    return [file for root in roots for file in root.glob("lib/*.so*") if file.is_file()]


def machine() -> dict[str, Any]:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": names[0] if names else platform.processor(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    checkpoint.add_arguments(parser)
    parser.add_argument(
        "--memory", nargs="+", type=_memory, default=["4GiB", "all"],
        help="caps, each for a whole process: 4GiB, 'smallest' (that works for ours), 'all' (no cap); default 4GiB all",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=1, help="prompts decoded at once (default 1)")
    parser.add_argument("--context", type=int, default=128, help="tokens that the caches have room for (default 128)")
    parser.add_argument("--tokens", type=int, default=8, help="passes timed in each run, after the first (default 8)")
    parser.add_argument("--seconds", type=float, default=60, help="stop timing a run after this long (default 60)")
    parser.add_argument("--rounds", type=int, default=1, help="turns that all runners take; their samples are pooled")
    parser.add_argument("--timeout", type=float, default=900, help="give a run up after these seconds (default 900)")
    names = [peer.name for peer in peers.PEERS]
    parser.add_argument("--peers", nargs="*", choices=names, default=names, help="of those installed (default: all)")
    parser.add_argument("--peers-dir", type=Path, default=peers.FOLDER, help="where make bench-peers put them")
    parser.add_argument("--json", type=Path, default=HERE / "results.json", help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.context < PROMPT_TOKENS + arguments.tokens + 1:
        parser.error(f"--context {arguments.context} has no room for {PROMPT_TOKENS} + {arguments.tokens} tokens")
    bench = Bench(arguments)
    try:
        bench.run()
    finally:
        print(f"\n{bench.table()}\n")
        arguments.json.write_text(json.dumps(bench.document(), indent=1))
        print(f"all numbers: {arguments.json}")
    if any(measured.error for (_, name), measured in bench.measured.items() if name == OURS):
        sys.exit(1)


if __name__ == "__main__":
    main()
