"""Pages by TCP between network namespaces behind a bridge and the machine that has the bridge."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.faults.network import Network, NetworkError
from services.transfer.outbound import PUSH_S
from services.transfer.protocol import Arrived, Posted, PushFailed, Sent
from services.transfer.ucx import UcxTransfer
from tests.integration.far_end import ALL, SHARD

pytestmark = pytest.mark.system

START_S, WAIT_S = 60.0, 20.0


class End:
    """A process with a transfer, as seen from here."""

    def __init__(self, wire: Connection) -> None:
        self.wire = wire

    def tell(self, method: str, *arguments: Any) -> None:
        self.wire.send((method, arguments))

    def next(self, kind: type, timeout_s: float = WAIT_S) -> Any:
        assert self.wire.poll(timeout_s), f"no {kind.__name__} within {timeout_s} s"
        event = self.wire.recv()
        assert isinstance(event, kind), event
        return event

    def expect(self, grant: int) -> Any:
        self.tell("expect", "sender", grant, ALL, ALL, (SHARD,))
        return self.next(Posted).ranks[0]

    def push(self, rank: Any, grant: int, peer: str = "receiver") -> None:
        self.tell("push", peer, rank, grant, grant, ALL, ALL)
        self.tell("finish_push", grant, grant)


@pytest.fixture
def network() -> Iterator[Network]:
    if lacking := Network.lacking():
        pytest.skip(f"no network namespaces here: {lacking}")
    with ExitStack() as stack:
        try:
            network = stack.enter_context(Network(("near", "far")))
        except NetworkError as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield network


@pytest.fixture
def end(network: Network, tmp_path: Path) -> Iterator[Callable[[str], End]]:
    """Starts one in a namespace, or with "" on the machine itself."""
    with ExitStack() as stack:

        def start(name: str) -> End:
            words, host = (network.within(name), network.address(name)) if name else ([], network.host)
            path = str(tmp_path / (name or "host"))
            listener = stack.enter_context(Listener(path, "AF_UNIX"))
            command = [*words, sys.executable, "-m", "tests.integration.far_end", path, host]
            process = subprocess.Popen(command, env={**os.environ, "UCX_TLS": "tcp,self"})
            stack.callback(process.wait)
            stack.callback(process.kill)
            listener._listener._socket.settimeout(START_S)  # type: ignore[attr-defined]
            one = End(stack.enter_context(listener.accept()))
            assert one.wire.poll(START_S), "not ready"
            assert one.wire.recv() == "ready"
            return one

        yield start


def test_pages_cross_a_bridge_from_and_to_the_machine_that_has_it(end: Callable[[str], End]) -> None:
    """UCX by itself leaves bridges out, and there is no other way."""
    host, far = end(""), end("far")
    for grant, (sender, receiver) in enumerate(((host, far), (far, host)), 1):
        sender.push(receiver.expect(grant), grant)
        assert sender.next(Sent).checksums == receiver.next(Arrived).checksums


def test_a_peer_that_is_cut_off_holds_up_nobody_else(network: Network, end: Callable[[str], End]) -> None:
    """UCX by itself waits for each connection, on the thread that serves all peers."""
    host, near, far = end(""), end("near"), end("far")
    lost = far.expect(1)
    network.cut("far")
    host.push(lost, 1, "far")
    began = time.monotonic()
    host.push(near.expect(2), 2, "near")
    assert host.next(Sent).grant == 2
    assert time.monotonic() - began < 4.0
    assert host.next(PushFailed).grant == 1
    assert time.monotonic() - began < 10.0, "15 s and more, once"
    network.heal("far")
    host.tell("close_peer", "far")
    host.push(far.expect(3), 3, "far again")
    assert host.next(Sent).grant == 3


def test_what_is_pushed_faster_than_the_link_carries_it_leaves_in_the_end(network: Network, end: Callable[[str], End]) -> None:
    """Each push failed that had to wait for others for 5 s: all began again from the first byte, and so on."""
    if shutil.which("tc") is None:
        pytest.skip("no tc")
    near, far = end("near"), end("far")
    for name in ("near", "far"):
        limit = "tc qdisc add dev eth0 root tbf rate 100mbit burst 64kb latency 200ms"
        subprocess.run([*network.within(name), *limit.split()], check=True)
    grants = range(1, 61)
    ranks = [far.expect(grant) for grant in grants]
    began = time.monotonic()
    for grant, rank in zip(grants, ranks, strict=True):
        near.push(rank, grant)
    assert [near.next(Sent).grant for _ in grants] == [*grants]
    assert time.monotonic() - began > PUSH_S + 1.0, "not slow enough to show anything"
    assert {far.next(Arrived).grant for _ in grants} == {*grants}


def test_a_network_card_that_goes_keeps_nobody_from_being_met(network: Network) -> None:
    """Found by running beside something that makes and removes cards: the transfer ended, and the worker with it."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pages = torch.zeros(2, 4096, dtype=torch.uint8)
    _ip("link add baton-gone type veth peer name baton-gone-too")
    try:
        _ip("addr add 10.231.7.1/24 dev baton-gone")
        for name in ("baton-gone", "baton-gone-too"):
            _ip(f"link set {name} up")
        transfer = UcxTransfer(pages, SHARD, events.put)
    finally:
        _ip("link del baton-gone")
    try:
        transfer.expect("a", 1, (0, 1), (0, 1), (SHARD,))
        assert isinstance(events.get(timeout=WAIT_S), Posted)
    finally:
        transfer.close()


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)
