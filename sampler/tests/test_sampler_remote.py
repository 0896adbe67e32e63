"""A remote model is sampled and scored as a local one; a server that fails is named, and never waited for too long."""

from __future__ import annotations

import asyncio
import itertools
import math
import queue
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from torch import Tensor

from llm_sampler import RemoteError, from_url, generate, multiple_choice, sample, score, serve

TABLE = torch.randn(23, 11, generator=torch.Generator().manual_seed(2)) * 3
CONTINUATIONS = [[1], [2], [3, 4], [3, 5], [3, 4, 6]]
CERTIFICATE = Path(__file__).parent / "relay.pem"  # and its key


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


@contextmanager
def behind_tls(url: str) -> Iterator[str]:
    """The address of a relay in front of the server at `url`, as a reverse proxy stands there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    started: queue.Queue[Any] = queue.Queue()

    async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while part := await source.read(1 << 16):
            sink.write(part)
            await sink.drain()
        sink.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    async def listen() -> None:
        end = asyncio.Event()
        listening = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        started.put((asyncio.get_running_loop(), end, listening.sockets[0].getsockname()[1]))
        await end.wait()
        listening.close()

    thread = threading.Thread(target=lambda: asyncio.run(listen()))
    thread.start()
    loop, end, port = started.get(timeout=10)
    try:
        yield f"https://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()


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


def test_drafts_end_where_a_remote_models_window_does() -> None:
    model = LastOnly()
    with serve(model) as server, from_url(server.url) as remote:
        assert remote.max_length is None
    model.max_length = 9  # type: ignore[attr-defined]
    with serve(model) as server, from_url(server.url, dtype="float32") as remote:
        assert remote.max_length == 9
        steps = sample(remote, [[1, 2]], max_new_tokens=20, seed=0, drafter=lambda ids, limits: [[1] * 20])
        assert len(list(itertools.islice(steps, 8))) == 8
    assert max(width for (_, width), _ in model.calls) == 9


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


def test_a_server_behind_tls_is_asked_where_its_certificate_is_known_and_only_there(url: str) -> None:
    known = ssl.create_default_context(cafile=str(CERTIFICATE))
    known.verify_flags |= ssl.VERIFY_X509_STRICT
    ids = torch.arange(8).repeat(64, 50)  # more than a record of TLS holds
    with behind_tls(url) as secure:
        with from_url(secure, dtype="float32", ssl_context=known) as remote:
            assert torch.equal(remote(ids), forward(ids))
            assert torch.equal(remote(ids[:1]), forward(ids[:1]))
        wrongs: list[tuple[str, Any]] = [
            (secure, {}),
            (secure.replace("127.0.0.1", "localhost"), {"ssl_context": known}),
        ]
        for wrong, options in wrongs:
            with pytest.raises(RemoteError, match=f"^{wrong} .*certificate verify failed") as refused:
                from_url(wrong, **options)
            assert "asked" not in str(refused.value), "a certificate does not become right by asking again"


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


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("127.0.0.1:80", {}, "url is"),
        ("ftp://127.0.0.1", {}, "url is"),
        ("http://", {}, "url is"),
        ("http://user:password@127.0.0.1", {}, "url is"),
        ("http://127.0.0.1:1", {"dtype": "float8"}, "dtype is 'float8'"),
        ("http://127.0.0.1:1", {"timeout": 0}, "timeout is 0; it must be a number of seconds > 0"),
        ("http://127.0.0.1:1", {"timeout": math.inf}, "timeout is inf"),
        ("http://127.0.0.1:1", {"timeout": "x"}, "timeout is 'x'"),
        ("http://127.0.0.1:1", {"retries": -1}, "retries is -1; it must be an integer >= 0"),
        ("http://127.0.0.1:1", {"max_bytes": 0}, "max_bytes is 0; it must be an integer >= 1"),
        ("http://127.0.0.1:1", {"token": "a\r\nx: y"}, "token must"),
    ],
)
def test_bad_arguments_are_named(url: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_url(url, **options)
