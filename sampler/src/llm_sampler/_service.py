"""What a server of logits answers, whichever way the request came in."""

from __future__ import annotations

import hmac
import json
import logging
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._forward import Forward, ForwardFunc
from ._likelihood import gather_logprobs
from ._settings import plain
from ._wire import CONTENT_TYPE, COUNT, LOGIT_DTYPES, decode_tensors, encode_tensors, pack_logits

_log = logging.getLogger("llm_sampler")


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class RequestError(Exception):
    """A request that is not served: status and what to do about it."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Service:
    """Checks a request (`admit`, before its body is read) and answers it (`answer`); one forward at a time."""

    def __init__(
        self,
        forward_func: ForwardFunc,
        *,
        token: str | None,
        max_bytes: int,
        max_tokens: int,
        device: torch.device | str,
    ):
        if token is not None and not (token and token.isascii() and token.isprintable() and token == token.strip()):
            raise ValueError("token must be printable ASCII, not empty, without spaces at its ends")
        self.max_bytes: int = COUNT.parse("max_bytes", plain(max_bytes))
        self._max_tokens: int = COUNT.parse("max_tokens", plain(max_tokens))
        self._token = token
        self._device = torch.device(device)
        self._forward = Forward(forward_func)
        first = self._forward(torch.zeros(1, 1, dtype=torch.long, device=self._device), [1], 1, "the first call")
        self._vocab_size = first.shape[-1]
        self._lock = threading.Lock()

    def admit(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Refuse what will not be answered; headers by their names in lower case."""
        if self._token is not None:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                raise RequestError(401, "the bearer token is missing or wrong")
        if _name(path) not in ("", "last_logits", "gather_logprobs"):
            raise RequestError(404, f"there is no {path}; GET / tells what is served")
        if (method == "GET") != (_name(path) == "") or method not in ("GET", "POST"):
            raise RequestError(405, f"{method} {path} is not served; GET / and POST /last_logits, /gather_logprobs are")
        if method == "POST" and headers.get("content-type") != CONTENT_TYPE:
            raise RequestError(415, f"the body must be {CONTENT_TYPE}")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18:
            raise RequestError(400, f"the content-length is {length[:40]!r}")
        if int(length) > self.max_bytes:
            raise RequestError(413, f"a body of {length} bytes is more than max_bytes={self.max_bytes}")

    def answer(self, path: str, body: bytearray) -> Reply:
        """The reply to an admitted request; raises nothing."""
        try:
            if _name(path) == "":
                limits = {"vocab_size": self._vocab_size, "max_bytes": self.max_bytes, "max_tokens": self._max_tokens}
                if self._forward.max_length < sys.maxsize:
                    limits["max_length"] = self._forward.max_length
                return Reply(200, json.dumps({"protocol": 1, **limits}).encode(), {"content-type": "application/json"})
            with self._lock:
                return Reply(200, self._computed(_name(path), body), {"content-type": CONTENT_TYPE})
        except RequestError as refused:
            return refusal(refused)
        except (ValueError, TypeError) as error:
            return refusal(RequestError(400, str(error)))
        except Exception as error:
            _log.error("the forward function raised", exc_info=True)
            return refusal(RequestError(500, f"the forward function raised {type(error).__name__}: {error}"))

    def _computed(self, name: str, body: bytearray) -> bytes:
        tensors, metadata = decode_tensors(body)
        ids, lengths = self._rows(tensors)
        if name == "gather_logprobs":
            targets = _tensor(tensors, "targets", 3).long()
            if targets.shape[0] != len(ids) or targets.numel() == 0:
                raise RequestError(400, f"targets {list(targets.shape)} do not fit {len(ids)} rows of ids")
            self._check_ids(targets.flatten(1), "targets")
            logprobs, best = self._gathered(ids, lengths, targets)
            return encode_tensors({"logprobs": logprobs.float(), "best": best.int()})
        n, dtype = metadata.get("n", ""), metadata.get("dtype", "")
        if dtype not in LOGIT_DTYPES or not (n.isdecimal() and len(n) < 9):
            raise RequestError(
                400, f"n is {n!r} and dtype {dtype!r}; a number, and one of {', '.join(LOGIT_DTYPES)} are needed"
            )
        self._check_n(int(n), lengths)
        self._check_size(len(ids) * int(n) * LOGIT_DTYPES[dtype].itemsize, f"logits of {len(ids)} x {n} positions")
        return encode_tensors(pack_logits(self._forward(ids, lengths, int(n), "the request"), dtype))

    def _rows(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, list[int]]:
        ids = _tensor(tensors, "input_ids", 2).long()
        lengths = _tensor(tensors, "lengths", 1).tolist()
        if len(lengths) != len(ids) or ids.numel() == 0:
            raise RequestError(400, f"input_ids {list(ids.shape)} do not fit {len(lengths)} lengths")
        if ids.numel() > self._max_tokens:
            raise RequestError(
                413, f"{ids.numel()} tokens are more than max_tokens={self._max_tokens}; send fewer rows"
            )
        for row, length in enumerate(lengths):
            if not 1 <= length <= ids.shape[1]:
                raise RequestError(400, f"row {row} of {ids.shape[1]} ids has the length {length}")
        self._check_ids(ids, "input_ids")
        return ids.to(self._device), lengths

    def _gathered(self, ids: Tensor, lengths: list[int], targets: Tensor) -> tuple[Tensor, Tensor]:
        n = targets.shape[1]
        self._check_n(n, lengths)
        own = getattr(self._forward.forward_func, "gather_logprobs", None)
        if own is not None:
            return own(ids, torch.tensor(lengths, device=ids.device), targets.to(ids.device))
        row = n * 4  # float32; the logits stay here, but they too have to fit
        self._check_size(row, f"logits of {n} positions")
        at_once = max(1, self.max_bytes // (row * self._vocab_size))
        parts = [
            gather_logprobs(
                self._forward(ids[at : at + at_once], lengths[at : at + at_once], n, "the request"),
                targets[at : at + at_once],
            )
            for at in range(0, len(ids), at_once)
        ]
        logprobs, best = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(best)

    def _check_n(self, n: int, lengths: list[int]) -> None:
        if not 1 <= n <= min(lengths):
            raise RequestError(400, f"logits of the last {n} positions are asked for, and row {lengths.index(min(lengths))} "
                          f"has {min(lengths)} tokens")  # fmt: skip

    def _check_size(self, per_id: int, what: str) -> None:
        if per_id * self._vocab_size > self.max_bytes:
            raise RequestError(
                413,
                f"{what} are {per_id * self._vocab_size} bytes, more than max_bytes={self.max_bytes}; "
                "ask for fewer rows or positions at a time",
            )

    def _check_ids(self, ids: Tensor, name: str) -> None:
        wrong = ((ids < 0) | (ids >= self._vocab_size)).nonzero()
        if len(wrong):
            row, place = wrong[0].tolist()
            raise RequestError(
                400,
                f"{name}: row {row} holds the id {int(ids[row, place])} at position {place}, and the vocabulary has "
                f"{self._vocab_size}; does the tokenizer belong to this model?",
            )


def refusal(refused: RequestError) -> Reply:
    headers = {"content-type": "application/json"}
    if refused.status == 401:
        headers["www-authenticate"] = "Bearer"
    if refused.status == 503:
        headers["retry-after"] = "1"
    return Reply(refused.status, json.dumps({"error": str(refused)}).encode(), headers)


def _tensor(tensors: Mapping[str, Any], name: str, dimensions: int) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.dim() != dimensions or tensor.dtype not in (torch.int32, torch.int64):
        raise RequestError(400, f"the body needs {name}, integers of {dimensions} dimensions")
    return tensor


def _name(path: str) -> str:
    return path.partition("?")[0].rpartition("/")[2]
