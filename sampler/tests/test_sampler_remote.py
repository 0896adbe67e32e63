"""A remote model is sampled and scored as a local one; a server that fails is named, and never waited for too long."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_sampler import RemoteError, from_url, generate, multiple_choice, score, serve
from llm_sampler._wire import encode_tensors

TABLE = torch.randn(23, 11, generator=torch.Generator().manual_seed(2)) * 3
CONTINUATIONS = [[1], [2], [3, 4], [3, 5], [3, 4, 6]]


def forward(ids: Tensor) -> Tensor:
    return TABLE[((ids + 1) * torch.arange(1, ids.shape[1] + 1)).cumsum(-1) % 23]


class LastOnly:
    def __init__(self) -> None:
        self.calls: list[tuple[tuple, int]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        raise AssertionError("asked for all logits")

    def last_logits(self, ids: Tensor, lengths: Tensor, n: int) -> Tensor:
        self.calls.append((tuple(ids.shape), n))
        return torch.stack([row[end - n : end] for row, end in zip(forward(ids), lengths.tolist(), strict=True)])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(forward) as server:
        yield server.url


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_logits_arrive_within_what_the_dtype_takes(url: str, dtype: str) -> None:
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    with from_url(url, dtype=dtype) as remote:
        assert remote.vocab_size == 11
        logits = remote(ids).float()
        last = remote.last_logits(ids, torch.tensor([3, 2]), 2).float()
    tolerance = {"float16": 1e-2, "bfloat16": 5e-2, "float32": 0}[dtype]
    torch.testing.assert_close(logits, forward(ids), atol=tolerance, rtol=0)
    torch.testing.assert_close(last[1], forward(ids)[1, :2], atol=tolerance, rtol=0)


def test_text_from_a_remote_model_is_that_of_the_local_one(url: str) -> None:
    options: dict[str, Any] = dict(
        max_new_tokens=[9, 14], temperature=[0, 0.8], top_k=5, repetition_penalty=1.2, seed=3
    )
    with from_url(url, dtype="float32") as exact, from_url(url) as half:
        local = generate(forward, [[1, 2, 3], [4]], **options)
        assert [row.tokens for row in generate(exact, [[1, 2, 3], [4]], **options)] == [row.tokens for row in local]
        [greedy] = generate(half, [[1, 2, 3]], max_new_tokens=30, temperature=0)
    assert greedy.tokens == generate(forward, [[1, 2, 3]], max_new_tokens=30, temperature=0)[0].tokens


def test_scores_are_gathered_where_the_model_is_and_lose_nothing(url: str) -> None:
    with from_url(url) as remote:
        asked = []
        exchange = remote._asked
        remote._asked = lambda *call: asked.append((call[1], len(exchange(*call)))) or exchange(*call)  # type: ignore[method-assign]
        results = score(remote, [[1, 2], [3]], [CONTINUATIONS, CONTINUATIONS])
        assert (
            multiple_choice(remote, [1, 2], CONTINUATIONS).index
            == multiple_choice(forward, [1, 2], CONTINUATIONS).index
        )
    for ours, local in zip(results, score(forward, [[1, 2], [3]], [CONTINUATIONS, CONTINUATIONS]), strict=True):
        for result, expected in zip(ours, local, strict=True):
            assert result.logprobs == pytest.approx(expected.logprobs, abs=1e-6)
            assert result.is_greedy == expected.is_greedy
    assert {path for path, _ in asked} == {"/gather_logprobs"}


def test_the_server_asks_its_model_for_the_last_logits_only() -> None:
    model = LastOnly()
    with serve(model) as server, from_url(server.url) as remote:
        generate(remote, [[1, 2, 3], [4]], max_new_tokens=2, seed=0)
        score(remote, [1, 2], [[3], [4]])
    assert model.calls == [((1, 1), 1), ((2, 3), 1), ((2, 4), 1), ((1, 2), 1)]


def test_a_remote_model_can_be_served_on() -> None:
    with serve(forward) as first, from_url(first.url) as near, serve(near) as second, from_url(second.url) as far:
        assert score(far, [1], [[2]])[0].logprobs == score(near, [1], [[2]])[0].logprobs
        torch.testing.assert_close(far(torch.tensor([[1, 2]])), forward(torch.tensor([[1, 2]])), atol=1e-2, rtol=0)


def test_many_threads_may_share_one_client(url: str) -> None:
    results: dict[int, Tensor] = {}
    with from_url(url, dtype="float32") as remote:

        def ask(token: int) -> None:
            results[token] = remote(torch.tensor([[token, token]]))

        threads = [threading.Thread(target=ask, args=(token,)) for token in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for token in range(8):
        assert torch.equal(results[token], forward(torch.tensor([[token, token]])))


def test_what_the_server_refuses_comes_with_its_reason(url: str) -> None:
    with from_url(url) as remote:
        with pytest.raises(RemoteError, match="400: input_ids: row 1 holds the id 11 at position 1.*tokenizer"):
            remote(torch.tensor([[1, 2], [3, 11]]))
        with pytest.raises(
            RemoteError, match="400: logits of the last 3 positions are asked for, and row 0 has 2 tokens"
        ):
            remote.last_logits(torch.tensor([[1, 2]]), torch.tensor([2]), 3)
        assert remote(torch.tensor([[1]])).shape == (1, 1, 11), "and the connection goes on"


def test_a_model_that_raises_is_told_and_the_server_goes_on() -> None:
    def moody(ids: Tensor) -> Tensor:
        if int(ids[0, 0]) == 5:
            raise RuntimeError("CUDA out of memory")
        return forward(ids)

    with serve(moody) as server, from_url(server.url) as remote:
        with pytest.raises(RemoteError, match="500: the forward function raised RuntimeError: CUDA out of memory"):
            remote(torch.tensor([[5]]))
        assert remote(torch.tensor([[1]])).shape == (1, 1, 11)


def test_logits_of_a_remote_model_that_are_not_finite_are_an_error_as_of_a_local_one() -> None:
    with serve(lambda ids: forward(ids).masked_fill((ids == 5).unsqueeze(-1), math.nan)) as server:
        with from_url(server.url) as remote, pytest.raises(ValueError, match="nan"):
            generate(remote, [[5]], max_new_tokens=1)
        with from_url(server.url) as remote, pytest.raises(ValueError, match="row 0 met logits that are NaN"):
            score(remote, [5], [[1]])


def test_a_token_is_needed_where_the_server_has_one() -> None:
    with serve(forward, token="secret") as server:
        for wrong in (None, "Secret", "secre", "secret "):
            with pytest.raises(RemoteError, match="401.*give its token="):
                from_url(server.url, token=wrong)
        with from_url(server.url, token="secret") as remote:
            assert remote(torch.tensor([[1]])).shape == (1, 1, 11)


def test_a_connection_that_the_server_closed_while_idle_is_opened_again() -> None:
    with serve(forward, timeout=0.2) as server, from_url(server.url, retries=0) as remote:
        time.sleep(0.6)
        assert remote(torch.tensor([[1]])).shape == (1, 1, 11)


def test_a_server_that_comes_back_is_found_again() -> None:
    server = serve(forward)
    port = int(server.url.rpartition(":")[2])
    with from_url(server.url, timeout=20, retries=8) as remote:
        server.close()
        later = threading.Timer(0.5, lambda: started.append(serve(forward, port=port)))
        started: list[Any] = []
        later.start()
        try:
            assert remote(torch.tensor([[1]])).shape == (1, 1, 11)
        finally:
            later.join()
            started[0].close()


# Servers that are none


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
    "info",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"protocol": 2, "vocab_size": 5}',
        b'{"protocol": 1, "vocab_size": "5"}',
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


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("127.0.0.1:80", {}),
        ("ftp://127.0.0.1", {}),
        ("http://", {}),
        ("http://user:password@127.0.0.1", {}),
        ("http://127.0.0.1:1", {"dtype": "float8"}),
        ("http://127.0.0.1:1", {"timeout": 0}),
        ("http://127.0.0.1:1", {"retries": -1}),
        ("http://127.0.0.1:1", {"max_bytes": 0}),
        ("http://127.0.0.1:1", {"token": "a\r\nx: y"}),
    ],
)
def test_bad_arguments_are_named(url: str, options: dict) -> None:
    with pytest.raises(ValueError, match="url is|dtype is|timeout is|token must"):
        from_url(url, **options)
