"""What is watched from outside while a run goes on: memory of each process, and how soon requests of dead workers are queued again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import httpx
import psutil

from scripts.faults.system import System
from scripts.faults.trend import trend

EVERY_S = 0.5
METRIC = "baton_reenqueue_seconds_bucket"
MIB = 1 << 20
LEAST_S = 120.0
"""A shorter life says nothing about the slope of its memory."""


class Watch:
    """`unclear_until()`: what gateways measure before that moment does not count."""

    def __init__(self, system: System, unclear_until: Callable[[], float]) -> None:
        self._system = system
        self._unclear_until = unclear_until
        self._memory: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        self._buckets: dict[tuple[str, int], dict[float, float]] = {}
        self.reenqueued: dict[float, int] = defaultdict(int)
        """New attempts after a worker was lost, by the upper bound of the seconds they took."""

    async def run(self) -> None:
        """Until cancelled."""
        async with httpx.AsyncClient(timeout=2.0) as client:
            while True:
                began = time.monotonic()
                self._weigh(began)
                for gateway in self._system.serving():
                    with contextlib.suppress(httpx.HTTPError):
                        text = (await client.get(f"{gateway.url}/metrics")).text
                        self._count((gateway.name, gateway.life), buckets(text))
                await asyncio.sleep(max(0.0, began + EVERY_S - time.monotonic()))

    @property
    def worst_reenqueue_s(self) -> float | None:
        """The upper bound of the slowest one's bucket."""
        return max((bound for bound, count in self.reenqueued.items() if count), default=None)

    def memory(self, warm_up_s: float) -> dict[str, Any]:
        """Of each process' longest life: MiB at its end, and its slope with the upper bound, in MiB an hour, after the warm-up."""
        found: dict[str, Any] = {}
        for (name, _), series in sorted(self._memory.items(), key=lambda one: len(one[1])):
            settled = [(at, value) for at, value in series if at >= series[0][0] + warm_up_s]
            line = trend(settled) if settled and settled[-1][0] - settled[0][0] >= LEAST_S else None
            slope = {"slope": round(line.slope, 1), "upper_95": round(line.upper, 1)} if line is not None else {}
            found[name] = {"mib": round(series[-1][1], 1), "seconds": round(series[-1][0] - series[0][0]), **slope}
        return dict(sorted(found.items()))

    def _weigh(self, now: float) -> None:
        pids = {child.name: child.pid for child in self._system.cluster.children.values() if child.alive}
        if self._system.valkey.alive:
            pids["redis"] = self._system.valkey.pid
        for name, pid in pids.items():
            with contextlib.suppress(psutil.Error):
                self._memory[(name, pid)].append((now, psutil.Process(pid).memory_info().rss / MIB))

    def _count(self, gateway: tuple[str, int], now: dict[float, float]) -> None:
        before = self._buckets.get(gateway, {})
        self._buckets[gateway] = now
        if time.monotonic() < self._unclear_until():
            return
        for bound, count in now.items():
            self.reenqueued[bound] += int(count - before.get(bound, 0.0))


def buckets(metrics: str) -> dict[float, float]:
    """Observations in each bucket of the histogram, by upper bound; Prometheus' are cumulative."""
    found: dict[float, float] = {}
    below = 0.0
    for line in metrics.splitlines():
        if line.startswith(METRIC):
            bound = float(line.partition('le="')[2].partition('"')[0])
            total = float(line.split()[-1])
            found[bound], below = total - below, total
    return found
