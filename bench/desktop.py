"""BLOOM 176b in the memory of a desktop: its layers at their real size, streamed, for one token and for many. See README.md.

python bench/desktop.py --layers 4 --tokens 1 128 512
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import cgroup
import checkpoint
import llm_bloom_model as bloom
import llm_partial_run
import llm_sepweight
import rates
from llm_bloom_model._presets import PRESETS

ROW = 32  # tokens of each row in a pass of many
COLUMNS = (
    "memory", "tokens", "s/layer", "read GB", "GB/s", "disk GB/s", "computing", "waiting", "peak GiB", "s, whole", "s/token",
)  # fmt: skip


@dataclass(frozen=True)
class Layers:
    """The first `written` layers of a BLOOM with random weights: all that is written of it."""

    preset: str
    written: int

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.written}-layers"

    @property
    def config(self) -> dict[str, Any]:
        return PRESETS[self.preset] | {"dtype": "bfloat16"}

    @property
    def ends(self) -> dict[str, tuple[int, ...]]:
        """What else the model has, by key."""
        hidden_size = self.config["hidden_size"]
        norms = [f"{norm}.{key}" for norm in ("word_embeddings_layernorm", "ln_f") for key in ("weight", "bias")]
        return {"word_embeddings.weight": (self.config["vocab_size"], hidden_size)} | dict.fromkeys(
            norms, (hidden_size,)
        )

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, part in bloom.parts(bloom.Config.preset(self.preset), f"0:{self.written}").items():
            for key, tensor in part.state_dict().items():
                yield f"h.{int(name.removeprefix('mid.'))}.{key}", tuple(tensor.shape)

    @property
    def nbytes(self) -> int:
        return sum(2 * math.prod(shape) for _, shape in self.tensors())


def write(layers: Layers, folder: Path) -> Path:
    """The layers, and begin and end as a hole in a file: it takes no disk, and the whole model can be planned with it."""
    path = checkpoint.write(layers, folder)  # pyright: ignore[reportArgumentType]
    header = checkpoint.header(layers.ends)
    with open(path / "ends.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(2 * math.prod(shape) for shape in layers.ends.values()))
    index = path / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    shards |= {key: "model.safetensors" for key, _ in layers.tensors() if key not in shards}  # all in one
    index.write_text(json.dumps({"weight_map": shards | dict.fromkeys(layers.ends, "ends.safetensors")}))
    return path


def opened(path: Path, written: int) -> llm_sepweight.WeightStore:
    """All layers of the model, each `written`-th from the same bytes on disk; each is read anew, past the page cache."""

    def layout(key: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
        places = bloom.layout(key, config)
        if not key.startswith("h."):
            return places
        ((part, name),) = places
        first = int(part.removeprefix("mid."))
        return [(f"mid.{layer:05d}", name) for layer in range(first, config["n_layer"], written)]

    return llm_sepweight.open(path, layout=layout)


def plan(arguments: argparse.Namespace, path: Path, memory: str, tokens: int) -> llm_partial_run.Plan:
    """What a pass over the whole model would do."""
    with opened(path, arguments.written) as store:
        parts = bloom.parts(bloom.Config.preset(arguments.preset))
        return llm_partial_run.plan(parts, store, memory=memory, **_sizes(tokens))


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """In a process of its own: passes over some layers, timed after the first."""
    torch.manual_seed(0)
    with opened(Path(job["path"]), job["written"]) as store:
        parts = bloom.parts(bloom.Config.preset(job["preset"]), f"0:{job['layers']}")
        rows = max(1, job["tokens"] // ROW)
        x = torch.randn(rows, job["tokens"] // rows, store.config["hidden_size"], dtype=torch.bfloat16)
        budget = {"memory": job["memory"], **_sizes(job["tokens"])}
        with llm_partial_run.PartialRun(parts, store, **budget) as run:
            run(x)
            before, start = dict(vars(run.stats)), time.perf_counter()
            for _ in range(job["passes"]):
                run(x)
            seconds = (time.perf_counter() - start) / job["passes"]
            grown = {key: (value - before[key]) / job["passes"] for key, value in vars(run.stats).items()}
    return grown | {"seconds": seconds, "resident_set": llm_partial_run.peak_resident_set()}


def _sizes(tokens: int) -> dict[str, Any]:
    """One micro-batch: its activations are small beside a layer of 5 GB, which would be held for several."""
    return {"rows": max(1, tokens // ROW), "context": ROW, "tokens": tokens, "micro_batch": tokens}


def measure(arguments: argparse.Namespace, path: Path, memory: str, tokens: int) -> tuple[str, ...]:
    job = vars(arguments) | {"path": str(path), "memory": memory, "tokens": tokens}
    job = {key: value for key, value in job.items() if isinstance(value, (int, str))}
    limit = None if cgroup.why_not() else llm_partial_run.parse_bytes(memory)
    checkpoint.drop_page_cache(path.glob("*.safetensors"))
    before = disk_rate(path)
    done = cgroup.run([sys.executable, __file__, "--work", json.dumps(job)], limit=limit, timeout=arguments.timeout)
    if done.returncode:
        error = "killed: out of memory" if done.killed else (done.stderr.strip().splitlines() or ["failed"])[-1]
        return memory, str(tokens), error
    said = json.loads(done.stdout.strip().splitlines()[-1])
    disk = (before + disk_rate(path)) / 2  # a disk that others use is not always as fast
    layer = said["seconds"] / arguments.layers
    model = PRESETS[arguments.preset]
    head = 2 * model["vocab_size"] * model["hidden_size"] / disk  # of the embedding a few rows are read
    whole = model["n_layer"] * layer + head  # of a cap so small that hardly any layer stays
    numbers = (
        layer, said["bytes_read"] / 1e9, said["bytes_read"] / said["seconds"] / 1e9, disk / 1e9, said["seconds_computing"],
        said["seconds_waiting"], (done.peak or said["resident_set"]) / 2**30, whole, whole / tokens,
    )  # fmt: skip
    return memory, str(tokens), *(f"{number:.2f}" for number in numbers)


def disk_rate(path: Path) -> float:
    """Bytes a second of plain direct reads of the layers."""
    files = sorted(path.glob("model*.safetensors"))
    return rates.disk(files, sample=min(rates.BYTES_PER_SAMPLE, sum(file.stat().st_size for file in files) // 4)).rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="bloom", help="the model (default bloom, of 176b)")
    parser.add_argument("--memory", nargs="+", default=["1GiB"], help="caps, each for a whole process (default 1GiB)")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 128, 512], help="in a pass (default 1 128 512)")
    parser.add_argument("--layers", type=int, default=4, help="that a pass computes (default 4)")
    parser.add_argument("--written", type=int, default=2, help="different ones on disk; 4.9 GB each (default 2)")
    parser.add_argument("--passes", type=int, default=1, help="timed, after the first (default 1)")
    parser.add_argument(
        "--plans", nargs="*", default=["1GiB", "16GiB", "64GiB"], help="of the whole model, printed first"
    )
    parser.add_argument("--timeout", type=float, default=900, help="give a run up after these seconds (default 900)")
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent / ".checkpoints", help="where it is written")
    parser.add_argument("--keep", action="store_true", help="leave the layers on disk")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(json.loads(arguments.work))))
        return
    path = write(Layers(arguments.preset, arguments.written), arguments.dir)
    try:
        for memory in arguments.plans:
            print(f"\nthe whole model in {memory}, one token a pass:\n{plan(arguments, path, memory, 1)}", flush=True)
        rows: list[tuple[str, ...]] = [COLUMNS]
        for memory in arguments.memory:
            for tokens in arguments.tokens:
                rows.append(measure(arguments, path, memory, tokens))
                print(f"{memory}, {tokens} tokens: done", flush=True)
        print()
        for row in rows:
            print("  ".join(f"{cell:>12}" for cell in row))
    finally:
        if not arguments.keep:
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
