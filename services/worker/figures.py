"""A worker's figures for Prometheus, on an internal port; read at each scrape, kept nowhere."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer

from common.errors import StartError
from common.logs import get_logger
from services.transfer.protocol import TransferCounts

log = get_logger(__name__)

PREFIX = "baton_worker_"
CONNECTION_S = 10.0
"""A connection is ended after so long: a client that sends nothing would keep a thread and a file descriptor for ever."""
CONNECTIONS = 16
"""Served at once; more are closed as they come."""


class Figures:
    """Serves what `read` returns: names ending in `_total` that only grow are counters, everything else is a gauge."""

    def __init__(self, host: str, port: int, read: Callable[[], dict[str, float]], words: Callable[[], dict[str, str]]) -> None:
        """`words`: what is said and not counted, as a label of a gauge that is 1."""
        registry = CollectorRegistry()
        registry.register(_Collector(read, words))  # type: ignore[arg-type]
        try:
            self._server = _Server(host, port)
        except OSError as error:
            raise StartError(f"metrics_port {port} cannot be used: {error.strerror}") from error
        self._server.set_app(make_wsgi_app(registry))
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, name="figures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingWSGIServer):
    """One thread per connection, which are few and short: see CONNECTIONS and CONNECTION_S."""

    def __init__(self, host: str, port: int) -> None:
        self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._deadlines: dict[socket.socket, float] = {}
        """Of open connections."""
        self._lock = threading.Lock()
        super().__init__((str(address[0]), port), _Handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return len(self._deadlines) < CONNECTIONS

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._deadlines[request] = time.monotonic() + CONNECTION_S
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Also of a refused one. Closed under the lock: its descriptor must not be another's when `_end` uses it."""
        with self._lock:
            self._deadlines.pop(request, None)
            super().shutdown_request(request)

    def service_actions(self) -> None:
        """After each wait of `serve_forever`, twice a second at least."""
        self._end(time.monotonic())

    def server_close(self) -> None:
        super().server_close()
        self._end(float("inf"))

    def _end(self, now: float) -> None:
        """Of connections overdue by then; their threads see it and close them. A deadline for each read would be renewed by each byte."""
        with self._lock:
            for connection, deadline in self._deadlines.items():
                if deadline <= now:
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away amid its request is none of ours."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            log.exception("figures could not be served", error)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no news."""


class _Collector:
    def __init__(self, read: Callable[[], dict[str, float]], words: Callable[[], dict[str, str]]) -> None:
        self._read = read
        self._words = words

    def collect(self) -> Iterable[Metric]:
        for name, word in self._words().items():
            said = GaugeMetricFamily(PREFIX + name, name, labels=[name])
            said.add_metric([word], 1)
            yield said
        for name, value in self._read().items():
            if name.endswith("_total") and name != "pages_total":
                yield CounterMetricFamily(PREFIX + name.removesuffix("_total"), name, value=value)
            else:
                yield GaugeMetricFamily(PREFIX + name, name, value=value)


def transfer_figures(counts: TransferCounts) -> dict[str, float]:
    return {
        "sent_pages_total": counts.sent_pages,
        "sent_bytes_total": counts.sent_bytes,
        "received_pages_total": counts.received_pages,
        "received_bytes_total": counts.received_bytes,
        "transfer_failures_total": counts.failures,
    }
