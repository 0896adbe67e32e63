"""A forward function for others, as an application for an ASGI server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import torch

from ._forward import ForwardFunc
from ._service import RequestError, Service, refusal
from ._settings import plain
from ._wire import COUNT, SECONDS


def asgi_app(
    forward_func: ForwardFunc,
    *,
    token: str | None = None,
    device: torch.device | str = "cpu",
    max_bytes: int = 1 << 28,
    max_tokens: int = 1 << 17,
    max_waiting: int = 32,
    timeout: float = 60.0,
) -> Callable[[Any, Any, Any], Awaitable[None]]:
    """The same as `serve`, as an application for an ASGI server (uvicorn, hypercorn, ...), alone or mounted.

    max_waiting: how many requests may wait for the forward; others are told to come back. Arguments as in `serve`; who
    may connect, and how, is the server's business.
    """
    max_waiting = COUNT.parse("max_waiting", plain(max_waiting))
    timeout = SECONDS.parse("timeout", plain(timeout))
    service = Service(
        forward_func,
        token=token,
        max_bytes=max_bytes,
        max_tokens=max_tokens,
        device=device,
    )

    waiting = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal waiting
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": message["type"] + ".complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            raise ValueError(f"an ASGI scope of type {scope['type']!r} is not served; only http is")
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            service.admit(scope["method"], scope["path"], headers)
            body = await asyncio.wait_for(_received(receive, service.max_bytes), timeout)
            if waiting >= max_waiting:
                raise RequestError(503, "too many requests are waiting")
            waiting += 1
            try:
                reply = await asyncio.to_thread(service.answer, scope["path"], body)
            finally:
                waiting -= 1
        except RequestError as refused:
            reply = refusal(refused)
        except asyncio.TimeoutError:
            reply = refusal(RequestError(408, f"the request did not arrive within {timeout} s"))
        except ConnectionError:
            return  # the client is gone
        named = {**reply.headers, "content-length": str(len(reply.body))}
        pairs = [(name.encode(), value.encode()) for name, value in named.items()]
        await send({"type": "http.response.start", "status": reply.status, "headers": pairs})
        await send({"type": "http.response.body", "body": reply.body})

    return app


async def _received(receive: Any, max_bytes: int) -> bytearray:
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionAbortedError
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > max_bytes:
            raise RequestError(413, f"the body is more than max_bytes={max_bytes}")
    return body
