"""The main job in small: answer a question with a model that does not fit in the memory it is given.

python demo/demo.py                                   asks for the capital of France
python demo/demo.py --question "Is the sun a star?"   asks something else that the model has learned (see facts.py)
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import llm_llama_model as llama
import llm_partial_run
import llm_sampler
import llm_sepweight

MODEL = Path(__file__).parent / "model"
BUDGET: dict[str, Any] = dict(
    context=96, tokens=64, runtime=0
)  # runtime=0: the memory below is the model's alone, without Python and torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument(
        "--memory", default="2MiB", help="what the model may use; its weights take 2.5 MiB (default: 2MiB)"
    )
    arguments = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompt = tokenizer.encode(f"Q: {arguments.question}\nA:").ids
    with llm_sepweight.open(MODEL, layout=llama.layout) as weights:
        config = llama.Config.from_hf(weights.config)
        try:
            run = llm_partial_run.PartialRun(llama.parts(config), weights, memory=arguments.memory, **BUDGET)
        except ValueError as error:
            parser.error(str(error))
        with run:
            print(f"The plan, for {arguments.memory} beside what Python and torch use:\n\n{run.plan}\n")
            print(f"Q: {arguments.question}\nA:", end="", flush=True)
            start = time.perf_counter()
            answer = []
            steps = llm_sampler.sample(run.forward, [prompt], max_new_tokens=16, temperature=0, stop_ids=config.eos_ids)
            for piece in llm_sampler.stream_text(noted(steps, answer), tokenizer.decode):
                print(piece, end="", flush=True)
            seconds = time.perf_counter() - start
            streamed = logits(run, [*prompt, *answer])

        peak = llm_partial_run.format_bytes(llm_partial_run.peak_resident_set())
        read = llm_partial_run.format_bytes(run.stats.bytes_read)
        print(f"\n\n{len(answer)} tokens, {len(answer) / seconds:.0f} a second; {read} of weights read in "
              f"{run.stats.passes} passes; the whole process used {peak} at most.")  # fmt: skip

        with llm_partial_run.PartialRun(llama.parts(config), weights, memory="64MiB", **BUDGET) as resident:
            same = torch.equal(streamed, logits(resident, [*prompt, *answer]))
            print(f"With all weights resident ({llm_partial_run.format_bytes(resident.plan.streamed)} read per pass) "
                  f"the logits are {'the same, bit for bit' if same else 'DIFFERENT'}.")  # fmt: skip
    if not same:
        raise SystemExit(1)


def noted(steps, tokens: list[int]):
    """The steps as they come; what they sampled goes into `tokens`."""
    for step in steps:
        tokens.extend(step.tokens)
        yield step


def logits(run: llm_partial_run.PartialRun, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of all positions, computed from nothing."""
    return run.forward(torch.tensor([ids]))[0]


if __name__ == "__main__":
    main()
