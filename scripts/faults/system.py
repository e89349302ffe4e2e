"""The system under chaos: a cluster whose workers may live in network namespaces and whose wall clocks can be moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from scripts.faults.clients import Gateway
from scripts.faults.clocks import Clocks
from scripts.faults.network import Network, NetworkError
from scripts.launcher.__main__ import wait_served
from scripts.launcher.child import Child
from scripts.launcher.cluster import Cluster, Shape
from scripts.launcher.show import Progress
from scripts.launcher.valkey import Valkey

SETTLE_S = 15.0


@dataclass
class System:
    """What runs, and what cannot be done to it here (`skipped`: kind of fault → why)."""

    cluster: Cluster
    network: Network | None
    clocks: Clocks
    skipped: dict[str, str]
    lives: dict[str, int] = field(default_factory=dict)
    """Starts of each process so far."""

    @property
    def valkey(self) -> Valkey:
        assert self.cluster.valkey is not None
        return self.cluster.valkey

    @property
    def cuttable(self) -> list[str]:
        return [child.name for child in self.cluster.children.values() if child.within]

    @property
    def clocked(self) -> list[str]:
        return [] if self.clocks.lacking else ["redis", *self.cluster.children]

    def serving(self) -> list[Gateway]:
        """Gateways that are ready."""
        found = []
        for child in self.cluster.gateways:
            facts = child.facts
            if facts is not None and child.alive:
                found.append(Gateway(child.name, f"http://127.0.0.1:{facts['http_port']}", self.lives.get(child.name, 0)))
        return found

    def restart(self, name: str) -> None:
        self.lives[name] = self.lives.get(name, 0) + 1
        self.cluster.restart(name, wait=False)

    def figures(self, child: Child) -> dict[str, float]:
        """What one worker says of itself. Raises httpx.HTTPError."""
        facts = child.facts
        if facts is None:
            return {}
        host = urlsplit(facts["control"]).hostname
        text = httpx.get(f"http://{host}:{facts['metrics_port']}/metrics", timeout=2).text
        lines = [line.split() for line in text.splitlines() if line.startswith("baton_worker_")]
        return {name.removeprefix("baton_worker_"): float(value) for name, value in lines}

    def leaked(self) -> dict[str, dict[str, float]]:
        """Workers whose pages or executions are not all free, now."""
        busy: dict[str, dict[str, float]] = {}
        for child in self.cluster.workers:
            try:
                state = self.figures(child)
            except httpx.HTTPError as error:
                busy[child.name] = {f"{type(error).__name__}": 1}
                continue
            kept = {k: state[k] for k in ("pages_held", "pages_in_transit", "executions") if state.get(k)}
            total = sum(state.get(f"pages_{part}", 0) for part in ("free", "cached", "held", "in_transit"))
            if kept or total != state.get("pages_total"):
                busy[child.name] = {**kept, "pages_missing": state.get("pages_total", 0) - total}
        return busy


@contextlib.contextmanager
def running(shape: Shape, *, cut: bool, clocks: bool, persistent: bool, folder: Path, say: Progress) -> Iterator[System]:
    """Started and served. `cut`: half of the workers in namespaces of their own. Raises ClusterError."""
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        names = [f"{role}-{n}" for role in ("prefill", "decode") for n in range(getattr(shape, role)) if n % 2]
        network = None
        reason = (Network.lacking() if names else "every worker is the only one of its role") if cut else "not asked for"
        if reason is None:
            try:
                network = stack.enter_context(Network(names))
            except NetworkError as error:
                reason = str(error)
        if reason is not None:
            skipped["cut"] = reason
        clock = Clocks(folder)
        if not clocks:
            clock.lacking = "not asked for"
        if clock.lacking is not None:
            skipped["clock_step"] = clock.lacking
        hosts = ("127.0.0.1",) if network is None else (network.host, "127.0.0.1")
        valkey = Valkey(hosts, persistent=persistent, env=clock.env("redis"))
        cluster = stack.enter_context(Cluster(shape, say, valkey))
        for child in cluster.children.values():
            child.env = clock.env(child.name)
            if network is None:
                continue
            inside = child.name in names
            child.flags["host"] = network.address(child.name) if inside else network.host
            child.within = network.within(child.name) if inside else []
        cluster.start()
        for url in cluster.urls:
            wait_served(url)
        yield System(cluster, network, clock, skipped)
