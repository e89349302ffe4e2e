"""Uvicorn inside our own loop and life cycle, with bounds on what a silent or endless client can hold."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.errors import RequestError, StartError
from gateway.replies import error_body

BACKLOG = 2048
HEAD_BYTES = 64 << 10
HEAD_S = 15.0
"""A request's head must be complete this long after the connection or its first byte."""
KEEP_ALIVE_S = 30
SEND_BYTES = 128 << 10
"""The kernel's buffer of a connection: left to itself it grows to megabytes for a client that does not read."""
PROBE_S = 30
"""A silent connection is probed this often: a peer that vanished without a word is noticed."""


class HttpServer:
    """Listens from construction on, so that a port in use is said at once. Raises StartError.

    `write_s`: bytes that a client does not take for this long end its connection.
    """

    def __init__(self, app: Starlette, host: str, port: int, *, write_s: float = 60.0, head_s: float = HEAD_S) -> None:
        self._socket = _listen(host, port, write_s)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=type("Protocol", (_Bounded,), {"head_s": head_s}),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        self._server = _Quiet(config)

    async def run(self) -> None:
        """Serve until `stop`."""
        await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = True


class _Quiet(uvicorn.Server):
    """Signals are the service's business."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


class _Bounded(HttpToolsProtocol):
    """Uvicorn bounds neither the time nor the size of a request's head."""

    head_s = HEAD_S
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        in_body = self._in_body
        super().data_received(data)
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            return
        self._await_head()
        self._head_bytes += 0 if in_body or self._in_body else len(data)
        if self._head_bytes > HEAD_BYTES:
            self._refuse(431, "Request Header Fields Too Large", f"the head of a request may have {HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._in_body = True
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "Bad Request", msg)

    def _await_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self.transport.close)

    def _stop_timer(self) -> None:
        self._head_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, phrase: str, message: str) -> None:
        body = json.dumps(error_body(RequestError(message))).encode()
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def _listen(host: str, port: int, write_s: float) -> socket.socket:
    """A listening socket; accepted ones inherit its options."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with contextlib.ExitStack() as on_error:
            listening = on_error.enter_context(socket.socket(family, kind, protocol))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(write_s * 1000))
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_S)
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
            listening.bind(address)
            listening.listen(BACKLOG)
            listening.setblocking(False)
            on_error.pop_all()
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listening
