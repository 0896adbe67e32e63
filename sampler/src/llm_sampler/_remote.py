"""A model on another machine as a forward function.

Over http.client: it needs no further package, keeps one connection open (urllib does not, and a connection for each
token costs more than the token), and its socket can be held to one deadline however slowly bytes drip in.
"""

from __future__ import annotations

import http.client
import io
import json
import random
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ._settings import REQUIRED, number, plain
from ._wire import (
    CONTENT_TYPE,
    COUNT,
    LOGIT_DTYPES,
    SECONDS,
    BoundedSocket,
    decode_tensors,
    encode_tensors,
    received,
    unpack_logits,
)

_RETRIES = number(REQUIRED, lambda v: v >= 0, "an integer >= 0", int)
_AGAIN = {429, 502, 503, 504}  # what may be over in a moment


class RemoteError(RuntimeError):
    """A remote model could not be asked, or answered something that cannot be right."""


def from_url(
    url: str,
    *,
    token: str | None = None,
    dtype: str = "float16",
    timeout: float = 60.0,
    retries: int = 3,
    max_bytes: int = 1 << 30,
    ssl_context: ssl.SSLContext | None = None,
) -> RemoteForward:
    """A `forward_func` from the address of a server (`serve`, `asgi_app`). It asks at once what is served there.

    Args:
        url: http:// or https://, with the path under which the server is mounted.
        token: the server's bearer token. Over http:// it can be read on the way.
        dtype: in which logits travel. "float16": the highest of a position is exact, each other one is off by at most
            2^-11 of its distance to that, or 2^-24, and what lies more than 65504 below becomes -inf. "bfloat16": off
            by at most 2^-9 of the logit. "float32", and the dtype that the model computes in: exact. Scores are float32
            always.
        timeout: seconds that one call may take, from its start to its end, with all its retries. Where the url's name
            has several addresses, each one that does not answer may take as long; to look it up is not counted.
        retries: how often a call is repeated where the server cannot be reached, breaks off or is busy. That is safe: a
            call changes nothing.
        max_bytes: the largest reply that is accepted.
        ssl_context: for https with certificates of your own.

    Raises:
        RemoteError: here and from each call, with address, reason and remedy.

    Example:
        >>> from llm_sampler import serve
        >>> with serve(lambda ids: torch.zeros(*ids.shape, 4)) as server, from_url(server.url) as forward:
        ...     forward(torch.tensor([[1, 2]])).shape
        torch.Size([1, 2, 4])
    """
    return RemoteForward(
        url, token=token, dtype=dtype, timeout=timeout, retries=retries, max_bytes=max_bytes, ssl_context=ssl_context
    )


