"""Bytes read per token of a Mixtral that is larger than memory: the experts that tokens are sent to, against whole layers.

Writes a random checkpoint in Mixtral's shape (8 experts, 2 a token; by default 8 layers of hidden size 2048, 6.2 GB), and
decodes under a memory budget. Each token is sent to experts that are drawn, all of them equally likely: no expert is a
favourite, and those in memory are wanted no more often than others. Routers of trained models have favourites, and read
less. A random router would not do: what all tokens have in common makes it choose the same few.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import checkpoint
import llm_llama_model
import llm_partial_run
import llm_sampler
import llm_sepweight
import rates


@dataclass(frozen=True)
class Mixture(checkpoint.Shape):
    experts: int = 8
    per_token: int = 2

    @property
    def name(self) -> str:
        return f"mixtral-{self.layers}x{self.hidden}x{self.intermediate}-e{self.experts}-v{self.vocab}"

    @property
    def config(self) -> dict[str, object]:
        return super().config | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.per_token,
            "sliding_window": None,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for key, dims in super().tensors():
            if ".mlp." not in key:
                yield key, dims
                continue
            layer, projection = key.split("mlp.")
            if projection == "gate_proj.weight":  # each layer once: the router, and all experts
                yield f"{layer}block_sparse_moe.gate.weight", (self.experts, self.hidden)
                for n in range(self.experts):
                    yield f"{layer}block_sparse_moe.experts.{n}.w1.weight", (self.intermediate, self.hidden)
                    yield f"{layer}block_sparse_moe.experts.{n}.w3.weight", (self.intermediate, self.hidden)
                    yield f"{layer}block_sparse_moe.experts.{n}.w2.weight", (self.hidden, self.intermediate)

    @property
    def routed(self) -> int:
        """Bytes of the experts that one token is sent to."""
        return self.layers * self.per_token * self.expert

    @property
    def expert(self) -> int:
        """Bytes of one expert: its three matrices."""
        return 3 * 2 * self.hidden * self.intermediate


SHAPES = {
    "small": Mixture(layers=8, hidden=2048, intermediate=7168, heads=16, vocab=32000),
    "tiny": Mixture(layers=4, hidden=256, intermediate=896, heads=4, vocab=1000),
}


def send_evenly(router: nn.Module, seed: int) -> Counter[int]:
    """Replaces the choices of a layer's router by drawn ones. Returns what will count how often each expert is used."""
    generator, uses = torch.Generator().manual_seed(seed), Counter[int]()

    def draw(module: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        indices, weights = output  # [N, k] each
        drawn = torch.rand(len(indices), module.gate.out_features, generator=generator).topk(indices.shape[1]).indices
        uses.update(drawn.flatten().tolist())
        return drawn, weights

    router.register_forward_hook(draw)
    return uses


def used_most(uses: Sequence[Counter[int]], experts: int) -> float:
    """What share of the uses went to the quarter of all layers' experts that was used most: a quarter if they are even."""
    counts = sorted((count for layer in uses for count in layer.values()), reverse=True)
    return sum(counts[: len(uses) * experts // 4]) / sum(counts)


def measure(shape: Mixture, path: Path, memory: str, tokens: int, warm_up: int) -> dict[str, float]:
    checkpoint.drop_page_cache(path.glob("*.safetensors"))
    with llm_sepweight.open(path, layout=llm_llama_model.layout) as store:
        parts = llm_llama_model.parts(llm_llama_model.Config.from_hf(store.config))
        routers = [part.get_submodule("mlp") for name, part in parts.items() if name.startswith("mid.")]
        uses = [send_evenly(router, seed) for seed, router in enumerate(routers)]
        context = warm_up + tokens + 64
        if memory == "smallest":
            try:
                llm_partial_run.plan(parts, store, memory=1, context=context)
            except llm_partial_run.BudgetError as error:
                memory = str(error.smallest)
        with llm_partial_run.PartialRun(parts, store, memory=memory, context=context) as run:
            print(run.plan, "\n", flush=True)
            steps = llm_sampler.sample(
                run.forward, [[1, 2, 3, 4]], max_new_tokens=1 + warm_up + tokens, temperature=1.0, seed=0
            )
            for _ in range(1 + warm_up):  # so that the slots are full, with what was used most
                next(steps)
            for counts in uses:
                counts.clear()
            before, seconds = run.stats.bytes_read, []
            for _ in range(tokens):
                start = time.perf_counter()
                next(steps)
                seconds.append(time.perf_counter() - start)
            steps.close()
            read = (run.stats.bytes_read - before) / tokens
            stays = run.plan.kept + run.plan.resident + run.plan.experts
            return {
                "memory": run.plan.memory,
                "seconds_per_token": statistics.median(seconds),
                "read_per_token": read,
                "read_by_whole_layers": max(0, shape.touched - stays),  # what cannot stay, in each pass
                "routed_per_token": shape.routed,
                "held": run.plan.experts / (shape.layers * shape.experts * shape.expert),
                "hits": 1 - max(0.0, read - run.plan.streamed) / shape.routed,
                "used_most": used_most(uses, shape.experts),
            }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = SHAPES["small"].nbytes / 1e9
    parser.add_argument("--shape", choices=SHAPES, default="small", help=f"default small: {size:.1f} GB")
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent / ".checkpoints", help="where it is written")
    parser.add_argument(
        "--memory", nargs="+", default=["2GiB", "4GiB"], help="budgets, or smallest (default: 2GiB 4GiB)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="timed (default: 64)")
    parser.add_argument("--warm-up", type=int, default=32, help="tokens before those (default: 32)")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    arguments = parser.parse_args(argv)
    shape = SHAPES[arguments.shape]
    path = checkpoint.write(shape, arguments.dir)
    disk = rates.disk(sorted(path.glob("*.safetensors")), sample=min(rates.BYTES_PER_SAMPLE, shape.nbytes // 4))
    print(f"disk        reading {disk}")
    rows = [measure(shape, path, memory, arguments.tokens, arguments.warm_up) for memory in arguments.memory]
    print(
        f"{'memory':>10}{'s/token':>9}{'read/token':>12}{'whole layers':>14}{'ratio':>7}{'held':>7}{'hits':>7}{'of limit':>10}"
    )
    for row in rows:
        row["limit"] = row["read_per_token"] / disk.rate
        whole, read = row["read_by_whole_layers"], row["read_per_token"]
        print(
            f"{row['memory'] / 2**30:>6.2f} GiB{row['seconds_per_token']:>9.3f}{read / 1e9:>9.2f} GB{whole / 1e9:>11.2f} GB"
            f"{whole / read if read else math.inf:>7.1f}{row['held']:>7.0%}{row['hits']:>7.0%}{row['limit'] / row['seconds_per_token']:>10.2f}"
        )
    shares = ", ".join(f"{row['used_most']:.0%}" for row in rows)
    print(f"\nheld: experts that the slots hold. The quarter of the experts used most had {shares} of the uses.")
    if arguments.json:
        arguments.json.write_text(json.dumps({"disk_rate": disk.rate, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
