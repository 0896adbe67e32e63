"""One piece of work on weights in files, measured: sepweight_worker.py WORK PATH [DESTINATION]. Prints JSON."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

PAGE = 4096


def split(checkpoint: str, destination: str) -> int:
    import llm_llama_model as llama
    import llm_sepweight

    llm_sepweight.split(checkpoint, destination, layout=llama.layout)
    return sum(file.stat().st_size for file in _files(destination))


def verify(directory: str) -> int:
    import llm_sepweight

    if damaged := llm_sepweight.verify(directory):
        sys.exit(f"damaged: {damaged}")
    return sum(file.stat().st_size for file in _files(directory))


def buffer_for(directory: str) -> mmap.mmap:
    """Memory for the largest part, in huge pages, touched before: as plain reads have it."""
    import llm_sepweight

    with llm_sepweight.open(directory) as weights:
        size = max(weights.buffer_nbytes(part) for part in weights.parts)
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    buffer.write(bytes(size))
    return buffer


def load_into(directory: str, buffer: mmap.mmap, **options: Any) -> Iterator[Iterable[torch.Tensor]]:
    import llm_sepweight

    with llm_sepweight.open(directory, **options) as weights:
        for part in weights.parts:
            yield weights.load(part, into=buffer).values()


def load_file(directory: str) -> Iterator[Iterable[torch.Tensor]]:
    from safetensors.torch import load_file

    for file in _files(directory):
        yield map(_touched, load_file(file).values())


def safe_open(directory: str) -> Iterator[Iterable[torch.Tensor]]:
    from safetensors import safe_open

    for file in _files(directory):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield [_touched(opened.get_tensor(name))]


def runai(directory: str) -> Iterator[Iterable[torch.Tensor]]:
    from runai_model_streamer import SafetensorsStreamer  # pyright: ignore[reportMissingImports]

    with SafetensorsStreamer() as streamer:
        for file in _files(directory):
            streamer.stream_file(str(file))
            for _, tensor in streamer.get_tensors():
                yield [tensor]


MODULES = {  # imported before the clock starts
    "split": ("llm_sepweight", "llm_llama_model"),
    "verify": ("llm_sepweight",),
    "load(part, into=)": ("llm_sepweight",),
    "load, verify=lazy": ("llm_sepweight",),
    "safetensors load_file": ("safetensors.torch",),
    "safetensors safe_open": ("safetensors.torch",),
    "runai-model-streamer": ("runai_model_streamer",),
}


def read(reader: Callable[..., Iterator[Iterable[torch.Tensor]]], directory: str, *ready: mmap.mmap) -> int:
    nbytes = 0
    for tensors in reader(directory, *ready):
        for tensor in tensors:
            nbytes += tensor.nbytes
    return nbytes


def _touched(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, read: safetensors only maps a file, and each page of it is read when it is touched."""
    tensor.reshape(-1).view(torch.uint8)[::PAGE].sum()
    return tensor


READY = {
    "load(part, into=)": buffer_for,
    "load, verify=lazy": buffer_for,
}  # what it works with, made before the clock starts
WORK: dict[str, Callable[..., int]] = {
    "split": split,
    "verify": verify,
    "load(part, into=)": partial(read, load_into),
    "load, verify=lazy": partial(read, partial(load_into, verify="lazy")),
    "safetensors load_file": partial(read, load_file),
    "safetensors safe_open": partial(read, safe_open),
    "runai-model-streamer": partial(read, runai),
}


def _files(directory: str) -> list[Path]:
    return sorted(Path(directory).glob("*.safetensors"))


def _resident_set() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    work, *paths = sys.argv[1:]
    for module in MODULES[work]:
        importlib.import_module(module)
    runtime = _resident_set()
    ready = [READY[work](*paths)] if work in READY else []
    start = time.perf_counter()
    nbytes = WORK[work](*paths, *ready)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "nbytes": nbytes, "runtime": runtime, "peak": peak}))


if __name__ == "__main__":
    main()
