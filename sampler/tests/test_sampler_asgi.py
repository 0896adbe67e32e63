"""The ASGI application answers as the server of the standard library does; driven here as an ASGI server drives it."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampler import asgi_app
from llm_sampler._wire import CONTENT_TYPE, decode_tensors, encode_tensors


def forward(ids: Tensor) -> Tensor:
    return torch.nn.functional.one_hot((ids + 1) % 11, 11).float()


def request(n: str = "1") -> bytes:
    tensors = {"input_ids": torch.tensor([[1, 2]]).int(), "lengths": torch.tensor([2]).int()}
    return encode_tensors(tensors, {"n": n, "dtype": "float32"})


async def exchange(
    app: Any, messages: list[dict], method: str = "POST", path: str = "/last_logits", **headers: str
) -> Any:
    """Status and body; messages are what the client sends, and where they end it sends nothing more."""
    named = {"content-type": CONTENT_TYPE, **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }
    left, sent = list(messages), []

    async def receive() -> dict:
        if not left:
            await asyncio.sleep(3600)
        return left.pop(0)

    async def send(message: dict) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if not sent:
        return None
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(sent[1]["body"])).encode()
    return sent[0]["status"], sent[1]["body"]


def body(*parts: bytes) -> list[dict]:
    return [{"type": "http.request", "body": part, "more_body": i + 1 < len(parts)} for i, part in enumerate(parts)]


def test_it_answers_alone_or_mounted_however_the_body_is_cut() -> None:
    app = asgi_app(forward)
    whole = request()
    for path in ("/last_logits", "/models/small/last_logits"):
        status, answer = asyncio.run(exchange(app, body(whole[:9], whole[9:], b""), path=path))
        assert status == 200
        assert int(decode_tensors(bytearray(answer))[0]["logits"].argmax()) == 3
    status, answer = asyncio.run(exchange(app, body(b""), "GET", "/models/small/"))
    assert json.loads(answer)["vocab_size"] == 11


def test_it_refuses_what_the_other_server_refuses() -> None:
    app = asgi_app(forward, token="secret", max_bytes=500, timeout=0.2)
    right = {"authorization": "Bearer secret"}
    assert asyncio.run(exchange(app, body(request())))[0] == 401
    assert asyncio.run(exchange(app, body(request()), authorization="Bearer wrong"))[0] == 401
    assert asyncio.run(exchange(app, body(request()), **right))[0] == 200
    assert asyncio.run(exchange(app, body(b"garbage"), **right))[0] == 400
    assert asyncio.run(exchange(app, body(request("9")), **right))[0] == 400
    assert asyncio.run(exchange(app, body(b""), path="/x", **right))[0] == 404
    assert asyncio.run(exchange(app, [], content_length="501", **right))[0] == 413
    assert asyncio.run(exchange(app, body(*[bytes(100)] * 6), **right))[0] == 413, "without a length too"
    assert asyncio.run(exchange(app, body(b"x", b"y")[:1], **right))[0] == 408
    assert asyncio.run(exchange(app, [{"type": "http.disconnect"}], **right)) is None


def test_more_requests_than_may_wait_are_told_to_come_back() -> None:
    go = threading.Event()

    def slow(ids: Tensor) -> Tensor:
        assert first.pop() or go.wait(10)
        return forward(ids)

    first = [False, False, True]  # the one that learns the vocabulary does not wait
    app = asgi_app(slow, max_waiting=2)

    async def run() -> list[int]:
        waiting = [asyncio.create_task(exchange(app, body(request()))) for _ in range(2)]
        await asyncio.sleep(0.1)
        third = await exchange(app, body(request()))
        go.set()
        return [third[0], *(status for status, _ in await asyncio.gather(*waiting))]

    assert asyncio.run(run()) == [503, 200, 200]


def test_it_starts_and_stops_with_its_server_and_serves_http_only() -> None:
    app = asgi_app(forward)
    sent = []

    async def run() -> None:
        events = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive() -> dict:
            return {"type": next(events)}

        async def send(message: dict) -> None:
            sent.append(message["type"])

        await app({"type": "lifespan"}, receive, send)

    asyncio.run(run())
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    with pytest.raises(ValueError, match="websocket"):
        asyncio.run(app({"type": "websocket"}, None, None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_waiting": -1}, "max_waiting is -1; it must be an integer >= 1"),
        ({"timeout": "x"}, "timeout is 'x'; it must be a number of seconds > 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"max_bytes": 0}, "max_bytes is 0"),
    ],
)
def test_bad_arguments_are_named_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asgi_app(forward, **options)
