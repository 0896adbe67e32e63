"""What goes between a remote model and its client: tensors as a safetensors file in memory, within time and size."""

from __future__ import annotations

import ctypes
import io
import json
import socket
import time
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._settings import REQUIRED, number

CONTENT_TYPE = "application/octet-stream"  # no web page can post it across origins unasked
LOGIT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

COUNT = number(REQUIRED, lambda v: v >= 1, "an integer >= 1", int)
SECONDS = number(REQUIRED, lambda v: 0 < v <= 1_000_000, "a number of seconds > 0, at most 1000000")

_CODES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32, "I64": torch.int64}
_NAMES = {dtype: code for code, dtype in _CODES.items()}
_HEADER_LIMIT = 1 << 16
_ROOM = memoryview(bytes(1 << 20))  # what a body grows by, ahead of what comes


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """As safetensors lays them out: length of the header (8 bytes, little-endian), header (JSON), data."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, at = [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # each at a multiple of its size
        plain = tensor.detach().cpu().contiguous()
        size = plain.numel() * plain.itemsize
        header[name] = {"dtype": _NAMES[plain.dtype], "shape": list(plain.shape), "data_offsets": [at, at + size]}
        parts.append(ctypes.string_at(plain.data_ptr(), size) if size else b"")
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def decode_tensors(body: bytearray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share the body's memory, and the metadata. Raises ValueError, saying what is wrong with the body."""
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > min(_HEADER_LIMIT, len(body) - 8):
        raise ValueError(f"a body of {len(body)} bytes does not begin with a header of tensors")
    try:
        header = json.loads(body[8 : 8 + size].decode())
        metadata = header.pop("__metadata__", {})
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("the header of the body is not that of tensors") from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata of the body is not text")
    tensors: dict[str, Tensor] = {}
    data = at = 8 + size
    for name, entry in entries:
        dtype, shape, offsets = _CODES.get(str(entry.get("dtype"))), entry.get("shape"), entry["data_offsets"]
        if dtype is None or not _whole(shape) or not _whole(offsets) or len(shape) > 8 or _beyond_torch(shape):
            raise ValueError(f"tensor {name!r} has dtype {entry.get('dtype')!r} and shape {shape!r}")
        nbytes = prod(shape) * dtype.itemsize
        if offsets != [at - data, at - data + nbytes] or at + nbytes > len(body) or (at - data) % dtype.itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape} does not lie where the header says, {offsets}")
        flat = (
            torch.frombuffer(body, dtype=dtype, count=prod(shape), offset=at) if nbytes else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
        at += nbytes
    if at != len(body):
        raise ValueError(f"the body has {len(body) - at} bytes more than its tensors")
    return tensors, metadata


def pack_logits(logits: Tensor, name: str) -> dict[str, Tensor]:
    """Logits [B, n, V] in the dtype of that name.

    float16 holds the distance to the highest logit, which itself goes as float32: the highest is exact, each other one
    is off by at most 2^-11 of its distance, or 2^-24, and stays below it; none overflows. What lies more than 65504 below
    becomes -inf.
    bfloat16 holds the logit itself, off by at most 2^-9 of it. float32, and a dtype that the logits have, lose nothing.
    """
    dtype = LOGIT_DTYPES[name]
    if dtype != torch.float16 or logits.dtype == dtype:
        return {"logits": logits.to(dtype)}
    logits = logits.float()
    highest = logits.amax(-1)
    highest = highest.where(highest.isfinite(), 0)  # so that NaN, inf and nothing but -inf arrive as they are
    highest = highest.where(highest != 0, -0.0)  # less this, a zero of either sign is 0.0
    distances = (logits - highest.unsqueeze(-1)).half()
    distances.view(torch.int16).clamp_(min=-0x7FFF)  # -0.0 is a distance that became too small: -2^-24
    return {"logits": distances, "highest": highest}


def unpack_logits(tensors: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, n, V] as `pack_logits` was given them: float32, or the dtype they came in where nothing was taken away."""
    if "highest" not in tensors:
        return tensors["logits"]
    return tensors["logits"].float().add_(tensors["highest"].unsqueeze(-1))


def received(stream: Any, size: int) -> bytearray:
    """The next `size` bytes of a stream, or what there is of them; they take memory as they come, not as was announced."""
    body, at = bytearray(), 0
    while at < size:
        if at == len(body):
            body += _ROOM[: size - at]
        with memoryview(body) as view:
            got = stream.readinto(view[at:])
        if not got:
            break
        at += got
    del body[at:]
    return body


class BoundedSocket(io.RawIOBase):
    """Reads and writes a socket until `deadline` (time.monotonic()), however slowly the bytes drip."""

    def __init__(self, connection: socket.socket, deadline: float):
        self._connection = connection
        self._raw = connection.makefile("rwb", buffering=0)
        self.deadline = deadline

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        self._wait_no_longer()
        return self._raw.readinto(buffer)

    def write(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        self._wait_no_longer()
        return self._raw.write(buffer)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()

    def _wait_no_longer(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(left)


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _beyond_torch(shape: list[int]) -> bool:
    """Whether its strides would overflow, which are counted as if no size were 0."""
    return prod(max(size, 1) for size in shape) >= 1 << 63
