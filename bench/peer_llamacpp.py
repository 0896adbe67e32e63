"""The decode with llama.cpp, which maps a GGUF file into memory: `prepare` writes it, in bf16, from the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

import worker

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
SILENT = llama_cpp.llama_log_callback(lambda level, text, data: None)


def load(job: worker.Job) -> tuple[worker.Decode, Callable[[], dict[str, Any]]]:
    llama_cpp.llama_log_set(SILENT, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(_gguf(job).encode(), llama_cpp.llama_model_default_params())
    rows = len(job.prompts)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = rows * job.context, rows
    params.n_threads = params.n_threads_batch = worker.threads()
    params.n_batch = params.n_ubatch = max(512, rows * len(job.prompts[0]))
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise MemoryError("llama.cpp could not make its context")
    return _decode(model, context, job), dict


def _decode(model: Any, context: Any, job: worker.Job) -> worker.Decode:
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(sum(map(len, job.prompts)), 0, 1)
    tokens, position = job.prompts, 0
    while True:
        batch.n_tokens, last = 0, []
        for row, new in enumerate(tokens):
            for i, token in enumerate(new):
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = token, position + i, 1, row
                batch.logits[at] = i == len(new) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        position += len(tokens[0])
        logits = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocab,)) for i in last]
        tokens = [[int(row.argmax())] for row in logits]
        yield [token for (token,) in tokens]


def convert(job: worker.Job) -> None:
    path = Path(_gguf(job))
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads(Path(job.checkpoint, "config.json").read_text())
    heads = config["num_attention_heads"]
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")  # token ids come from outside
    tensors = list(_tensors(job.checkpoint))
    for key, _, _, shape in tensors:
        norm = len(shape) == 1
        kind = gguf.GGMLQuantizationType.F32 if norm else gguf.GGMLQuantizationType.BF16
        dtype = np.dtype(np.float32 if norm else np.uint16)
        writer.add_tensor_info(_name(key), shape, dtype, int(np.prod(shape)) * dtype.itemsize, kind)
    unfinished = path.with_suffix(".part")
    writer.write_header_to_file(unfinished)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, file, offset, shape in tensors:
        bits = np.fromfile(file, np.uint16, int(np.prod(shape)), offset=offset).reshape(shape)
        if len(shape) == 1:
            bits = (bits.astype(np.uint32) << 16).view(np.float32)
        elif ".q_proj." in key or ".k_proj." in key:
            # llama.cpp turns neighbouring pairs where Hugging Face turns both halves of a head: [head, 2, half] -> [head, half, 2]
            bits = np.ascontiguousarray(bits.reshape(heads, 2, -1, shape[1]).swapaxes(1, 2)).reshape(shape)
        writer.write_tensor_data(bits)
        writer.flush()
        _forget(file, unfinished)
    writer.close()
    unfinished.rename(path)


def _tensors(checkpoint: str) -> Iterator[tuple[str, Path, int, tuple[int, ...]]]:
    """Key, file, offset in it and shape of every tensor."""
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for key, entry in header.items():
            if key != "__metadata__":
                yield key, file, 8 + length + entry["data_offsets"][0], tuple(entry["shape"])


def _name(key: str) -> str:
    if not key.startswith("model.layers."):
        return NAMES[key]
    number, name = key.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{NAMES[name]}"


def _gguf(job: worker.Job) -> str:
    return os.path.join(job.copy, "model-bf16.gguf")


def _forget(*files: Path) -> None:
    """Keep the copying out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


if __name__ == "__main__":
    worker.serve(load, prepare=convert)
