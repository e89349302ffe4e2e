"""Whole systems for tests: real processes, a real Valkey, the real small model in float32; and what their workers say of themselves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx

from scripts.launcher.__main__ import wait_served
from scripts.launcher.cluster import Cluster, Shape

SETTLE_S = 10.0
TALKATIVE = {"log_level": "debug"}
"""All that is ever logged, so that what must not be is noticed."""
SMALL = {"max_request_tokens": "2048", "pages": "640"}
"""Pools that the tests can fill, for every worker."""


def small(model: Path, **shape: Any) -> Shape:
    flags = {**SMALL, **TALKATIVE, **shape.pop("worker_flags", {})}
    roles = shape.pop("role_flags", {})
    roles = {**roles, "gateway": {**TALKATIVE, **roles.get("gateway", {})}}
    return Shape(model=model, dtype="float32", model_name="smollm2", worker_flags=flags, role_flags=roles, **shape)


def figures(cluster: Cluster, name: str) -> dict[str, float]:
    """What one worker exports to Prometheus, by the short name."""
    facts = cluster.children[name].facts
    assert facts is not None
    text = httpx.get(f"http://127.0.0.1:{facts['metrics_port']}/metrics", timeout=5).text
    lines = [line.split() for line in text.splitlines() if line.startswith("baton_worker_")]
    return {name.removeprefix("baton_worker_"): float(value) for name, value in lines}


def transport(cluster: Cluster, name: str) -> str:
    """What carries a prefill's pages, by UCX's own report."""
    return next(name for name in figures(cluster, name) if name.startswith("transport{")).partition('"')[2].partition('"')[0]


def assert_conserved(cluster: Cluster) -> None:
    """Everything is free once the work is done: no page held or in transit, nothing kept for anybody."""
    give_up = time.monotonic() + SETTLE_S
    while True:
        busy = {}
        for child in cluster.workers:
            if child.alive:
                state = figures(cluster, child.name)
                if state["pages_free"] + state["pages_cached"] != state["pages_total"] or state["executions"]:
                    busy[child.name] = state
        if not busy:
            return
        if time.monotonic() > give_up:
            raise AssertionError(f"not conserved: {busy}")
        time.sleep(0.05)


def serve(cluster: Cluster) -> None:
    cluster.start()
    for url in cluster.urls:
        wait_served(url)
