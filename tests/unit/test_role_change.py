"""A worker takes on another role only when nothing of the one before can still write into its pool."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from common.errors import StartError, TransferError
from common.messages import Layout
from common.service import Service
from services.colocated.worker import ColocatedWorker
from services.engine.grid import Grid
from services.transfer import ucx
from services.transfer.protocol import TransferEvent
from services.transfer.ucx import UcxTransfer
from tests.unit.in_process import serve


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


def ended(kind: type[ColocatedWorker], stop: Callable[[Service], None], hang: threading.Event | None = None) -> Service:
    """What the service says after a worker has served and was stopped so, its engine waiting for `hang`."""

    def begun(worker: Any) -> None:
        if hang is not None:
            worker.engine.post(hang.wait)

    return serve(begun, kind=kind, stop=stop)[1]


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
