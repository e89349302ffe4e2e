"""UCX ways that are slower than what is pushed on them, beside ways that are stuck. All ends live in this process."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from common.errors import TransferError
from common.messages import GrantedRank, Shard
from services.transfer.protocol import Arrived, Landed, Posted, PushFailed, Sent, TransferEvent
from services.transfer.ucx import IDLE_WAIT_S, UcxTransfer
from services.worker.transfers import Transfers
from services.worker.watch import STUCK_LOOKS, STUCK_S, Watch

PAGES, PAGE_BYTES = 8, 1 << 18
SHARD = Shard(0, (0, 30), (0, 3))
ALL = tuple(range(PAGES))
PUSH_S = 1.0
PAGE_S = 0.004
"""What a page costs a slow receiver. A window of 64 takes far less than PUSH_S."""
GRANTS = 80
"""So many take 2.5 s there, and none is behind its own pages only."""
WAIT_S = 10.0

pytestmark = pytest.mark.system


@dataclass(eq=False)
class End:
    """A transfer with its pages and its events."""

    pages: torch.Tensor = field(default_factory=lambda: torch.randint(0, 256, (PAGES, PAGE_BYTES), dtype=torch.uint8))
    events: queue.SimpleQueue[TransferEvent] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.transfer = UcxTransfer(self.pages, SHARD, self.events.put, push_s=PUSH_S)

    def expect(self, grant: int) -> GrantedRank:
        self.transfer.expect("prefill", grant, ALL, ALL, (SHARD,))
        posted = self.events.get(timeout=WAIT_S)
        while not isinstance(posted, Posted):
            posted = self.events.get(timeout=WAIT_S)
        return posted.ranks[0]

    def push(self, peer: str, rank: GrantedRank, grant: int) -> None:
        self.transfer.push(peer, rank, grant, grant, ALL, ALL)
        self.transfer.finish_push(grant, grant)

    def before_each_page(self, what: Callable[[], object]) -> None:
        """On this end's thread, as it receives."""
        places = self.transfer._places
        checksums = places.checksums

        def slowly(pages: list[int], indices: list[int], part: Shard) -> list[int]:
            for _ in pages:
                what()
            return checksums(pages, indices, part)

        places.checksums = slowly  # type: ignore[method-assign,assignment]


@pytest.fixture
def make() -> Iterator[Callable[[], End]]:
    made: list[End] = []

    def one() -> End:
        made.append(End())
        return made[-1]

    yield one
    for end in made:
        end.transfer.close()


def test_all_of_a_burst_leaves_on_a_slow_way(make: Callable[[], End]) -> None:
    prefill, decode = make(), make()
    decode.before_each_page(lambda: time.sleep(PAGE_S))
    ranks = [decode.expect(grant) for grant in range(1, GRANTS + 1)]
    began = time.monotonic()
    for grant, rank in enumerate(ranks, 1):
        prefill.push("decode", rank, grant)
    said = [prefill.events.get(timeout=WAIT_S) for _ in ranks]
    assert [type(event) for event in said] == [Sent] * GRANTS
    assert time.monotonic() - began > 2 * PUSH_S, "not slow enough to show anything"
    assert {type(decode.events.get(timeout=WAIT_S)) for _ in ranks} == {Arrived}


def test_a_flush_comes_behind_what_a_slow_way_still_carries(make: Callable[[], End]) -> None:
    prefill, decode = make(), make()
    decode.before_each_page(lambda: time.sleep(PAGE_S))
    ranks = [decode.expect(grant) for grant in range(1, GRANTS + 2)]
    for grant, rank in enumerate(ranks[:-1], 1):
        prefill.push("decode", rank, grant)
    decode.transfer.abandon(GRANTS + 1, told=True)
    prefill.transfer.flush("decode", ranks[-1], GRANTS + 1, GRANTS + 1, ALL)
    said = [decode.events.get(timeout=WAIT_S) for _ in ranks]
    assert said.index(Landed(GRANTS + 1)) > GRANTS // 2, "a byte overtakes pages on their way, at most a window of them"
    assert sum(isinstance(event, Arrived) for event in said) == GRANTS


def test_a_stuck_way_fails_in_time_beside_one_that_is_never_quiet(make: Callable[[], End]) -> None:
    prefill, stuck, busy = make(), make(), make()
    go_on = threading.Event()
    try:
        lost = [stuck.expect(grant) for grant in range(1, GRANTS + 1)]
        stuck.before_each_page(lambda: go_on.wait(WAIT_S))
        began = time.monotonic()
        for grant, rank in enumerate(lost, 1):
            prefill.push("stuck", rank, grant)
        event: TransferEvent = Sent(0, 0, ())
        for grant in count(1001):
            prefill.push("busy", busy.expect(grant), grant)
            event = prefill.events.get(timeout=WAIT_S)
            if isinstance(event, PushFailed):
                break
        assert event.handoff <= GRANTS
        assert PUSH_S <= time.monotonic() - began < 3 * PUSH_S
    finally:
        go_on.set()


# ------------------------------------------------------------------------------------------------- a thread that hangs


def watched(looked_at: float) -> Transfers:
    """Only what `watch` looks at."""
    transfers = Transfers.__new__(Transfers)
    transfers._own = SimpleNamespace(looked_at=looked_at, check=lambda: None)  # type: ignore[assignment]
    transfers._watch = Watch(transfers._own)
    return transfers


def test_a_thread_that_does_not_come_round_ends_the_worker() -> None:
    """What it had been given waited for ever, and the worker beat on."""
    transfers = watched(100.0)
    transfers.watch(100.0 + STUCK_S - 1)
    with pytest.raises(TransferError, match="not come round for 3"):
        for look in range(STUCK_LOOKS):
            transfers.watch(100.0 + STUCK_S + 1 + look / 2)


def test_a_thread_that_has_died_ends_the_worker_at_once() -> None:
    transfers = watched(100.0)

    def dead() -> None:
        raise TransferError("the transfer has ended")

    transfers._own.check = dead  # type: ignore[method-assign]
    with pytest.raises(TransferError, match="has ended"):
        transfers.watch(100.0)


def test_a_process_that_was_stopped_is_not_taken_for_it() -> None:
    transfers = watched(100.0)
    for look in range(STUCK_LOOKS - 1):
        transfers.watch(200.0 + look / 2)
    transfers._own.looked_at = 201.5
    for look in range(10):
        transfers.watch(202.0 + look / 2)


def test_a_thread_with_nothing_to_do_comes_round_and_one_that_hangs_does_not() -> None:
    end, let_go = End(), threading.Event()
    try:
        before = end.transfer.looked_at
        time.sleep(2.5 * IDLE_WAIT_S)
        assert end.transfer.looked_at > before + IDLE_WAIT_S
        end.transfer._command(lambda: let_go.wait(WAIT_S))
        time.sleep(1.5 * IDLE_WAIT_S)
        assert time.monotonic() - end.transfer.looked_at > IDLE_WAIT_S
    finally:
        let_go.set()
        end.transfer.close()