class RemoteForward:
    """See `from_url`. vocab_size: ids are below it. max_length: the longest row, where the model says it.

    A context manager; may be called from several threads.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        dtype: str,
        timeout: float,
        retries: int,
        max_bytes: int,
        ssl_context: ssl.SSLContext | None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError(f"url is {url!r}; an address such as http://127.0.0.1:8000 is needed")
        if dtype not in LOGIT_DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(LOGIT_DTYPES)}")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ValueError("token must be printable ASCII")
        self.url = url.rstrip("/")
        self._path = parts.path.rstrip("/")
        self._dtype = dtype
        self._timeout: float = SECONDS.parse("timeout", plain(timeout))
        self._retries: int = _RETRIES.parse("retries", plain(retries))
        self._max_bytes: int = COUNT.parse("max_bytes", plain(max_bytes))
        self._headers = {"content-type": CONTENT_TYPE} | ({"authorization": f"Bearer {token}"} if token else {})
        if parts.scheme == "https":
            self._connection = http.client.HTTPSConnection(parts.hostname, parts.port, context=ssl_context)
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port)
        self._lock = threading.Lock()
        try:
            info = json.loads(self._asked("GET", "/", b""))
            self.vocab_size: int = info["vocab_size"]
            self.max_length: int | None = info.get("max_length")
            numbers = [self.vocab_size] if self.max_length is None else [self.vocab_size, self.max_length]
            if info["protocol"] != 1 or any(type(number) is not int or number < 1 for number in numbers):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            self.close()
            raise RemoteError(
                f"{self.url} does not answer as a server of llm_sampler does; check the address"
            ) from None
        except BaseException:
            self.close()
            raise

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of every position of ids [B, T]."""
        rows, length = input_ids.shape
        return self.last_logits(input_ids, torch.full((rows,), length), length)

    def last_logits(self, input_ids: Tensor, lengths: Tensor, n: int = 1) -> Tensor:
        """Logits [B, n, V] of the last n positions of each right-padded row of ids [B, T], on the CPU."""
        found = self._tensors(
            "/last_logits",
            {"input_ids": input_ids.int(), "lengths": lengths.int()},
            {"n": str(n), "dtype": self._dtype},
        )
        shape = (len(input_ids), n, self.vocab_size)
        self._check(found, "logits", shape, tuple(LOGIT_DTYPES.values()))
        if "highest" in found:
            self._check(found, "highest", shape[:2], (torch.float32,))
        return unpack_logits(found)

    def gather_logprobs(self, input_ids: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of ids `targets` [B, n, K] at the last n positions: log-probabilities [B, n, K], the likeliest ids [B, n]."""
        found = self._tensors(
            "/gather_logprobs",
            {"input_ids": input_ids.int(), "lengths": lengths.int(), "targets": targets.int()},
            {},
        )
        self._check(found, "logprobs", tuple(targets.shape), (torch.float32,))
        self._check(found, "best", tuple(targets.shape[:2]), (torch.int32,))
        return found["logprobs"], found["best"].long()

    def close(self) -> None:
        """Close the connection. A later call opens it again."""
        self._connection.close()

    def __enter__(self) -> RemoteForward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensors(self, path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
        answer = self._asked("POST", path, encode_tensors(tensors, metadata))
        try:
            return decode_tensors(answer)[0]
        except ValueError as error:
            raise RemoteError(f"{self.url}{path} answered no tensors: {error}") from None

    def _check(
        self, found: Mapping[str, Any], name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> None:
        tensor = found.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype not in dtypes:
            got = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise RemoteError(
                f"{self.url} answered {name}: {got}; {list(shape)} are needed. Is it the same model still?"
            )

    # One call

    def _asked(self, method: str, path: str, body: bytes) -> bytearray:
        """The body of a good reply; repeats what may be over in a moment, until the deadline."""
        deadline = time.monotonic() + self._timeout
        attempt = 0
        with self._lock:
            while True:
                reused = self._connection.sock is not None
                wait = min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0)
                try:
                    status, headers, answer = self._once(method, path, body, deadline)
                except (RemoteError, ssl.SSLCertVerificationError) as error:
                    self._connection.close()
                    raise RemoteError(f"{self.url} {error}") from None
                except (OSError, http.client.IncompleteRead) as error:  # RemoteDisconnected is one
                    self._connection.close()
                    if time.monotonic() >= deadline:
                        raise RemoteError(
                            f"{self.url} did not answer within {self._timeout} s; if it is computing, give a larger timeout"
                        ) from None
                    if reused and isinstance(error, ConnectionError):
                        continue  # it was idle for too long, and the server has closed it
                    reason = f"cannot be reached, or broke off: {type(error).__name__}: {error}"
                except (http.client.HTTPException, ValueError) as error:
                    self._connection.close()
                    raise RemoteError(f"{self.url} does not speak HTTP: {type(error).__name__}: {error}") from None
                else:
                    if status == 200:
                        return answer
                    reason = _reason(status, headers, answer)
                    if status not in _AGAIN:
                        raise RemoteError(f"{self.url}{path} {reason}")
                    after = headers.get("retry-after", "")
                    wait = max(wait, float(after) if after.isdecimal() and len(after) < 5 else 0)
                attempt += 1
                if attempt > self._retries or time.monotonic() + wait >= deadline:
                    raise RemoteError(f"{self.url} {reason} (asked {attempt} times)")
                time.sleep(wait)

    def _once(self, method: str, path: str, body: bytes, deadline: float) -> tuple[int, Mapping[str, str], bytearray]:
        connection = self._connection
        connection.timeout = max(0.001, deadline - time.monotonic())
        if connection.sock is not None:
            connection.sock.settimeout(connection.timeout)

        def bounded(sock: Any, *args: Any, **options: Any) -> http.client.HTTPResponse:
            response = http.client.HTTPResponse(sock, *args, **options)
            response.fp.close()
            response.fp = io.BufferedReader(BoundedSocket(sock, deadline))
            return response

        connection.response_class = bounded  # type: ignore[assignment]
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have refused the body and said why
            connection.request(method, self._path + path, body, self._headers)
        with connection.getresponse() as response:
            limit = self._max_bytes if response.status == 200 else 1 << 16
            length = response.length
            if length is not None and length > limit and response.status == 200:
                raise RemoteError(
                    f"answers {length} bytes, more than max_bytes={limit}; ask for fewer rows or positions"
                )
            answer = received(response, limit + 1 if length is None else min(length, limit))
            if length is not None and len(answer) < min(length, limit):
                raise http.client.IncompleteRead(bytes(answer), length - len(answer))
            if len(answer) > limit or not response.isclosed():
                connection.close()  # the rest of it would be taken for the next reply
            if len(answer) > limit and response.status == 200:
                raise RemoteError(f"answers more than max_bytes={limit}; ask for fewer rows or positions")
            return response.status, {name.lower(): value for name, value in response.getheaders()}, answer


def _reason(status: int, headers: Mapping[str, str], answer: bytearray) -> str:
    """What a server says that does not give what it was asked for, and what to do."""
    if 300 <= status < 400:
        return f"answered {status}: it has moved to {headers.get('location', '')[:200]!r}; give that address"
    try:
        told = str(json.loads(answer)["error"])[:500]
    except (ValueError, TypeError, KeyError, RecursionError):
        told = "and gave no reason"
    remedy = {401: "; give its token=", 403: "; give its token=", 404: "; check the address"}.get(status, "")
    return f"answered {status}: {told}{remedy}"
