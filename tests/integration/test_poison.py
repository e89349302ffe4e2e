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


def test_a_worker_that_hangs_ends_by_itself_and_its_request_goes_on(launch: Callable[..., Cluster]) -> None:
    """It was taken for dead after a quarter of a minute, heard again, trusted again, and kept what came for ever."""
    cluster = launch(prefill=1, decode=1, role_flags={"prefill": {"die": f"hang:{POISON}"}})
    child = cluster.children["prefill-0"]
    asked = {"model": MODEL, "prompt": [POISON, 300, 301], "max_tokens": 4, "deadline": DEADLINE_S}
    replies: list[httpx.Response] = []
    url = f"{cluster.urls[0]}/v1/completions"
    client = threading.Thread(target=lambda: replies.append(httpx.post(url, json=asked, timeout=DEADLINE_S)))
    client.start()
    give_up = time.monotonic() + 60
    while child.alive:
        assert time.monotonic() < give_up, "it beats on"
        time.sleep(0.1)
    assert child.process is not None and child.process.returncode == 1
    assert "the engine hangs" in child.log.read_text()
    child.flags.pop("die")
    cluster.restart(child.name, wait=False)
    client.join(DEADLINE_S)
    assert [reply.status_code for reply in replies] == [200]
    assert_conserved(cluster)
