"""Random bf16 Llama checkpoints of a given shape, in Hugging Face layout, written with little memory and no page cache.

python bench/checkpoint.py --shape 3b --dir bench/.checkpoints
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

BYTES_PER_SHARD = 2_000_000_000
ELEMENTS_PER_WRITE = 1 << 24
STD = 0.02


@dataclass(frozen=True)
class Shape:
    """What decides how many bytes a pass over a Llama touches (one key-value head per head)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocab: int

    @property
    def name(self) -> str:
        return f"llama-{self.layers}x{self.hidden}x{self.intermediate}-h{self.heads}-v{self.vocab}"

    @property
    def config(self) -> dict[str, object]:
        """The checkpoint's config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "initializer_range": STD,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Key and shape of every tensor, in the order in which they lie on disk."""
        d, f = self.hidden, self.intermediate
        yield "model.embed_tokens.weight", (self.vocab, d)
        for n in range(self.layers):
            layer = f"model.layers.{n}."
            yield layer + "input_layernorm.weight", (d,)
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield layer + f"self_attn.{projection}.weight", (d, d)
            yield layer + "post_attention_layernorm.weight", (d,)
            yield layer + "mlp.gate_proj.weight", (f, d)
            yield layer + "mlp.up_proj.weight", (f, d)
            yield layer + "mlp.down_proj.weight", (d, f)
        yield "model.norm.weight", (d,)
        yield "lm_head.weight", (self.vocab, d)

    @property
    def nbytes(self) -> int:
        return sum(2 * math.prod(shape) for _, shape in self.tensors())

    @property
    def touched(self) -> int:
        """Bytes that a decoding pass must touch: everything but the embedding, of which it needs one row a token."""
        return self.nbytes - 2 * self.vocab * self.hidden


SHAPES = {
    "3b": Shape(layers=26, hidden=3200, intermediate=8640, heads=32, vocab=32000),  # OpenLLaMA 3B, 6.85 GB
    "tiny": Shape(layers=6, hidden=512, intermediate=1376, heads=8, vocab=4096),
}


def write(shape: Shape, folder: Path, say: Callable[[str], object] = print) -> Path:
    """Write the checkpoint below `folder` unless it is there already; return its directory."""
    path = folder / shape.name
    shards = [
        (_file_name(i, n), tensors) for n in [len(list(_shards(shape)))] for i, tensors in enumerate(_shards(shape))
    ]
    if _complete(shape, path, shards):
        say(f"checkpoint  {path} ({shape.nbytes / 1e9:.2f} GB, already there)")
        return path
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").unlink(missing_ok=True)  # written last: a directory that has it is whole
    start = time.perf_counter()
    rng = np.random.default_rng(0)
    for file_name, tensors in shards:
        _write_shard(path / file_name, tensors, rng)
        say(f"checkpoint  {path / file_name} written, {time.perf_counter() - start:.0f} s")
    if len(shards) > 1:
        index = {key: file_name for file_name, tensors in shards for key in tensors}
        document = {"metadata": {"total_size": shape.nbytes}, "weight_map": index}
        (path / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))
    (path / "config.json").write_text(json.dumps(shape.config, indent=2))
    return path


def drop_page_cache(files: Iterable[Path]) -> None:
    """Ask the kernel to forget the files' clean pages, so that the next run pays for what it reads."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _shards(shape: Shape) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensors in order, packed into shards of at most BYTES_PER_SHARD: as in real checkpoints, a layer may span two."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for key, dims in shape.tensors():
        nbytes = 2 * math.prod(dims)
        if shard and size + nbytes > BYTES_PER_SHARD:
            yield shard
            shard, size = {}, 0
        shard[key] = dims
        size += nbytes
    yield shard


def _file_name(i: int, n: int) -> str:
    return "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"


def _complete(shape: Shape, path: Path, shards: list[tuple[str, dict[str, tuple[int, ...]]]]) -> bool:
    try:
        same = json.loads((path / "config.json").read_text()) == shape.config
        return same and all(
            (path / name).stat().st_size == len(header(tensors)) + sum(2 * math.prod(s) for s in tensors.values())
            for name, tensors in shards
        )
    except (OSError, ValueError):
        return False


def header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """The start of a safetensors file: length of the JSON (8 bytes), the JSON, blanks up to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, dims in tensors.items():
        nbytes = 2 * math.prod(dims)
        entries[key] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(file: Path, tensors: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    with open(file, "wb", buffering=0) as out:
        out.write(header(tensors))
        for dims in tensors.values():
            todo = math.prod(dims)
            while todo:
                count = min(todo, ELEMENTS_PER_WRITE)
                out.write(_bf16(np.ones(count, np.float32) if len(dims) == 1 else _uniform(rng, count)).data)
                os.fdatasync(out.fileno())  # only clean pages can be dropped
                os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                todo -= count


def _uniform(rng: np.random.Generator, count: int) -> np.ndarray:
    """Uniform numbers of standard deviation STD: as good as normal ones here, and several times as fast to make."""
    values = rng.random(count, dtype=np.float32)
    values -= 0.5
    values *= STD * math.sqrt(12)
    return values


def _bf16(values: np.ndarray) -> np.ndarray:
    """The upper half of float32, [n] uint16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a shape and the place of its checkpoint, for every script that needs one."""
    parser.add_argument("--shape", choices=SHAPES, default="3b", help="shape to start from (default 3b: 6.85 GB)")
    for field in ("layers", "hidden", "intermediate", "heads", "vocab"):
        parser.add_argument(f"--{field}", type=int, help=f"overrides the shape's {field}")
    parser.add_argument("--dir", type=Path, default=Path(__file__).parent / ".checkpoints", help="where it is written")


def shape_from(arguments: argparse.Namespace) -> Shape:
    shape = SHAPES[arguments.shape]
    return replace(shape, **{k: v for k in asdict(shape) if (v := getattr(arguments, k)) is not None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a random bf16 Llama checkpoint.")
    add_arguments(parser)
    arguments = parser.parse_args()
    write(shape_from(arguments), arguments.dir)
