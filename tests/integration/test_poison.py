"""A request that kills whoever launches its prompt, and the only prefill comes back each time: it ends, and soon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from scripts.launcher.cluster import Cluster
from tests.integration.talk import MODEL
from tests.systems import assert_conserved

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

POISON = 7
DEADLINE_S = 150.0


class Nurse:
    """Starts a dead prefill again at once, and counts."""

    def __init__(self, cluster: Cluster) -> None:
        self.deaths = 0
        self._cluster = cluster
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        child = self._cluster.children["prefill-0"]
        while not self._done.wait(0.1):
            if not child.alive:
                self.deaths += 1
                self._cluster.restart(child.name, wait=False)


@pytest.fixture
def nursed(launch: Callable[..., Cluster]) -> Iterator[tuple[Cluster, Nurse]]:
    cluster = launch(prefill=1, decode=1, role_flags={"prefill": {"die": f"poison:{POISON}"}})
    nurse = Nurse(cluster)
    yield cluster, nurse
    nurse.stop()


def test_it_ends_after_three_deaths_though_it_is_claimed_by_those_whom_no_gateway_knows_yet(nursed: tuple[Cluster, Nurse]) -> None:
    """A prefill that has just started claims what waits before the gateway has met it: what it said of the launch was not heard, its death
    did not count, and one after the other died until the deadline."""
    cluster, nurse = nursed
    asked = {"model": MODEL, "prompt": [POISON, 300, 301], "max_tokens": 4, "deadline": DEADLINE_S}
    began = time.monotonic()
    reply = httpx.post(f"{cluster.urls[0]}/v1/completions", json=asked, timeout=DEADLINE_S + 20)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "poison"), (reply.text, nurse.deaths, time.monotonic() - began)
    assert nurse.deaths == 3
    healthy = {**asked, "prompt": [300, 301, 302]}
    assert httpx.post(f"{cluster.urls[0]}/v1/completions", json=healthy, timeout=DEADLINE_S).status_code in (200, 503)
    cluster.wait_ready()
    assert_conserved(cluster)
