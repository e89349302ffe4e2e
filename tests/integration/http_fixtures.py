"""A real HTTP server over an echo desk, on a thread of its own, and small clients that can misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from common.messages import Identity
from gateway.app import Bounds, create_app
from gateway.gate import Access
from gateway.metrics import Metrics
from gateway.prompts import Model
from gateway.server import HttpServer
from tests.integration.echo_desk import EchoDesk

NAME = "smollm2"
PATIENCE_S = 20.0
BODY_S = 2.0
HEAD_S = 2.0
WRITE_S = 2.0
MOST_BYTES = 2 << 20
ROOM_BYTES = 3 << 20
"""For all bodies at a time."""


class Served:
    """A running server: its desk, model, metrics and address."""

    def __init__(
        self, desk: EchoDesk, model: Model, access: Access | None, origins: Sequence[str], most: int, names: Collection[str] | None
    ) -> None:
        self.desk = desk
        self.model = model
        self.figures = Metrics()
        self._connections: list[socket.socket] = []
        self.app = create_app(desk, model, Bounds(MOST_BYTES, ROOM_BYTES, BODY_S, 600.0, WRITE_S), self.figures, access, origins, names)
        self.server = HttpServer(self.app, "127.0.0.1", 0, write_s=WRITE_S, head_s=HEAD_S, most=most)
        self.port = self.server.port
        self.url = f"http://127.0.0.1:{self.port}"

    def connect(self, *, receive_bytes: int | None = None) -> socket.socket:
        """A new connection, with a small buffer if wanted; `hang_up` closes it."""
        connection = socket.socket()
        self._connections.append(connection)
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(PATIENCE_S)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def hang_up(self) -> None:
        while self._connections:
            self._connections.pop().close()

    def outcomes(self) -> dict[str, float]:
        """Requests by outcome so far."""
        samples = [sample for metric in self.figures.requests.collect() for sample in metric.samples]
        return {sample.labels["outcome"]: sample.value for sample in samples if sample.name.endswith("_total")}


@contextmanager
def serving(
    path: Path,
    access: Access | None = None,
    origins: Sequence[str] = (),
    most: int = 1024,
    names: Collection[str] | None = None,
) -> Iterator[Served]:
    model = Model(path, NAME)
    served = Served(EchoDesk(Identity("f", NAME, model.hash, 2048, 256, 16)), model, access, origins, most, names)
    thread = threading.Thread(target=lambda: asyncio.run(served.server.run()), name="http")
    thread.start()
    try:
        httpx.get(f"{served.url}/health", timeout=PATIENCE_S).raise_for_status()
        yield served
    finally:
        served.hang_up()
        served.server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def request(path: str, body: bytes | dict[str, Any], *, method: str = "POST", head: str = "", length: int | None = None) -> bytes:
    """A raw request."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(raw) if length is None else length
    lines = f"{method} {path} HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n{head}\r\n"
    return lines.encode() + raw


def reply(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One whole reply with a Content-Length: status, headers, body."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            raise ConnectionError(f"closed after {data!r}")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    while len(body) < int(headers["content-length"]):
        more = connection.recv(65536)
        if not more:
            raise ConnectionError("closed within the body")
        body += more
    return int(status.split()[1]), headers, body


def completion(prompt: list[int], **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": prompt, **fields}


def events(text: str) -> list[Any]:
    """The data of a stream; "[DONE]" as itself, comments left out."""
    said = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in said]
