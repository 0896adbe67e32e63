"""The decode with AirLLM, which reads its own copy of the checkpoint: one file per layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import airllm  # pyright: ignore[reportMissingImports]
import torch
from airllm.utils import find_or_create_local_splitted_path  # pyright: ignore[reportMissingImports]

import worker
from peer_accelerate import decode


def load(job: worker.Job) -> tuple[worker.Decode, Callable[[], dict[str, Any]]]:
    torch.set_num_threads(worker.threads())
    airllm.AirLLMBaseModel.get_tokenizer = lambda self, hf_token=None: (
        None
    )  # the checkpoint has none, and ids are given
    model = airllm.AutoModel.from_pretrained(job.checkpoint, device="cpu", layer_shards_saving_path=job.copy)
    return decode(model, job), dict


def split(job: worker.Job) -> None:
    find_or_create_local_splitted_path(job.checkpoint, job.copy, layer_names=NAMES)


NAMES = {"embed": "model.embed_tokens", "layer_prefix": "model.layers", "norm": "model.norm", "lm_head": "lm_head"}

if __name__ == "__main__":
    worker.serve(load, prepare=split)
