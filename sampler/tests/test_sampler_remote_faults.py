"""A server that lies, stalls or is not one at all is named, and never waited for too long."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import torch

from llm_sampler import RemoteError, from_url
from llm_sampler._wire import encode_tensors

INFO = json.dumps({"protocol": 1, "vocab_size": 11, "max_bytes": 1 << 20, "max_tokens": 99}).encode()


def http(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    lines = {"content-length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
    return (f"HTTP/1.1 {status}\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode() + body


def whole_request(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(1 << 16):
        data += part
        head, end, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if end and len(body) >= int(length[1] if length else 0):
            return data
    return b""


@contextlib.contextmanager
def scripted(*answers: bytes | Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers its requests with these, one after the other, on however many connections; then nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    left, seen, connections = list(answers), [], [listener]

    def run() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                with contextlib.suppress(OSError), connection:
                    while request := whole_request(connection):
                        seen.append(request)
                        answer = left.pop(0) if left else b""
                        if callable(answer):
                            answer(connection)
                            break
                        connection.sendall(answer)
                        if not answer:
                            break

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        thread.join(5)
        assert not thread.is_alive()


def stall(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.recv(1)


def drip(connection: socket.socket) -> None:
    """One byte at a time: no single wait is long."""
    with contextlib.suppress(OSError):
        for byte in http(b"x" * 500):
            connection.sendall(bytes([byte]))
            time.sleep(0.05)


def half_a_body_then_stall(connection: socket.socket) -> None:
    connection.sendall(http(b"x" * 500)[:-100])
    stall(connection)


@pytest.mark.parametrize("answer", [stall, drip, half_a_body_then_stall])
def test_a_server_that_stalls_is_left_at_the_deadline(answer: Callable) -> None:
    with scripted(answer) as (url, _):
        start = time.monotonic()
        with pytest.raises(RemoteError, match="did not answer within 0.5 s"):
            from_url(url, timeout=0.5)
        assert time.monotonic() - start < 2


GOOD = {"logits": torch.zeros(1, 1, 11)}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200, "does not speak HTTP"),
        (b"HTTP/1.1 " + b"9" * 70000, "does not speak HTTP"),
        (http(b"", "301 Moved", location="http://elsewhere/"), "moved to 'http://elsewhere/'"),
        (http(b"<html>", "404 Not Found"), "404: and gave no reason; check the address"),
        (http(b"[" * 9999, "418 Teapot"), "418"),
        (http(b"hello"), "answered no tensors"),
        (http(encode_tensors({"logits": torch.zeros(1, 1, 12)})), r"\[1, 1, 12\]; \[1, 1, 11\] are needed"),
        (http(encode_tensors({"logits": torch.zeros(1, 1, 11).int()})), "torch.int32"),
        (http(encode_tensors({"other": torch.zeros(1)})), "answered logits: none"),
        (http(encode_tensors({**GOOD, "highest": torch.zeros(3)})), r"highest: torch.float32 \[3\]"),
        (http(b"", content_length=1 << 40), "1099511627776 bytes, more than max_bytes"),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"fffff\r\n" + b"x" * 0xFFFFF,
            "more than max_bytes",
        ),
    ],
)
def test_a_server_that_lies_is_named(answer: bytes, message: str) -> None:
    with scripted(http(INFO), answer) as (url, _), from_url(url, timeout=5, max_bytes=1 << 19) as remote:
        with pytest.raises(RemoteError, match=message) as raised:
            remote(torch.tensor([[1]]))
        assert url in str(raised.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (http(b"x" * 99, content_length=1 << 29), "broke off: IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n20000000\r\n" + b"x" * 99, "broke off: IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 99, "answered no tensors"),
    ],
    ids=["length", "chunk", "until it ends"],
)
def test_a_reply_takes_memory_as_it_comes_and_not_as_it_is_announced(answer: bytes, message: str) -> None:
    def told(connection: socket.socket) -> None:
        connection.sendall(answer)

    with scripted(http(INFO), told) as (url, _), from_url(url, retries=0) as remote:
        tracemalloc.start()
        try:
            with pytest.raises(RemoteError, match=message):
                remote(torch.tensor([[1]]))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    "info",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"protocol": 2, "vocab_size": 5}',
        b'{"protocol": 1, "vocab_size": "5"}',
        b'{"protocol": 1, "vocab_size": 5, "max_length": 0}',
        b"[" * 9999,
    ],
)
def test_an_address_of_something_else_is_named_at_once(info: bytes) -> None:
    with scripted(http(info)) as (url, _), pytest.raises(RemoteError, match="check the address"):
        from_url(url)


def test_what_is_over_in_a_moment_is_asked_again_and_the_rest_is_not() -> None:
    good = http(encode_tensors(GOOD))
    busy = http(b'{"error": "busy"}', "503 Busy")
    broken = http(b"x" * 99)[:-9]  # and the end of the connection

    def break_off(connection: socket.socket) -> None:
        connection.sendall(broken)

    with scripted(http(INFO), busy, break_off, good) as (url, seen), from_url(url, timeout=9) as remote:
        assert remote(torch.tensor([[1]])).shape == (1, 1, 11)
        assert len(seen) == 4
    with scripted(http(INFO), *[busy] * 9) as (url, seen), from_url(url, retries=2, timeout=9) as remote:
        with pytest.raises(RemoteError, match=r"503: busy \(asked 3 times\)"):
            remote(torch.tensor([[1]]))
        assert len(seen) == 4
    with scripted(http(INFO), http(b'{"error": "no"}', "400 Bad")) as (url, seen), from_url(url) as remote:
        with pytest.raises(RemoteError, match="400: no"):
            remote(torch.tensor([[1]]))
        assert len(seen) == 2


def test_a_server_that_asks_for_too_much_patience_is_not_waited_for() -> None:
    with scripted(http(INFO), http(b"", "503 Busy", retry_after=3600)) as (url, _), from_url(url, timeout=1) as remote:
        start = time.monotonic()
        with pytest.raises(RemoteError, match="503"):
            remote(torch.tensor([[1]]))
        assert time.monotonic() - start < 2


def test_nobody_at_the_address_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RemoteError, match=f"127.0.0.1:{port} cannot be reached.*asked 2 times"):
        from_url(f"http://127.0.0.1:{port}", retries=1)
