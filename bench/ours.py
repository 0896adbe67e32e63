"""The decode with this project's packages, for bench.py. `ours.py JOB smallest` prints the least memory that works."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import llm_llama_model
import llm_partial_run
import llm_sampler
import llm_sepweight
import worker


def load(job: worker.Job) -> tuple[worker.Decode, Any]:
    torch.set_num_threads(worker.threads())
    store = llm_sepweight.open(job.checkpoint, layout=llm_llama_model.layout)
    parts = llm_llama_model.parts(llm_llama_model.Config.from_hf(store.config))
    run = llm_partial_run.PartialRun(parts, store, memory=job.memory, rows=len(job.prompts), context=job.context)

    def about() -> dict[str, Any]:
        return {"plan": run.plan.as_dict(), "stats": vars(run.stats) | {"seconds_else": run.stats.seconds_else}}

    return _decode(run, job), about


def _decode(run: llm_partial_run.PartialRun, job: worker.Job) -> worker.Decode:
    with run:
        for step in llm_sampler.sample(run.forward, job.prompts, max_new_tokens=job.tokens + 2, temperature=0):
            yield list(step.tokens)


def smallest(job: worker.Job) -> int:
    store = llm_sepweight.open(job.checkpoint, layout=llm_llama_model.layout)
    parts = llm_llama_model.parts(llm_llama_model.Config.from_hf(store.config))
    try:
        return llm_partial_run.plan(parts, store, memory=1, rows=len(job.prompts), context=job.context).smallest
    except llm_partial_run.BudgetError as error:
        return error.smallest


if __name__ == "__main__":
    if sys.argv[2:] == ["smallest"]:
        print(smallest(worker.Job(**json.loads(sys.argv[1]))))
    else:
        worker.serve(load)
