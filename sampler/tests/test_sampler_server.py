"""The server answers its clients, whatever others send to it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_sampler import from_url, serve
from llm_sampler._wire import CONTENT_TYPE, decode_tensors, encode_tensors

LIMIT = 1 << 16
VAST = json.dumps({"input_ids": {"dtype": "I32", "shape": [1 << 47] * 7 + [0], "data_offsets": [0, 0]}}).encode()
HEAD = {"content-type": CONTENT_TYPE}


def forward(ids: Tensor) -> Tensor:
    return torch.nn.functional.one_hot((ids + 1) % 11, 11).float()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(forward, max_bytes=LIMIT, max_tokens=500, timeout=5) as server:
        yield server.url


@pytest.fixture(autouse=True)
def _still_serves(url: str) -> Iterator[None]:
    yield
    with from_url(url) as remote:
        assert remote(torch.tensor([[1]])).argmax().item() == 2


def ask(url: str, method: str, path: str, body: bytes = b"", headers: dict | None = None) -> tuple[int, dict | bytes]:
    connection = http.client.HTTPConnection(*address(url), timeout=10)
    connection.request(method, path, body, HEAD if headers is None else headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, json.loads(data) if response.headers["content-type"] == "application/json" else data


def address(url: str) -> tuple[str, int]:
    return urlsplit(url).hostname or "", urlsplit(url).port or 0


def raw(url: str, data: bytes, wait: float = 10) -> bytes:
    """What comes back on a connection of its own until the server ends it."""
    with socket.create_connection(address(url), timeout=wait) as connection:
        connection.sendall(data)
        out = b""
        while part := connection.recv(1 << 16):
            out += part
        return out


def request(ids: object = ((1, 2),), lengths: object = (2,), targets: object = None, **metadata: str) -> bytes:
    tensors = {"input_ids": torch.tensor(ids).int(), "lengths": torch.tensor(lengths).int()}
    tensors |= {} if targets is None else {"targets": torch.tensor(targets).int()}
    return encode_tensors(tensors, {"n": "1", "dtype": "float32", **metadata})


def test_it_tells_what_is_served(url: str) -> None:
    assert ask(url, "GET", "/") == (200, {"protocol": 1, "vocab_size": 11, "max_bytes": LIMIT, "max_tokens": 500})


def test_the_protocol_is_simple_enough_to_write_by_hand(url: str) -> None:
    status, body = ask(url, "POST", "/last_logits", request())
    assert status == 200
    assert decode_tensors(bytearray(body))[0]["logits"].tolist() == [[[0.0] * 3 + [1.0] + [0.0] * 7]]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/last_logits", b"", "does not begin with a header"),
        ("/last_logits", b"\x00" * 50, "the header of the body is not that of tensors"),
        ("/last_logits", b"{}" * 99, "does not begin with a header"),
        ("/last_logits", len(VAST).to_bytes(8, "little") + VAST, "tensor 'input_ids' has dtype 'I32' and shape"),
        ("/last_logits", encode_tensors({}), "needs input_ids"),
        ("/last_logits", encode_tensors({"input_ids": torch.ones(1, 2)}), "needs input_ids, integers"),
        ("/last_logits", request(lengths=((2,),)), "needs lengths"),
        ("/last_logits", request(lengths=(2, 2)), r"input_ids \[1, 2\] do not fit 2 lengths"),
        ("/last_logits", request(lengths=(3,)), "row 0 of 2 ids has the length 3"),
        ("/last_logits", request(lengths=(0,)), "row 0 of 2 ids has the length 0"),
        ("/last_logits", request(ids=((), ()), lengths=(0, 0)), "do not fit"),
        ("/last_logits", request(ids=((1, 11),)), "row 0 holds the id 11 at position 1"),
        ("/last_logits", request(ids=((-1, 1),)), "row 0 holds the id -1 at position 0"),
        ("/last_logits", request(n="3"), "last 3 positions are asked for, and row 0 has 2 tokens"),
        ("/last_logits", request(n="0"), "last 0 positions"),
        ("/last_logits", request(n="x"), "n is 'x'"),
        ("/last_logits", request(n="9" * 5000), "n is '999"),
        ("/last_logits", request(dtype="float8"), "dtype 'float8'"),
        ("/gather_logprobs", request(), "needs targets"),
        ("/gather_logprobs", request(targets=[[[11]]]), "targets: row 0 holds the id 11"),
        ("/gather_logprobs", request(targets=[[[1]], [[1]]]), "do not fit 1 rows"),
        ("/gather_logprobs", request(targets=[[[], []]]), "do not fit 1 rows"),
        ("/gather_logprobs", request(targets=[[[1], [1], [1]]]), "last 3 positions"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(url: str, path: str, body: bytes, message: str) -> None:
    status, told = ask(url, "POST", path, body)
    assert status == 400
    assert isinstance(told, dict)
    assert re.search(message, told["error"])


def test_what_is_too_large_is_refused_before_it_is_computed(url: str) -> None:
    rows = torch.ones(5, 100).int()
    assert ask(url, "POST", "/last_logits", request(ids=torch.ones(6, 100).tolist(), lengths=[100] * 6))[0] == 413
    status, told = ask(
        url, "POST", "/last_logits", request(ids=rows.tolist() * 1, lengths=[100] * 5, n="100", dtype="float32")
    )
    assert status == 200, told
    with serve(forward, max_bytes=5000) as small:
        status, told = ask(small.url, "POST", "/last_logits", request(ids=rows.tolist(), lengths=[100] * 5, n="100"))
        assert status == 413
        assert "logits of 5 x 100 positions are 22000 bytes" in str(told)
        assert ask(small.url, "POST", "/last_logits", bytes(5001))[0] == 413
        targets = torch.ones(5, 100, 1).int().tolist()
        body = request(ids=rows.tolist(), lengths=[100] * 5, targets=targets)
        assert len(body) < 5000
        assert ask(small.url, "POST", "/gather_logprobs", body)[0] == 200, "row by row, 4400 bytes each"


def test_an_oversized_body_is_refused_by_its_length_and_not_read(url: str) -> None:
    head = f"POST /last_logits HTTP/1.1\r\nhost: x\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: {{}}\r\n\r\n"
    start = time.monotonic()
    assert b" 413 " in raw(url, head.format(1 << 40).encode())
    assert b" 400 " in raw(url, head.format("1" * 5000).encode())
    assert b" 400 " in raw(url, head.format("-5").encode())
    assert time.monotonic() - start < 5
    assert ask(url, "POST", "/last_logits", bytes(1 << 20))[0] == 413, "and a client that sends it all can read why"


def test_a_body_takes_memory_as_it_comes_and_not_as_it_is_announced() -> None:
    head = f"POST /last_logits HTTP/1.1\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: {1 << 28}\r\n\r\n"
    with serve(forward) as server, socket.create_connection(address(server.url), timeout=10) as client:
        tracemalloc.start()
        try:
            client.sendall(head.encode() + b"x" * 99)
            client.shutdown(socket.SHUT_WR)
            told = client.recv(1 << 16)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert b"ended 268435357 bytes before the end of the body" in told
    assert peak < 4 << 20


def test_a_body_of_many_pieces_arrives_whole() -> None:
    class Summing:
        def __call__(self, ids: Tensor) -> Tensor:
            return torch.zeros(*ids.shape, 700_001)

        def last_logits(self, ids: Tensor, lengths: Tensor, n: int) -> Tensor:
            return (torch.arange(700_001.0) * int(ids.sum() % 1009)).expand(1, 1, -1)

    ids = torch.arange(700_001).unsqueeze(0)  # 2.8 MB there, and as much back
    with serve(Summing(), max_tokens=1 << 20) as server, from_url(server.url, dtype="float32") as remote:
        logits = remote.last_logits(ids, torch.tensor([700_001]))
    assert torch.equal(logits, Summing().last_logits(ids, torch.tensor([700_001]), 1))


def test_a_reply_to_head_has_no_body(url: str) -> None:
    got = raw(url, b"HEAD / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nconnection: close\r\n\r\n")
    refused, _, served = got.partition(b"\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 405 ")
    assert served.startswith(b"HTTP/1.1 200 ")


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(url: str) -> None:
    head = f"POST /last_logits HTTP/1.1\r\ncontent-type: {CONTENT_TYPE}\r\nexpect: 100-continue\r\n"
    body = request()
    with socket.create_connection(address(url), timeout=2) as client:
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode())
        assert client.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_refusal_is_sent_before_the_rest_of_the_body_is_waited_for(url: str) -> None:
    head = f"POST /last_logits HTTP/1.1\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: 99999999\r\n\r\n"
    with socket.create_connection(address(url), timeout=0.9) as client:  # the server waits for longer
        client.sendall(head.encode())
        assert b" 413 " in client.recv(1 << 16)


@pytest.mark.parametrize("lengths", [("27", "0"), ("0", "27"), ("27", "27")])
def test_a_body_whose_lengths_are_two_is_refused_and_is_no_second_request(url: str, lengths: tuple[str, str]) -> None:
    head = f"POST /last_logits HTTP/1.1\r\nhost: x\r\ncontent-type: {CONTENT_TYPE}\r\n"
    first, second = lengths
    inner = "GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    got = raw(url, f"{head}content-length: {first}\r\nContent-Length: {second}\r\n\r\n{inner}".encode())
    assert got.startswith(b"HTTP/1.1 400 ")
    assert got.count(b"HTTP/1.1 ") == 1
    assert f"the content-length is '{first}, {second}'".encode() in got


@pytest.mark.parametrize("header", ["content-length : 27", "a b: c\r\ncontent-length: 27", "abc\r\ncontent-length: 27"])
def test_a_body_whose_length_is_lost_is_refused_and_is_no_second_request(url: str, header: str) -> None:
    head = f"POST /last_logits HTTP/1.1\r\nhost: x\r\ncontent-type: {CONTENT_TYPE}\r\n{header}\r\n\r\n"
    got = raw(url, f"{head}GET / HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert got.startswith(b"HTTP/1.1 400 ")
    assert got.count(b"HTTP/1.1 ") == 1
    assert b"a line of the header is not a header" in got


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/last_logits", HEAD, 405),
        ("POST", "/", HEAD, 405),
        ("DELETE", "/", HEAD, 405),
        ("OPTIONS", "/last_logits", HEAD, 405),
        ("PUT", "/last_logits", HEAD, 405),
        ("GET", "/etc/passwd", HEAD, 404),
        ("POST", "/last_logits", {}, 415),
        ("POST", "/last_logits", {"content-type": "text/plain"}, 415),
        ("POST", "/last_logits", {**HEAD, "transfer-encoding": "chunked"}, 411),
    ],
)
def test_what_is_not_served_is_refused(url: str, method: str, path: str, headers: dict, status: int) -> None:
    body = b"0\r\n\r\n" if "transfer-encoding" in headers else b""
    assert ask(url, method, path, body, headers)[0] == status


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"\n\n\n\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 70000 + b"\r\n\r\n",
     b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
)  # fmt: skip
def test_garbage_ends_its_own_connection_only(url: str, garbage: bytes) -> None:
    try:
        assert b"200 OK" not in raw(url, garbage + b"\r\n\r\n")
    except ConnectionResetError:
        return  # ended without reading it all


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300))
def test_no_body_brings_it_down(url: str, body: bytes) -> None:
    status, told = ask(url, "POST", "/last_logits", body)
    assert status == 400
    assert "error" in str(told)


def test_a_client_that_dribbles_is_cut_off_and_others_are_served() -> None:
    with serve(forward, timeout=0.5) as server, socket.create_connection(address(server.url), timeout=10) as slow:
        start = time.monotonic()
        head = f"POST /last_logits HTTP/1.1\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: 1000\r\n\r\n"
        slow.sendall(head.encode())
        for _ in range(4):
            slow.sendall(b"x")
            time.sleep(0.1)
        with from_url(server.url) as remote:
            assert remote(torch.tensor([[1]])).shape == (1, 1, 11)
        assert b" 408 " in slow.recv(1 << 16)
        assert time.monotonic() - start < 3


def test_a_client_that_reads_its_reply_slowly_is_cut_off_and_its_place_given_to_others() -> None:
    body = request(n="2")
    head = f"POST /last_logits HTTP/1.1\r\ncontent-type: {CONTENT_TYPE}\r\ncontent-length: {len(body)}\r\n\r\n"
    with serve(lambda ids: torch.zeros(*ids.shape, 1 << 19), timeout=0.5, max_connections=1) as server:  # 4 MiB
        server._http.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # what it accepts has the same
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            slow.connect(address(server.url))
            slow.sendall(head.encode() + body)
            start = time.monotonic()
            while time.monotonic() - start < 1.5:
                assert slow.recv(1 << 14) or time.monotonic() - start > 0.5
                time.sleep(0.02)
            with from_url(server.url, retries=0) as remote:
                assert remote.vocab_size == 1 << 19


def test_no_more_connections_than_allowed_and_the_next_one_is_told_to_come_back() -> None:
    with serve(forward, max_connections=1) as server:
        with from_url(server.url) as remote:
            assert remote(torch.tensor([[1]])).shape == (1, 1, 11)
            assert b" 503 " in raw(server.url, b"GET / HTTP/1.1\r\n\r\n")
        with from_url(server.url, retries=5) as remote:
            assert remote(torch.tensor([[1]])).shape == (1, 1, 11)


def test_one_forward_runs_at_a_time() -> None:
    running, most = 0, 0

    def slow(ids: Tensor) -> Tensor:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return forward(ids)

    with serve(slow) as server:
        threads = [threading.Thread(target=ask, args=(server.url, "POST", "/last_logits", request())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


def test_closing_leaves_nothing_behind() -> None:
    threads = set(threading.enumerate())
    server = serve(forward)
    remotes = [from_url(server.url) for _ in range(3)]
    start = time.monotonic()
    server.close()
    assert time.monotonic() - start < 20, "open connections are ended, not waited for"
    assert set(threading.enumerate()) <= threads
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address(server.url))
    for remote in remotes:
        remote.close()


def test_a_server_can_be_restarted_on_its_port_though_clients_were_connected_when_it_closed() -> None:
    server = serve(forward)
    with socket.create_connection(address(server.url), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b" 200 " in client.recv(1 << 16)
        server.close()
        assert client.recv(1 << 16) == b""  # the server ended it first, so its end of it lingers
    with serve(forward, port=address(server.url)[1]) as again:
        assert again.url == server.url


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "give a token"),
        ({"host": "::"}, "give a token"),
        ({"token": ""}, "token must"),
        ({"token": "a\nb"}, "token must"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"max_tokens": 0.5}, "max_tokens is 0.5"),
        ({"timeout": 0}, "timeout is 0; it must be a number of seconds > 0"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"timeout": "60"}, "timeout is '60'"),
        ({"max_connections": 0}, "max_connections is 0; it must be an integer >= 1"),
        ({"max_connections": 1.5}, "max_connections is 1.5"),
        ({"port": 99999}, "port is 99999; it must be an integer from 0 to 65535"),
        ({"port": "80"}, "port is '80'"),
    ],
)
def test_bad_arguments_are_named_before_anything_listens(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        serve(forward, **options)


def test_a_model_that_does_not_work_is_named_before_anything_listens() -> None:
    with pytest.raises(ValueError, match="the first call: forward_func returned"):
        serve(lambda ids: ids)


def test_a_port_that_is_taken_is_an_error_that_leaves_nothing_behind(url: str) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(OSError, match="in use"):
        serve(forward, port=address(url)[1])
    assert set(threading.enumerate()) <= threads
