"""A forward function for others, with the standard library's server."""

from __future__ import annotations

import io
import ipaddress
import logging
import os
import socket
import threading
import time
from email.errors import MissingHeaderBodySeparatorDefect
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch

from ._forward import ForwardFunc
from ._service import Reply, RequestError, Service, refusal
from ._settings import REQUIRED, number, plain
from ._wire import COUNT, SECONDS, BoundedSocket, received

_log = logging.getLogger("llm_sampler")
_PORT = number(REQUIRED, lambda v: 0 <= v < 1 << 16, "an integer from 0 to 65535", int)
_REFUSED_BODY = 1 << 20  # bytes of it that are read all the same, so that the client is not cut off before it reads why


def serve(
    forward_func: ForwardFunc,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    token: str | None = None,
    device: torch.device | str = "cpu",
    max_bytes: int = 1 << 28,
    max_tokens: int = 1 << 17,
    max_connections: int = 32,
    timeout: float = 60.0,
) -> Server:
    """Serve a forward function over HTTP, from threads of this process; `from_url(server.url)` is the other end.

    One forward runs at a time. It is called once with one token at the start, to learn the vocabulary. There is no
    encryption: beyond a network that you trust, put a server with TLS in front.

    Args:
        forward_func: ids [B, T] -> logits [B, T, V]; its `last_logits` and `gather_logprobs` are used where present.
        host, port: where to listen; port 0 takes a free one. Beyond this machine a token is required.
        token: who does not send it as a bearer token is refused; it is compared in constant time.
        device: where the ids are handed to forward_func.
        max_bytes: the largest body of a request and of logits in a reply. max_tokens: the most ids of a request, padding
            included. max_connections: how many clients at once; a further one is told to come back.
        timeout: seconds that a request may take to arrive and a reply to leave, and a connection to lie idle.

    Example:
        >>> with serve(lambda ids: torch.zeros(*ids.shape, 4)) as server:
        ...     print(server.url.rpartition(":")[0])
        http://127.0.0.1
    """
    if token is None and not _is_local(host):
        raise ValueError(f"{host!r} can be reached from other machines: give a token, or listen on 127.0.0.1")
    port = _PORT.parse("port", plain(port))
    max_connections = COUNT.parse("max_connections", plain(max_connections))
    timeout = SECONDS.parse("timeout", plain(timeout))
    service = Service(
        forward_func,
        token=token,
        max_bytes=max_bytes,
        max_tokens=max_tokens,
        device=device,
    )
    return Server(service, host, port, max_connections=max_connections, timeout=timeout)


class Server:
    """A running server; a context manager. url: what clients connect to."""

    def __init__(self, service: Service, host: str, port: int, *, max_connections: int, timeout: float):
        self._http = _HTTPServer((host, port), service, max_connections, timeout)
        address, bound = self._http.server_address[:2]
        self.url = f"http://[{address!s}]:{bound}" if ":" in str(address) else f"http://{address!s}:{bound}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.05,), name=f"serve {self.url}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Serve until `close`, or until interrupted (Ctrl-C)."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def close(self) -> None:
        """Stop listening and drop all connections; returns when a forward that still runs has come to its end."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        self._http.drop_connections()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _HTTPServer(HTTPServer):
    """One thread for each connection, and no more of them than were allowed."""

    request_queue_size = 64

    def __init__(self, address: tuple[str, int], service: Service, max_connections: int, timeout: float):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.service, self.seconds = service, timeout
        self._places = threading.BoundedSemaphore(max_connections)
        self._open: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if os.name == "posix":  # to come back at once; elsewhere two servers would share the port
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        socket.socket.bind(self.socket, self.server_address)  # without the look-up of a name that HTTPServer makes
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            reply = refusal(RequestError(503, "too many connections are open"))
            request.settimeout(1)
            head = (
                f"HTTP/1.1 503 Busy\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: {len(reply.body)}\r\n\r\n"
            )
            try:
                request.sendall(head.encode() + reply.body)
            finally:
                self.shutdown_request(request)
            return
        thread = threading.Thread(target=self._serve, args=(request, client_address), name="connection", daemon=True)
        with self._lock:
            self._open[request] = thread
        thread.start()

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:  # a client that went away, mostly; no reason to end
            _log.debug("connection from %s ended", client_address, exc_info=True)
        finally:
            with self._lock:
                self._open.pop(request, None)
            self.shutdown_request(request)
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("connection from %s refused", client_address, exc_info=True)

    def drop_connections(self) -> None:
        with self._lock:
            connections = dict(self._open)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it has just ended by itself
        for thread in connections.values():
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HTTPServer  # type: ignore[assignment]

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._socket = BoundedSocket(self.connection, 0)
        self.rfile = io.BufferedReader(self._socket)
        self.wfile = io.BufferedWriter(self._socket)  # pyright: ignore[reportArgumentType] # head and body of a small reply leave together

    def handle_one_request(self) -> None:
        self._socket.deadline = time.monotonic() + self.server.seconds
        super().handle_one_request()

    def handle_expect_100(self) -> bool:
        expected = super().handle_expect_100()
        self.wfile.flush()  # the client waits for it with its body
        return expected

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = do_PATCH = do_GET  # noqa: N815

    def _handle(self) -> None:
        headers = {name.lower(): ", ".join(self.headers.get_all(name, ())) for name in self.headers}
        self._socket.deadline = time.monotonic() + self.server.seconds
        left = 0
        try:
            if "transfer-encoding" in headers:
                self.close_connection = True
                raise RequestError(411, "send the body with its Content-Length, not in chunks")
            if MissingHeaderBodySeparatorDefect in map(type, self.headers.defects):
                self.close_connection = True
                raise RequestError(400, "a line of the header is not a header, and those behind it are lost")
            left = (
                int(length) if (length := headers.get("content-length", "0")).isdecimal() and len(length) < 19 else -1
            )
            self.server.service.admit(self.command, self.path, headers)
            body = received(self.rfile, left)
            left -= len(body)
            if left:
                raise RequestError(400, f"the connection ended {left} bytes before the end of the body")
        except RequestError as refused:
            self._refuse(refused, left)
        except TimeoutError:
            self.close_connection = True
            self._send(refusal(RequestError(408, f"the request did not arrive within {self.server.seconds} s")))
        else:
            self._send(self.server.service.answer(self.path, body))

    def _refuse(self, refused: RequestError, left: int) -> None:
        if left:
            self.close_connection = True
        self._send(refusal(refused))
        if left:
            self._socket.deadline = time.monotonic() + 1
            try:
                self.rfile.read(min(max(left, 0), _REFUSED_BODY))
            except OSError:
                return

    def _send(self, reply: Reply) -> None:
        self._socket.deadline = time.monotonic() + self.server.seconds
        self.send_response(reply.status)
        for name, value in {**reply.headers, "content-length": str(len(reply.body))}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("connection", "close")
        self.end_headers()
        if self.command != "HEAD":  # whose reply ends with its headers
            self.wfile.write(reply.body)
        self.wfile.flush()

    def version_string(self) -> str:
        return "llm_sampler"

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
