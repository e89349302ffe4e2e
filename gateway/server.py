"""Uvicorn inside our own loop and life cycle, with bounds on what a silent or endless client can hold."""

from __future__ import annotations

import asyncio
import contextlib
import http
import ipaddress
import json
import math
import socket

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from common.errors import RequestError, SettingError, StartError, Unavailable
from common.files import allow_files
from common.logs import get_logger
from gateway.replies import ALIVE, error_body

log = get_logger(__name__)

BACKLOG = 2048
HEAD_BYTES = 64 << 10
MOST_HEADERS = 128
HEADER_BYTES = 4
"""Of each header beside its name and its value: colon, space, end of line."""
MOST_BEHIND = 64
"""Requests that may stand behind one that is being answered: whoever sends more of them at once is cut off."""
HEAD_S = 15.0
"""A request's head must be complete this long after the connection or its first byte."""
KEEP_ALIVE_S = 30
SEND_BYTES = 128 << 10
"""The kernel's buffer of a connection: left to itself it grows to megabytes for a client that does not read."""
PROBE_S = 30
"""A silent connection is probed this often: a peer that vanished without a word is noticed."""
OTHER_FILES = 256
"""Of the files a process may have open, this many are not for clients: sockets of the fleet, listening ones, the model."""
FULL_S = 1.0
"""A connection beyond the cap is told so when it asks, and closed after this long in any case."""
MOST_REFUSING = 128
"""That many are told at once; those beyond are closed without a word."""
AGAIN_S = 5
GRACE_S = 1.0
HEALTH = b"GET /health "
"""Answered even then: a gateway with much to do must not be taken for a dead one."""


class HttpServer:
    """Listens from construction on, so that a port in use is said at once. Raises StartError.

    `write_s`: bytes that a client does not take for this long end its connection. `most`: connections that are served at once; a further
    one is refused with a 503.
    """

    def __init__(self, app: Starlette, host: str, port: int, *, write_s: float = 60.0, head_s: float = HEAD_S, most: int = 1024) -> None:
        self._socket = _listen(host, port, write_s)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http=type("Protocol", (_Bounded,), {"head_s": head_s, "most": room_for(most)}),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=KEEP_ALIVE_S,
            server_header=False,
        )
        self._server = _Quiet(config)

    async def run(self) -> None:
        """Serve until `stop`."""
        await self._server.serve(sockets=[self._socket])

    def stop(self, grace_s: float = GRACE_S) -> None:
        """Listen no more, and end when all answers have been sent; what is left after the grace is cut."""
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True


class _Quiet(uvicorn.Server):
    """Signals are the service's business."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


class _Bounded(HttpToolsProtocol):
    """Uvicorn bounds neither the time nor the size of a request's head, and of connections it only bounds those that are served.

    Trailers count as a part of the head, and the head of a request that comes behind a running one is bounded like any other.
    """

    head_s = HEAD_S
    most = 1024
    _full = False
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    """Of the message that is being read: its address, its headers and its trailers."""
    _headers = 0
    """Of it so far."""
    _held_bytes = 0
    """Read since the parser last gave something out: it keeps what is not complete yet."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        over = len(self.connections) - self.most
        self._full = over > 0
        if over > MOST_REFUSING:
            transport.abort()
        elif self._full:
            self._timer = self.loop.call_later(FULL_S, transport.close)
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._full:
            self._turn_away(data)
            return
        self._held_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._held_bytes > HEAD_BYTES:
            self._refuse(_LargeHead())
        elif not self._answering:
            self._await_head()

    def on_message_begin(self) -> None:
        self._head_bytes = self._held_bytes = self._headers = 0
        self._await_head()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers += 1
        self._count(len(name) + len(value) + HEADER_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MOST_BEHIND:
            raise RequestError("too many requests at once on one connection")
        self._held_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._held_bytes = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._refuse(_LargeHead() if self._head_is_large else RequestError(msg))

    @property
    def _answering(self) -> bool:
        """Whether a request that was read whole, or its head, has no whole answer yet."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _head_is_large(self) -> bool:
        return self._head_bytes > HEAD_BYTES or self._headers > MOST_HEADERS

    def _count(self, octets: int) -> None:
        """Raises within the parser, which ends it: `send_400_response` says why."""
        self._held_bytes = 0
        self._head_bytes += octets
        if self._head_is_large:
            raise _LargeHead

    def _await_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self._late)

    def _late(self) -> None:
        """A head that nobody reads at present, because of the requests before it, may be there already."""
        self._timer = None
        if self.flow.read_paused:
            self._await_head()
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _turn_away(self, data: bytes) -> None:
        """Beyond the cap: one word, and nothing that follows is read."""
        if data.startswith(HEALTH):
            self._close_with(200, ALIVE)
            return
        error = Unavailable(f"this gateway serves {self.most} connections at once: try again later")
        self._close_with(error.status, error_body(error), f"retry-after: {AGAIN_S}\r\n")

    def _refuse(self, error: RequestError) -> None:
        """In words, unless they would stand amid an answer."""
        if self._answering and (self.pipeline or self.cycle.response_started):
            self.transport.close()
        else:
            self._close_with(error.status, error_body(error))

    def _close_with(self, status: int, said: object, header: str = "") -> None:
        body = json.dumps(said).encode()
        head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n{header}"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


class _LargeHead(RequestError):
    status = 431

    def __init__(self) -> None:
        super().__init__(f"the head of a request may have {HEAD_BYTES} bytes and {MOST_HEADERS} headers")


def room_for(connections: int) -> int:
    """So many of these connections as the process may open files for; its own limit is raised as far as the system lets it."""
    wanted = connections + OTHER_FILES
    files = allow_files(wanted)
    if files >= wanted:
        return connections
    room = max(1, files - OTHER_FILES)
    log.warning("fewer connections than set: the system allows this process too few files", connections=room, files=files)
    return room


def check_open(host: str, *, keys: bool, anyone: bool) -> None:
    """Without keys, only this host is served unless the settings say otherwise. Raises SettingError."""
    if keys or anyone or _is_loopback(host):
        return
    raise SettingError(
        f"http_host is {host!r} and there are no API keys: whoever reaches the port could use the fleet; set api_keys, or http_host to "
        "127.0.0.1, or allow_anonymous to anyone"
    )


def _is_loopback(host: str) -> bool:
    """As `_listen` will resolve it. A name that is not known is none: listening will say so."""
    try:
        addresses = [info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)]
    except OSError:
        return False
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


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
