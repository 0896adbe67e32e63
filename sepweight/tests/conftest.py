"""A small checkpoint with everything that is special about one, and its layout."""

from __future__ import annotations

import json
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

CONFIG = {"model_type": "tiny", "hidden_size": 24, "rope_theta": 1e4}
Place = tuple[Any, ...]


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"embed.weight": random(1000, 24), "norm.weight": random(24, dtype=torch.float32)}
    for layer in range(3):
        tensors[f"layers.{layer}.up.weight"] = random(96, 24)
        tensors[f"layers.{layer}.down.weight"] = random(24, 96)
        tensors[f"layers.{layer}.scale"] = random(dtype=torch.float32)
        tensors[f"layers.{layer}.nothing"] = random(0, 24)
        tensors[f"layers.{layer}.inv_freq"] = random(12, dtype=torch.float32)
        for expert in range(2):
            tensors[f"layers.{layer}.experts.{expert}.weight"] = random(9, 24, dtype=torch.float16)
    return tensors


def _layout(key: str, config: Mapping[str, Any]) -> list[Place]:
    assert config == CONFIG
    if key == "embed.weight":
        return [("begin", "embed.weight"), ("end", "head.weight")]
    if key == "norm.weight":
        return [("end", key)]
    _, layer, *rest = key.split(".")
    part = f"mid.{int(layer):05d}"
    if rest == ["inv_freq"]:
        return []
    if rest[0] == "experts":
        return [(part, "experts.weight", int(rest[1]))]
    return [(part, ".".join(rest))]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return _tensors()


@pytest.fixture
def layout() -> Callable[[str, Mapping[str, Any]], list[Place]]:
    return _layout


@pytest.fixture
def expected(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """What each part must hold."""
    parts: dict[str, dict[str, torch.Tensor]] = {"begin": {"embed.weight": tensors["embed.weight"]}}
    for layer in range(3):
        own = {key.removeprefix(f"layers.{layer}."): t for key, t in tensors.items() if f"layers.{layer}." in key}
        experts = torch.stack([own.pop("experts.0.weight"), own.pop("experts.1.weight")])
        own.pop("inv_freq")
        parts[f"mid.{layer:05d}"] = {**own, "experts.weight": experts}
    parts["end"] = {"norm.weight": tensors["norm.weight"], "head.weight": tensors["embed.weight"]}
    return parts


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The checkpoint in two shards with an index; layer 1 lies in both."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    keys = list(tensors)
    cut = keys.index("layers.1.scale")
    weight_map = {}
    for number, chosen in enumerate((keys[:cut], keys[cut:]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in chosen}, directory / name)
        weight_map |= dict.fromkeys(chosen, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@dataclass(frozen=True)
class Asked:
    """What a RangeServer was asked for."""

    path: str
    name: str
    headers: Message


class Request(BaseHTTPRequestHandler):
    """A request to a RangeServer, and those that follow on the same connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body waits for nothing
    server: RangeServer

    def do_GET(self) -> None:
        self.name = self.path.split("?")[0].rsplit("/", 1)[-1]
        self.server.requests.append(Asked(self.path, self.name, self.headers))
        try:
            if not self.server.trick(self):
                self.serve()
        except ConnectionError:  # whoever asked has gone
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def serve(self) -> None:
        """As a good server does: 206 for a range, unless If-Range speaks of another version."""
        file = self.server.directory / self.name
        if not file.is_file():
            return self.answer(404)
        data = file.read_bytes()
        etag = f'"{zlib.crc32(data):08x}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or self.headers.get("If-Range", etag) != etag:
            return self.answer(200, data, ETag=etag)
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
        if start >= len(data):
            return self.answer(416)
        self.answer(206, data[start:stop], ETag=etag, Content_Range=f"bytes {start}-{stop - 1}/{len(data)}")

    def answer(self, status: int, body: bytes = b"", **headers: str | None) -> None:
        """Send this; a header that is None is left out."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.server.sent += len(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class RangeServer(ThreadingHTTPServer):
    """Serves the files of one directory under any path. trick(request) may answer in its place, and then gives True."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.directory = directory
        self.url = f"http://127.0.0.1:{self.server_port}/model"
        self.requests: list[Asked] = []
        self.sent = 0  # bytes of bodies
        self.trick: Callable[[Request], object] = lambda request: False


@pytest.fixture
def serve() -> Iterator[Callable[[Path], RangeServer]]:
    """serve(directory) starts a web server."""
    servers: list[RangeServer] = []

    def start(directory: Path) -> RangeServer:
        server = RangeServer(directory)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
