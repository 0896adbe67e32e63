"""How fast weights are split, verified and read, against cp, plain direct reads and other readers. See README.md."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import checkpoint
import peers
import rates
from bench import aligned, machine, number

HERE = Path(__file__).parent
WORKER = HERE / "sepweight_worker.py"
CP, CP_SYNC, SPLIT, VERIFY = "cp", "cp, then sync", "split", "verify"
LOAD, LOAD_LAZY = "load(part, into=)", "load, verify=lazy"
OTHERS = ("safetensors load_file", "safetensors safe_open", peers.RUNAI.name)
COLUMNS = ("work", "seconds", "GB/s", "of cp", "of cp + sync", "of plain reads", "peak MiB", "runtime MiB")


@dataclass
class Measured:
    """One kind of work; several rounds of it are pooled."""

    work: str
    error: str | None = None
    nbytes: int = 0
    seconds: list[float] = field(default_factory=list)
    plain_rates: list[float] = field(default_factory=list)  # direct reads, right before and right after
    peak: int | None = None  # bytes of the process's resident set
    runtime: int | None = None  # the same, once everything is imported and nothing is opened

    @property
    def rate(self) -> float | None:
        return self.nbytes / statistics.median(self.seconds) if self.seconds else None


class Bench:
    """One checkpoint on one disk."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.shape = checkpoint.shape_from(arguments)
        self.checkpoint = checkpoint.write(self.shape, arguments.dir)
        self.shards = sorted(self.checkpoint.glob("*.safetensors"))
        self.copy = self.checkpoint.with_name(f"{self.checkpoint.name}-cp")
        self.directory = self.checkpoint.with_name(f"{self.checkpoint.name}-split")
        self.measured: dict[str, Measured] = {}
        self.largest_part = 0
        self._synced: dict[str, Any] = {}

    def run(self) -> None:
        for _ in range(self.arguments.rounds):
            if "write" in self.arguments.work:
                self._measure(CP, self._cp)
                self._measure(CP_SYNC, lambda: self._synced)
                self._measure(SPLIT, lambda: self._split(SPLIT))
            elif not self.directory.exists():
                self._split(SPLIT)
            files = sorted(self.directory.glob("*.safetensors"))
            if self.measured.get(SPLIT, Measured(SPLIT)).error or not files:
                return
            self.largest_part = max(file.stat().st_size for file in files)
            if "read" in self.arguments.work:
                before = self._plain_rate(files)
                for work in (VERIFY, LOAD, LOAD_LAZY, *OTHERS):
                    checkpoint.drop_page_cache(files)
                    if self._measure(work, lambda work=work: self._worker(work, self.directory)):
                        after = self._plain_rate(files)
                        self.measured[work].plain_rates += [before, after]
                        before = after

    def _measure(self, work: str, measure: Callable[[], dict[str, Any]]) -> bool:
        measured = self.measured.setdefault(work, Measured(work))
        if work == peers.RUNAI.name and not peers.RUNAI.installed(self.arguments.peers_dir):
            measured.error = "not installed: make bench-peers"
            return False
        try:
            result = measure()
        except subprocess.CalledProcessError as error:
            measured.error = (error.stderr.strip().splitlines() or [str(error)])[-1]
            return False
        measured.nbytes = result["nbytes"]
        measured.seconds.append(result["seconds"])
        measured.peak = max(measured.peak or 0, result.get("peak", 0)) or None
        measured.runtime = result.get("runtime")
        print(f"{work:<24}{result['seconds']:.2f} s, {result['nbytes'] / result['seconds'] / 1e9:.2f} GB/s", flush=True)
        return True

    def _cp(self) -> dict[str, Any]:
        """The same bytes as they lie, to the same disk, and how long it takes until they are on it."""
        shutil.rmtree(self.copy, ignore_errors=True)
        self.copy.mkdir()
        checkpoint.drop_page_cache(self.shards)
        start = time.perf_counter()
        _run(["cp", "--reflink=never", *self.shards, self.copy])
        seconds = time.perf_counter() - start
        copies = sorted(self.copy.glob("*.safetensors"))
        _run(["sync", *copies])
        synced = time.perf_counter() - start
        nbytes = sum(file.stat().st_size for file in copies)
        shutil.rmtree(self.copy)
        self._synced = {"seconds": synced, "nbytes": nbytes}
        return {"seconds": seconds, "nbytes": nbytes}

    def _split(self, work: str) -> dict[str, Any]:
        shutil.rmtree(self.directory, ignore_errors=True)
        checkpoint.drop_page_cache(self.shards)
        return self._worker(work, self.checkpoint, self.directory)

    def _worker(self, work: str, *paths: Path) -> dict[str, Any]:
        python = peers.RUNAI.python(self.arguments.peers_dir) if work == peers.RUNAI.name else sys.executable
        return json.loads(_run([python, WORKER, work, *paths]).splitlines()[-1])

    def _plain_rate(self, files: list[Path]) -> float:
        rate = rates.disk(files, sample=min(rates.BYTES_PER_SAMPLE // 2, self.shape.nbytes))
        print(f"{'plain direct reads':<24}{rate}", flush=True)
        return rate.rate

    def _of(self, measured: Measured, other: str) -> float | None:
        against = self.measured.get(other)
        if measured.work != SPLIT or measured.rate is None or against is None or against.rate is None:
            return None
        return measured.rate / against.rate

    def _of_plain(self, measured: Measured) -> float | None:
        """The median of the rounds, each against what the disk gave around it."""
        if not measured.plain_rates:
            return None
        rounds = zip(measured.seconds, measured.plain_rates[::2], measured.plain_rates[1::2], strict=True)
        return statistics.median(measured.nbytes / seconds / statistics.mean(around) for seconds, *around in rounds)

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.arguments).items()}
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
            "arguments": arguments,
            "shape": asdict(self.shape) | {"nbytes": self.shape.nbytes},
            "largest_part": self.largest_part,
            "runs": [
                asdict(measured)
                | {
                    "rate": measured.rate,
                    "of_cp": self._of(measured, CP),
                    "of_cp_sync": self._of(measured, CP_SYNC),
                    "of_plain_reads": self._of_plain(measured),
                }
                for measured in self.measured.values()
            ],
        }

    def table(self) -> str:
        """One line for each kind of work, as README.md explains them."""
        rows: list[tuple[str, ...]] = [COLUMNS]
        for measured in self.measured.values():
            if measured.error:
                continue
            rows.append(
                (
                    measured.work,
                    f"{statistics.median(measured.seconds):.2f}",
                    number(measured.rate, 2, 1e-9),
                    number(self._of(measured, CP), 2),
                    number(self._of(measured, CP_SYNC), 2),
                    number(self._of_plain(measured), 2),
                    number(measured.peak, 0, 2**-20),
                    number(measured.runtime, 0, 2**-20),
                )
            )
        notes = [f"the largest part has {self.largest_part / 2**20:.0f} MiB"]
        notes += [f"{measured.work}: {measured.error}" for measured in self.measured.values() if measured.error]
        return "\n".join([aligned(rows), "", *notes])


def _run(command: list[str | Path]) -> str:
    return subprocess.run(command, stdin=subprocess.DEVNULL, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    checkpoint.add_arguments(parser)
    parser.add_argument("--work", nargs="+", choices=("write", "read"), default=["write", "read"], help="default: both")
    parser.add_argument("--rounds", type=int, default=1, help="turns that all take; the table has their medians")
    parser.add_argument("--peers-dir", type=Path, default=peers.FOLDER, help="where make bench-peers put them")
    parser.add_argument("--keep", action="store_true", help="leave the split model, for another run with --work read")
    parser.add_argument("--json", type=Path, default=HERE / "results-sepweight.json", help="default: %(default)s")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    try:
        bench.run()
    finally:
        print(f"\n{bench.table()}\n")
        arguments.json.write_text(json.dumps(bench.document(), indent=1))
        print(f"all numbers: {arguments.json}")
        shutil.rmtree(bench.copy, ignore_errors=True)
        if not arguments.keep:
            shutil.rmtree(bench.directory, ignore_errors=True)
    if any(measured.error for measured in bench.measured.values() if measured.work in (SPLIT, VERIFY, LOAD, LOAD_LAZY)):
        sys.exit(1)


if __name__ == "__main__":
    main()
