"""What sampling costs beside the model: llm_sampler and transformers' `generate` over the same model, in the same run.

python bench/sampler.py --help
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # as llm_sampler names them, as transformers does
    "greedy": ({"temperature": 0}, {"do_sample": False}),
    "greedy, logprobs": ({"temperature": 0, "logprobs": True}, {"do_sample": False}),
    "temperature 0.8": ({"temperature": 0.8}, {"do_sample": True, "temperature": 0.8, "top_k": 0}),
    "top-k 50": ({"top_k": 50}, {"do_sample": True, "top_k": 50}),
    "top-p 0.9": ({"top_p": 0.9}, {"do_sample": True, "top_p": 0.9, "top_k": 0}),
    "epsilon 3e-4": ({"epsilon_cutoff": 3e-4}, {"do_sample": True, "epsilon_cutoff": 3e-4, "top_k": 0}),
    "eta 3e-4": ({"eta_cutoff": 3e-4}, {"do_sample": True, "eta_cutoff": 3e-4, "top_k": 0}),
    "top-k 50, top-p 0.9, repetition 1.1": (
        {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
        {"do_sample": True, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
    ),
    "the same, logprobs": (
        {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "logprobs": True},
        {"do_sample": True, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--prompt", type=int, default=200, help="tokens in each prompt (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=100, help="tokens per row, fewer for many rows (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256], help="rows at once (default: 1 16 256)")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--peer-rows", type=int, default=16, help="transformers with at most so many (default: 16)")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each takes; the best counts (default: 3)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported

    import torch

    torch.set_num_threads(args.threads)
    model = peaked_model(args.vocabulary)
    results = []
    print(f"{args.vocabulary} tokens, {args.threads} thread(s); ms per step, and per row")
    print(f"{'settings':38}{'rows':>5}{'llm_sampler':>22}{'with logits ready':>22}{'transformers':>22}")
    for name in args.settings:
        for rows in args.rows:
            ids = torch.randint(args.vocabulary, (rows, args.prompt), generator=torch.Generator().manual_seed(rows))
            steps = max(args.steps // rows, 3)
            ready = Ready(model, ids)
            ours, alone, theirs = [], [], []
            for _ in range(args.rounds):
                ours.append(ours_beside_the_model(model, ids, steps, SETTINGS[name][0]))
                alone.append(ours_with_logits_ready(ready, ids, steps, SETTINGS[name][0]))
                if rows <= args.peer_rows:
                    theirs.append(theirs_beside_the_model(model, ids, steps, SETTINGS[name][1]))
            results.append(
                {
                    "settings": name,
                    "rows": rows,
                    "steps": steps,
                    "llm_sampler": ours,
                    "logits_ready": alone,
                    "transformers": theirs,
                }
            )
            cells = "".join(
                f"{min(times) * 1e3:12.3f}{min(times) * 1e3 / rows:10.3f}" if times else f"{'-':>22}"
                for times in (ours, alone, theirs)
            )
            print(f"{name:38}{rows:5}{cells}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def peaked_model(vocabulary: int) -> Any:
    """A Llama so small that its forward is short, whose logits spread as those of a trained model do."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.lm_head.weight.data.normal_(std=0.75)  # the last norm gives vectors of length 4: logits of deviation 3
    return model


class Clock:
    """Calls the model and adds up the seconds that it takes."""

    def __init__(self, model: Any):
        self.model = model
        self.forward = model.forward
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start

    def last_logits(self, ids: Any, lengths: Any, n: int) -> Any:
        return self(ids[:, -1:], use_cache=False).logits  # what it says is not what counts here


class Ready:
    """Logits that lie in memory: a model that takes no time, and leaves the caches to the sampler.

    Steps take up to 16 batches (1 GiB) in turn, every run the same: with one batch, a single candidate near a threshold
    decides whether all of them take the exact sums.
    """

    def __init__(self, model: Any, ids: Any):
        rows, width = ids.shape
        count = max(min(16, width, 2**28 // (rows * model.config.vocab_size)), 1)
        forward = Clock(model)
        self.batches = [forward.last_logits(ids[:, : width - i], None, 1).detach() for i in range(count)]

    def __call__(self, ids: Any) -> Any:
        raise NotImplementedError("last_logits is there to be used")

    def last_logits(self, ids: Any, lengths: Any, n: int) -> Any:
        return self.batches[ids.shape[1] % len(self.batches)]


def ours_with_logits_ready(ready: Ready, ids: Any, steps: int, settings: dict[str, Any]) -> float:
    import llm_sampler

    start = time.perf_counter()
    for _ in llm_sampler.sample(ready, ids, max_new_tokens=steps, seed=0, **settings):
        pass
    return (time.perf_counter() - start) / steps


def ours_beside_the_model(model: Any, ids: Any, steps: int, settings: dict[str, Any]) -> float:
    import llm_sampler

    clock = Clock(model)
    start = time.perf_counter()
    for _ in llm_sampler.sample(clock, ids, max_new_tokens=steps, seed=0, **settings):
        pass
    return (time.perf_counter() - start - clock.seconds) / steps


def theirs_beside_the_model(model: Any, ids: Any, steps: int, settings: dict[str, Any]) -> float:
    import torch

    clock = Clock(model)
    model.forward = clock
    try:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, **settings)
        return (time.perf_counter() - start - clock.seconds) / steps
    finally:
        del model.forward  # the class's own again


if __name__ == "__main__":
    main()
