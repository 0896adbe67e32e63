"""The decode with transformers' own model, its blocks streamed by llm_partial_run.offload, for bench.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import llm_partial_run
import llm_sepweight
import peer_accelerate
import worker


def load(job: worker.Job) -> tuple[worker.Decode, Callable[[], dict[str, Any]]]:
    import transformers

    torch.set_num_threads(worker.threads())
    config = transformers.AutoConfig.from_pretrained(job.checkpoint)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    weights = llm_sepweight.open(job.checkpoint, layout=llm_partial_run.layout_from_module(model))
    run = llm_partial_run.offload(model, weights, memory=job.memory, rows=len(job.prompts), context=job.context)

    def about() -> dict[str, Any]:
        return {"plan": run.plan.as_dict(), "stats": vars(run.stats) | {"seconds_else": run.stats.seconds_else}}

    return _decode(run, job), about


def _decode(run: llm_partial_run.Offload, job: worker.Job) -> worker.Decode:
    with run:
        yield from peer_accelerate.decode(run.module, job)


if __name__ == "__main__":
    worker.serve(load)
