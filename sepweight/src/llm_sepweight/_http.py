"""Files on a web server that does ranges."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import httpx2

from llm_sepweight._catalog import JSON_LIMIT
from llm_sepweight._errors import WeightError
from llm_sepweight._remote import START, PassingError, Remote, RemoteFile, TooLargeError, shown, words

SLOWEST = 1024  # bytes a second; what brings less for as long as the timeout is taken for dead
PASSING = (408, 429, 500, 502, 503, 504)  # what a server says that may be better soon
REDIRECTS = 5
BRIEF = 64 << 10  # bytes; a redirect that says it is longer is left unread
PLAIN = {"Accept-Encoding": "identity"}
FAILING = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, httpx2.ProxyError)  # on the way
LINKED = "linked "  # begins a version that the hub tells
OURS = {"accept-encoding", "range", "if-range"}  # headers that nobody else sets


class HttpRemote(Remote):
    """Files below a URL, on a server that does ranges (RFC 9110, 14)."""

    def __init__(self, url: str, headers: Mapping[str, str], *, timeout: float, retries: int) -> None:
        super().__init__(shown(url), timeout=timeout, retries=retries)
        self._url = urlsplit(url)
        self._given = {name.lower() for name in headers} - {*OURS, "host"}  # of which each origin has its own
        self._headers = {**{name: headers[name] for name in headers if name.lower() not in OURS}, **PLAIN}
        self._certificates = httpx2.create_ssl_context()
        self._own = threading.local()
        self._lines: list[_Line] = []  # of all threads
        try:
            self._line()
            self._origin = _origin(httpx2.URL(url))
        except ValueError as error:
            raise WeightError(f"the headers cannot be sent: {error}", file=self.name) from None

    def _line(self) -> _Line:
        """The calling thread's own."""
        if not hasattr(self._own, "line"):
            client = httpx2.Client(
                headers=self._headers,
                timeout=self.timeout,
                verify=self._certificates,
                event_hooks={"request": [self._keep_to_ourselves]},
            )
            self._own.line = _Line(client, self.timeout, self._stopped)
            self._lines.append(self._own.line)
        return self._own.line

    def _keep_to_ourselves(self, request: httpx2.Request) -> None:
        """Drop from a request to wherever the server redirects what the caller meant for the server."""
        if _origin(request.url) != self._origin:
            for name in self._given & {name.lower() for name in request.headers}:
                del request.headers[name]

    def names(self) -> Sequence[str] | None:
        return None

    def still(self, file: RemoteFile) -> None:
        pass  # the version of every answer is compared

    def identity(self, file: RemoteFile) -> list[Any]:
        found = super().identity(file)
        if file.version is not None and file.version.startswith(LINKED):  # of the contents
            return found
        return [self.name, *found]  # many servers make the ETag of size and time, which two models may share

    def stop(self) -> None:
        super().stop()
        for line in self._lines:
            line.cut()

    def close(self) -> None:
        for line in self._lines:
            line.client.close()

    def _small(self, name: str) -> bytes | None:
        with self._answer(name, {}) as response:
            if response.status_code in (404, 410):
                return None
            self._expect(response, 200, name)
            if not response.headers.keys() & {"content-length", "transfer-encoding"}:
                problem = "the server does not say how long it is, so nothing would tell if it came cut short"
                raise WeightError(problem, file=self.where(name), remedy="Use a server that does.")
            if (nbytes := int(response.headers.get("Content-Length", 0))) > JSON_LIMIT:
                raise TooLargeError(nbytes, self.where(name))
            return b"".join(self._pieces(response, name, JSON_LIMIT))

    def _find(self, name: str) -> RemoteFile:
        with self._answer(name, {"Range": f"bytes=0-{START - 1}"}) as response:
            size = self._range(response, name, 0, START)
            start = bytearray(START)
            self._fill(response, name, memoryview(start))
        return RemoteFile(name, size, _version(response), bytes(start))

    def _read(self, file: RemoteFile, offset: int, out: memoryview) -> None:
        headers = {"Range": f"bytes={offset}-{offset + len(out) - 1}"}
        if file.version is not None and file.version.startswith('"'):  # a weak one cannot be asked for
            headers["If-Range"] = file.version
        with self._answer(file.name, headers) as response:
            if response.status_code in (200, 206) and _version(response) != file.version:
                raise self._changed(file.name)
            size = self._range(response, file.name, offset, len(out))
            if size != file.size:
                problem = f"the server gives it {size} bytes now, and gave it {file.size} before"
                raise WeightError(problem, file=self.where(file.name), remedy="Fetch again.")
            self._fill(response, file.name, out)

    @contextmanager
    def _answer(self, name: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        """The answer to one request, its body still to be read. What is wrong with the way there is PassingError."""
        line = self._line()
        try:
            request = line.client.build_request("GET", self._url_of(name), headers=headers)
            history: list[httpx2.Response] = []
            while True:
                with line.ask(request) as response:
                    if response.next_request is None:
                        response.history = history
                        yield response
                        return
                    self._pass_redirect(response, response.next_request, name)
                request, history = response.next_request, [*history, response]
                if len(history) > REDIRECTS:
                    problem = f"the server redirects more than {REDIRECTS} times"
                    raise WeightError(problem, file=self.where(name), remedy="Check the URL.")
        except httpx2.TimeoutException as error:
            raise PassingError(f"no answer for {self.timeout:g} s", file=self.where(name)) from error
        except FAILING as error:
            problem = f"no answer for {self.timeout:g} s" if line.late else f"the connection failed: {words(error)}"
            raise PassingError(problem, file=self.where(name)) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            problem = f"cannot be asked for: {words(error)}"
            raise WeightError(problem, file=self.where(name), remedy="Check the URL.") from error

    def _pass_redirect(self, response: httpx2.Response, onward: httpx2.Request, name: str) -> None:
        """Refuse one that gives up https; read one that is brief, after which its connection can be used again."""
        if (response.url.scheme, onward.url.scheme) == ("https", "http"):
            remedy = "Ask whoever runs the server."
            raise WeightError("the server leads from https to http", file=self.where(name), remedy=remedy)
        if int(response.headers.get("Content-Length", BRIEF + 1)) <= BRIEF:
            deque(self._pieces(response, name, BRIEF), maxlen=0)

    def _url_of(self, name: str) -> str:
        path = f"{self._url.path.rstrip('/')}/{quote(name)}"
        return urlunsplit((self._url.scheme, self._url.netloc, path, self._url.query, ""))

    def _range(self, response: httpx2.Response, name: str, offset: int, nbytes: int) -> int:
        """The size of the whole file, if the answer is what was asked for and nothing else."""
        if response.status_code == 200:
            remedy = "Use a server that does, or download the whole file."
            raise WeightError("the server does not do ranges", file=self.where(name), remedy=remedy)
        if response.status_code == 416:
            problem = f"the server has no bytes {offset} to {offset + nbytes - 1} of it: it is shorter than it was said"
            raise WeightError(problem, file=self.where(name), remedy="Check the source; it may be incomplete.")
        self._expect(response, 206, name)
        said = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", said)
        length = response.headers.get("Content-Length", str(nbytes))
        if not match or (int(match[1]), int(match[2])) != (offset, offset + nbytes - 1) or length != str(nbytes):
            problem = f"asked for bytes {offset} to {offset + nbytes - 1}, the server answers {said!r}, {length} bytes"
            raise WeightError(problem, file=self.where(name), remedy="The server is not to be trusted with ranges.")
        return int(match[3])

    def _expect(self, response: httpx2.Response, status: int, name: str) -> None:
        found = response.status_code
        if found != status:
            problem = f"the server answers {found} {response.reason_phrase}".rstrip()
            if found in PASSING:
                raise passing(problem, self.where(name), response)
            raise WeightError(problem, file=self.where(name), remedy=self._remedy(found))
        if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
            problem = f"the server sends it encoded as {encoding}, unasked"
            raise WeightError(problem, file=self.where(name), remedy="Turn compression off for such files there.")

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            return "Pass what the server wants to know, as in headers={'Authorization': 'Bearer ...'}."
        return "Check the source's address; a file may be missing there." if status in (404, 410) else ""

    def _pieces(self, response: httpx2.Response, name: str, at_most: int) -> Iterator[bytes]:
        """The body, which may not stall, trickle or go on for ever."""
        since, had, got = time.monotonic(), 0, 0
        for piece in response.iter_raw():
            got += len(piece)
            if got > at_most:
                problem = f"the server sends more than the {at_most} bytes that there should be"
                raise WeightError(problem, file=self.where(name))
            if self._stopped.is_set():
                raise WeightError("stopped", file=self.where(name))
            if time.monotonic() - since > self.timeout:
                if got - had < SLOWEST * self.timeout:
                    problem = f"the server stalls: {got - had} bytes in {self.timeout:g} s"
                    raise PassingError(problem, file=self.where(name))
                since, had = time.monotonic(), got
            yield piece

    def _fill(self, response: httpx2.Response, name: str, out: memoryview) -> None:
        """The body, all of it."""
        got = 0
        for piece in self._pieces(response, name, len(out)):
            out[got : got + len(piece)] = piece
            got += len(piece)
        if got != len(out):
            problem = f"the server ends after {got} of the {len(out)} bytes that it promised"
            raise PassingError(problem, file=self.where(name))


class _Line:
    """What one thread asks with. Another can cut it: closing a socket would not wake up who waits for it."""

    def __init__(self, client: httpx2.Client, timeout: float, stopped: threading.Event) -> None:
        self.client = client
        self.late = False  # whether the headers of an answer were
        self._timeout = timeout
        self._timer: threading.Timer | None = None
        self._stopped = stopped
        self._sockets: list[socket.socket] = []

    def ask(self, request: httpx2.Request) -> AbstractContextManager[httpx2.Response]:
        """The answer, its body still to be read. A redirect is not followed: the client would read all of its body."""
        self.late = False
        request.extensions["trace"] = self._happens
        return closing(self.client.send(request, stream=True, follow_redirects=False))

    def cut(self) -> None:
        """End what the thread waits for, with an error."""
        for each in self._sockets:
            with suppress(OSError):  # it is closed
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    def _happens(self, event: str, info: Mapping[str, Any]) -> None:
        """Called by the client at each step of a request."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            opened = info["return_value"].get_extra_info("socket")
            self._sockets = [*(each for each in self._sockets if each.fileno() >= 0), opened]
            if self._stopped.is_set():
                self.cut()
        elif event.endswith(".receive_response_headers.started"):  # of which each byte resets the client's own timeout
            self._timer = threading.Timer(self._timeout, self._be_late)
            self._timer.daemon = True
            self._timer.start()
        elif ".receive_response_headers." in event and self._timer is not None:
            self._timer.cancel()

    def _be_late(self) -> None:
        self.late = True
        self.cut()


def passing(problem: str, where: str, response: httpx2.Response) -> PassingError:
    """What is wrong with an answer of one of the PASSING kinds, and for how long."""
    error = PassingError(problem, file=where, remedy="Try again later.")
    error.after = _retry_after(response)
    return error


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _version(response: httpx2.Response) -> str | None:
    """What changes when the file does. The hub says it before it leads to wherever the bytes are kept."""
    for step in (*response.history, response):
        if linked := step.headers.get("X-Linked-ETag"):
            return LINKED + linked
    return response.headers.get("ETag") or response.headers.get("Last-Modified")


def _retry_after(response: httpx2.Response) -> float:
    """Seconds; the server says so many, or a date."""
    said = response.headers.get("Retry-After", "")
    if re.fullmatch(r"\d{1,9}", said):
        return float(said)
    try:
        return parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
