"""A worker's figures for Prometheus, on an internal port; read at each scrape, kept nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from common.errors import StartError
from services.transfer.protocol import TransferCounts

PREFIX = "baton_worker_"


class Figures:
    """Serves what `read` returns: names ending in `_total` that only grow are counters, everything else is a gauge."""

    def __init__(self, host: str, port: int, read: Callable[[], dict[str, float]], words: Callable[[], dict[str, str]]) -> None:
        """`words`: what is said and not counted, as a label of a gauge that is 1."""
        registry = CollectorRegistry()
        registry.register(_Collector(read, words))  # type: ignore[arg-type]
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise StartError(f"metrics_port {port} cannot be used: {error.strerror}") from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


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
