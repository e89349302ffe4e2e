"""A worker takes on another role only when nothing of the one before can still write into its pool."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import StartError, TransferError
from common.messages import Identity, Layout
from common.queue import connect
from common.service import Service
from common.settings import WorkerSettings
from services.colocated.worker import ColocatedWorker
from services.engine.grid import Grid
from services.engine.pages import PagePool
from services.engine.policies import Limits
from services.engine.scheduler import Scheduler
from services.transfer import ucx
from services.transfer.protocol import TransferEvent
from services.transfer.ucx import UcxTransfer
from services.worker.ranks import Ranks
from services.worker.room import Memory, Room

LAYOUT = Layout(1, 1, 4, 1, "float32")
IDENTITY = Identity("f", "model", "t", 100, 25, 4)


class Idle:
    """A runner that nobody asks for anything."""

    depth = 1


class Unclosed(ColocatedWorker):
    """Its transfer's thread is stuck."""

    def close(self) -> None:
        raise TransferError("the transfer's thread has not ended")


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Where a thread hangs until the test has ended."""
    gate = threading.Event()
    yield gate
    gate.set()


def room(settings: WorkerSettings) -> Room:
    limits = Limits(64, 64)
    return Room(
        layout=LAYOUT,
        shards=Grid().shards(LAYOUT),
        ranks=Ranks(settings, Grid(), Path("model"), [[0]], "worker"),
        pool=None,  # type: ignore[arg-type]
        runner=Idle(),  # type: ignore[arg-type]
        scheduler=Scheduler(PagePool(64, 4), "chunked", limits),
        limits=limits,
        budget_tokens=64,
        longest_step_s=1.0,
        identity=IDENTITY,
        memory=Memory(0, 0, 0, 0, None),
        prefill_rate=1.0,
    )


def ended(kind: type[ColocatedWorker], stop: Callable[[Service], None], hang: threading.Event | None = None) -> Service:
    """What the service says after a worker has served and was stopped so, its engine waiting for `hang`."""

    async def run() -> Service:
        settings = WorkerSettings(host="127.0.0.1", drain_s=0.2, redis_url="redis://127.0.0.1:1/0")
        service, redis = Service("colocated", settings), connect(settings.redis_url, None)
        worker: Any = kind(room(settings), settings, service, redis, IDENTITY)
        if hang is not None:
            worker.engine.post(hang.wait)
        asyncio.get_running_loop().call_later(0.3, stop, service)
        await worker.run()
        await redis.aclose()
        return service

    return asyncio.run(run())


def test_with_its_threads_ended_a_worker_goes_on_in_another_role() -> None:
    service = ended(ColocatedWorker, lambda service: service.become("decode"))
    assert service.becoming == "decode" and service.error is None


def test_an_engine_that_has_not_ended_never_shares_its_pool_with_a_second_one(gate: threading.Event) -> None:
    """Two engines on one pool and one runner would write into each other's pages: wrong tokens, and nobody would know."""
    service = ended(ColocatedWorker, lambda service: service.become("decode"), hang=gate)
    assert service.becoming is None and isinstance(service.error, StartError) and "engine" in str(service.error)


def test_nor_does_a_transfer_that_has_not_ended() -> None:
    service = ended(Unclosed, lambda service: service.become("decode"))
    assert service.becoming is None and isinstance(service.error, StartError) and "transfer" in str(service.error)


@pytest.mark.parametrize("kind", [ColocatedWorker, Unclosed])
def test_at_the_end_of_the_process_what_hangs_ends_with_it(kind: type[ColocatedWorker], gate: threading.Event) -> None:
    service = ended(kind, lambda service: service.stop(), hang=gate)
    assert service.becoming is None and service.error is None


def test_a_transfer_says_when_its_thread_has_not_ended(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx, "CLOSE_S", 0.1)
    pages, shard = torch.zeros(2, 64, dtype=torch.uint8), Grid().shards(Layout(1, 1, 4, 2, "float32"))[0]
    stuck = threading.Event()

    def hear(event: TransferEvent) -> None:
        stuck.set()
        gate.wait()

    transfer = UcxTransfer(pages, shard, hear)
    transfer.expect("peer", 1, (0,), (0,), (shard,))
    assert stuck.wait(10)
    with pytest.raises(TransferError, match="has not ended"):
        transfer.close()
    gate.set()
    transfer.close()
