"""The decode with transformers: accelerate's disk offload under a memory limit, all resident without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import worker


def load(job: worker.Job) -> tuple[worker.Decode, Callable[[], dict[str, Any]]]:
    import transformers

    torch.set_num_threads(worker.threads())
    place: dict[str, Any] = {}
    if job.memory is not None:
        # max_memory counts weights alone: what is right beside them is found by trial, so bench.py tries some shares
        place = {"device_map": "auto", "max_memory": {"cpu": int(job.memory * job.share)}, "offload_folder": job.copy}
    model = transformers.AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.bfloat16, **place).eval()
    return decode(model, job), dict


def decode(model: Any, job: worker.Job) -> worker.Decode:
    """Greedy, with the key-value cache that the model makes."""
    ids, cache = torch.tensor(job.prompts), None  # [rows, tokens]
    while True:
        with torch.inference_mode():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        yield ids[:, 0].tolist()


if __name__ == "__main__":
    worker.serve(load)
