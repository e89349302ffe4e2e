"""A process that may open no more files meets nobody new, serves on, and meets them as soon as it can. The limit is the system's own."""

from __future__ import annotations

import asyncio
import os
import queue
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

import pytest
import torch
from redis.asyncio import Redis

from common import names
from common.control import ControlClient, ControlServer
from common.errors import TransferError
from common.fleet import Fleet
from common.messages import Identity, Incarnation, Introduction, Letter, Shard, Token, Tokens, WorkerBeat
from common.messages import Key as ExecutionKey
from common.tokens import TokenPublisher, TokenSubscriber
from services.transfer.protocol import NotPosted, Posted, TransferEvent
from services.transfer.ucx import UcxTransfer

pytestmark = pytest.mark.system

WAIT_S = 10.0
SHARD = Shard(0, (0, 1), (0, 1))


@contextmanager
def no_more_files() -> Iterator[None]:
    """Every file of this process that is not open yet fails with EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    holes: list[int] = []
    try:
        with suppress(OSError):
            while True:
                holes.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for hole in holes:
            os.close(hole)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def until(condition: Callable[[], object]) -> None:
    give_up = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up, "it did not come true"
        await asyncio.sleep(0.01)


async def test_a_peer_that_could_not_be_met_is_met_later(redis: Redis) -> None:
    """It ended the process, a gateway with all its streams; and nobody would have tried again."""
    letters: list[Letter] = []
    server = ControlServer("d", "127.0.0.1", letters.append)
    client = ControlClient("p", lambda letter: None)
    fleet = Fleet(redis, "f")
    tries: list[bool] = []

    def meet(peers: dict[Incarnation, Introduction], identity: Identity | None) -> bool:
        if not tries:
            with no_more_files():
                tries.append(client.connect("d", server.address))
        else:
            tries.append(client.connect("d", server.address))
        return tries[-1]

    keeping = asyncio.create_task(fleet.keep(Introduction("prefill", "p", "tcp://127.0.0.1:1", "f" * 16), None, meet))
    try:
        await until(lambda: len(tries) == 2)
        assert tries == [False, True]
        client.send("d", WorkerBeat("prefill", 1, 0, False, 0.1, 1, 1, 0, 0))  # type: ignore[arg-type]
        await until(lambda: letters)
        await asyncio.sleep(2 * names.BEAT_S)
        assert tries == [False, True], "whom it has met it does not meet again"
    finally:
        keeping.cancel()
        client.close()
        server.close()


async def test_a_gateway_that_could_not_be_met_is_met_by_its_next_beat() -> None:
    parcels: list[object] = []
    gateway = TokenSubscriber("g", "127.0.0.1", parcels.append)
    publisher = TokenPublisher("w")
    try:
        with no_more_files():
            publisher.open("g", gateway.address)
        assert not publisher.knows("g")
        publisher.open("g", gateway.address)
        await until(lambda: publisher.is_open("g"))
        assert publisher.send("g", [Tokens(ExecutionKey("r", 0, 1, "e"), [Token(0, 1)])])
        await until(lambda: parcels)
    finally:
        publisher.close_all()
        gateway.close()


def test_a_grant_for_which_nothing_can_be_received_is_refused() -> None:
    """The transfer's thread ended, nobody was told, and the grant waited half a minute for the process to end."""
    events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
    transfer = UcxTransfer(torch.zeros((4, 4096), dtype=torch.uint8), SHARD, events.put)
    grants = count(1)
    try:
        with no_more_files():
            transfer.expect("p", next(grants), (0,), (0,), (SHARD,))
            assert events.get(timeout=WAIT_S) == NotPosted(1)
        transfer.expect("p", next(grants), (0,), (0,), (SHARD,))
        posted = events.get(timeout=WAIT_S)
        assert isinstance(posted, Posted) and posted.grant == 2
        transfer.check()
    finally:
        transfer.close()


def test_a_worker_that_can_receive_nothing_for_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started anew it may do better; with nothing running here it would draw every prompt to itself."""
    monkeypatch.setattr("services.transfer.ucx.UNREADY_S", 0.1)
    events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
    transfer = UcxTransfer(torch.zeros((4, 4096), dtype=torch.uint8), SHARD, events.put)
    try:
        with no_more_files():
            transfer.expect("p", 1, (0,), (0,), (SHARD,))
            assert events.get(timeout=WAIT_S) == NotPosted(1)
            time.sleep(0.2)
            transfer.expect("p", 2, (0,), (0,), (SHARD,))
            give_up = time.monotonic() + WAIT_S
            with pytest.raises(TransferError, match="has ended"):
                while time.monotonic() < give_up:
                    transfer.check()
                    time.sleep(0.01)
    finally:
        transfer.close()


def test_a_process_may_open_more_files_and_sockets_than_the_shell_that_starts_it() -> None:
    script = """
import resource, zmq
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
from common.files import MOST_FILES, allow_files
from common.pump import new_socket
assert allow_files(100) == 100 and resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 256
allowed = allow_files()
assert allowed == (MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)) == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
sockets = [new_socket(zmq.DEALER, 10, 1000) for _ in range(min(1500, allowed // 2))]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
