"""Pages over UCX between real processes, and what becomes of them when one is killed or stopped in the middle."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from common.messages import Shard
from services.transfer.faults import Fault
from services.transfer.protocol import Arrived, Landed, Posted, PushFailed, Sent
from services.transfer.ucx import UcxTransfer

pytestmark = pytest.mark.system

PAGES, PAGE_BYTES = 400, 368_640
SHARD = Shard(0, (0, 30), (0, 3))
ALL = tuple(range(PAGES))
WAIT_S = 20.0
CLONE_NEWNET = 0x40000000
THEIRS, OURS, NEW = 3, 5, 9
"""What pages are filled with, by whom."""
NONE = Fault()
LAST_PAGE_STALLS = Fault("stall", every=PAGES)
"""So that a transfer can be interrupted however fast it is: it never arrives by itself."""


def serve(wire: Connection, fault: Fault, apart: bool) -> None:
    """The other process: does what it is told to its transfer, and tells every event. `apart`: in a network namespace of its own."""
    if apart and ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        wire.send(("refused", os.strerror(ctypes.get_errno())))
        return
    torch.set_num_threads(1)
    pages = torch.full((PAGES, PAGE_BYTES), THEIRS, dtype=torch.uint8)
    pages[:, 0] = torch.arange(PAGES) % 251
    transfer = UcxTransfer(pages, SHARD, lambda event: wire.send(("event", event)), fault=fault)
    wire.send(("ready", None))
    while True:
        method, arguments = wire.recv()
        if method == "close":
            break
        if method == "counts":
            wire.send(("counts", transfer.counts))
        elif method == "sum":
            wire.send(("sum", int(pages.sum(dtype=torch.int64))))
        else:
            getattr(transfer, method)(*arguments)
    transfer.close()
    wire.send(("closed", len(os.listdir("/proc/self/fd"))))


class Other:
    """The other process as seen from here."""

    def __init__(self, fault: Fault = NONE, *, apart: bool = False) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.wire, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, fault, apart), daemon=True)
        self.process.start()
        theirs.close()
        if apart and self.wire.poll(60.0) and not self.process.is_alive():
            pytest.skip(f"no network namespace for this user: {self.answer('refused')}")
        self.answer("ready", timeout_s=60.0)

    def tell(self, method: str, *arguments: Any) -> None:
        self.wire.send((method, arguments))

    def answer(self, kind: str, timeout_s: float = WAIT_S) -> Any:
        assert self.wire.poll(timeout_s), f"no {kind} within {timeout_s} s"
        said, what = self.wire.recv()
        assert said == kind, (said, what)
        return what

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)


class Here:
    """This process's end."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.pages = torch.full((PAGES, PAGE_BYTES), OURS, dtype=torch.uint8)
        self.transfer = UcxTransfer(self.pages, SHARD, self.events.put)

    def next(self, kind: type, timeout_s: float = WAIT_S) -> Any:
        event = self.events.get(timeout=timeout_s)
        assert isinstance(event, kind), event
        return event

    def expect(self, grant: int, peer: str = "prefill") -> Any:
        self.transfer.expect(peer, grant, ALL, ALL, (SHARD,))
        return self.next(Posted).ranks[0]

    def until_first_page(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.transfer.counts.received_pages:
            assert time.monotonic() < deadline, "no page came"
            time.sleep(0.0001)


EITHER = pytest.mark.parametrize("transports", ["", "tcp,self"], ids=["fastest", "tcp"], indirect=True)
"""Pages of one host go by zero-copy reads, over TCP as copies: their receives do not end in the same ways."""
ONE_HOST = pytest.mark.skipif("UCX_TLS" in os.environ, reason="what is to carry the pages has been chosen")


@pytest.fixture(autouse=True)
def transports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those UCX may choose from, in this process and in those that it starts."""
    if chosen := getattr(request, "param", ""):
        monkeypatch.setenv("UCX_TLS", chosen)


@pytest.fixture
def here() -> Iterator[Here]:
    end = Here()
    yield end
    end.transfer.close()


@pytest.fixture
def other() -> Iterator[Other]:
    end = Other()
    yield end
    end.kill()


@pytest.fixture
def unfinished() -> Iterator[Other]:
    """One whose push does not end by itself."""
    end = Other(LAST_PAGE_STALLS)
    yield end
    end.kill()


def _push(other: Other, rank: Any, grant: int) -> None:
    other.tell("push", "decode", rank, grant, grant, ALL, ALL)
    other.tell("finish_push", grant, grant)


def test_pages_cross_processes_whole_and_verified(here: Here, other: Other) -> None:
    for grant in (1, 2):
        here.pages.fill_(OURS)
        _push(other, here.expect(grant), grant)
        arrived, sent = here.next(Arrived), other.answer("event")
        assert isinstance(sent, Sent)
        assert sent.checksums == arrived.checksums
        assert bool((here.pages[:, 0] == torch.arange(PAGES) % 251).all())
        assert bool((here.pages[:, 1:] == THEIRS).all())
        assert here.transfer.counts.received_bytes == grant * PAGES * PAGE_BYTES
    other.tell("counts")
    assert other.answer("counts").sent_bytes == 2 * PAGES * PAGE_BYTES


@ONE_HOST
def test_containers_with_networks_of_their_own_do_not_wait_for_a_timer(here: Here) -> None:
    """UCX wakes a peer in shared memory through a socket that does not leave the network namespace."""
    other = Other(apart=True)
    try:
        took = []
        for grant in range(1, 5):
            rank, began = here.expect(grant), time.monotonic()
            _push(other, rank, grant)
            here.next(Arrived)
            other.answer("event")
            took.append(time.monotonic() - began)
    finally:
        other.kill()
    assert min(took[1:]) < 0.5, took


@ONE_HOST
def test_the_receiver_reads_and_says_by_what(here: Here, other: Other) -> None:
    other.tell("expect", "here", 1, ALL, ALL, (SHARD,))
    here.transfer.push("there", other.answer("event").ranks[0], 1, 1, ALL, ALL)
    here.transfer.finish_push(1, 1)
    here.next(Sent)
    assert here.transfer.transport.endswith("cma"), "not the zero-copy read that one host can do"


@EITHER
def test_a_killed_sender_leaves_pages_that_can_be_granted_again(here: Here, unfinished: Other) -> None:
    _push(unfinished, here.expect(1), 1)
    here.until_first_page()
    unfinished.kill()
    here.transfer.close_peer("prefill")
    assert here.next(Landed) == Landed(1)
    other = Other()
    try:
        _push(other, here.expect(2, peer="successor"), 2)
        assert here.next(Arrived).grant == 2
    finally:
        other.kill()


@EITHER
def test_a_sender_killed_before_it_pushed(here: Here, other: Other) -> None:
    here.expect(1)
    other.kill()
    here.transfer.close_peer("prefill")
    assert here.next(Landed, timeout_s=3.5) == Landed(1)


@EITHER
def test_a_killed_receiver_fails_the_push_within_seconds(here: Here, other: Other) -> None:
    other.tell("expect", "here", 1, ALL, ALL, (SHARD,))
    rank = other.answer("event").ranks[0]
    here.transfer.push("there", rank, 1, 1, ALL[:1], ALL[:1])
    _until(lambda: here.transfer.counts.sent_pages == 1)
    other.stop()
    here.transfer.push("there", rank, 1, 1, ALL[1:], ALL[1:])
    here.transfer.finish_push(1, 1)
    other.kill()
    killed_at = time.monotonic()
    failed = here.next(PushFailed)
    assert failed.handoff == 1 and "nothing has moved" not in failed.reason, "found out by the connection, not by waiting"
    assert time.monotonic() - killed_at < 6.0


def test_a_killed_idle_receiver_is_noticed_by_the_next_push(here: Here, other: Other) -> None:
    other.tell("expect", "here", 1, ALL, ALL, (SHARD,))
    rank = other.answer("event").ranks[0]
    here.transfer.push("there", rank, 1, 1, ALL[:1], ALL[:1])
    _until(lambda: here.transfer.counts.sent_pages == 1)
    other.kill()
    here.transfer.push("there", rank, 1, 1, ALL[1:], ALL[1:])
    failed = here.next(PushFailed, timeout_s=8.0)
    assert failed.handoff == 1 and "nothing has moved" not in failed.reason


@EITHER
def test_a_stopped_sender_cannot_write_into_pages_granted_to_others(here: Here, unfinished: Other) -> None:
    """The sender stops in the middle; its peer is closed, its pages are granted to a local sender, and it goes on."""
    _push(unfinished, here.expect(1), 1)
    here.until_first_page()
    unfinished.stop()
    here.transfer.close_peer("prefill")
    assert here.next(Landed) == Landed(1)

    local = Here()
    local.pages.fill_(NEW)
    try:
        rank = here.expect(2, peer="successor")
        local.transfer.push("decode", rank, 2, 2, ALL, ALL)
        local.transfer.finish_push(2, 2)
        assert here.next(Arrived).checksums == local.next(Sent).checksums
        unfinished.go_on()
        unfinished.tell("counts")  # it runs again, and has done what it can
        while unfinished.wire.recv()[0] != "counts":
            pass
        time.sleep(1.5)
        assert bool((here.pages == NEW).all())
        assert here.events.empty()
    finally:
        local.transfer.close()


@EITHER
def test_a_stopped_receiver_holds_up_nobody_else(here: Here, other: Other) -> None:
    """Sends to it cannot be recalled, but its peer can be closed, others be served, and the whole be closed in bounded time."""
    other.tell("expect", "here", 1, ALL, ALL, (SHARD,))
    rank = other.answer("event").ranks[0]
    here.transfer.push("there", rank, 1, 1, ALL[:1], ALL[:1])
    _until(lambda: here.transfer.counts.sent_pages == 1)
    other.stop()
    here.transfer.push("there", rank, 1, 1, ALL[1:], ALL[1:])
    here.transfer.close_peer("there")
    assert here.next(PushFailed, timeout_s=3.0).handoff == 1
    second = Other()
    try:
        second.tell("expect", "here", 1, ALL, ALL, (SHARD,))
        here.transfer.push("second", second.answer("event").ranks[0], 2, 1, ALL, ALL)
        here.transfer.finish_push(2, 1)
        assert here.next(Sent).handoff == 2
        assert isinstance(second.answer("event"), Arrived)
    finally:
        second.kill()
    began = time.monotonic()
    here.transfer.close()
    assert time.monotonic() - began < 7.0


def _until(true: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)
