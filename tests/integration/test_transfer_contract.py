"""What every carrier must keep, over UCX and over the in-process twin alike. Both ends live in this process."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from common.messages import GrantedRank, Shard
from services.transfer import sending
from services.transfer.faults import Fault, parse
from services.transfer.protocol import Arrived, Landed, Posted, PushFailed, Sent, Transfer, TransferCounts, TransferEvent
from services.transfer.sending import Sender
from services.transfer.twin import Switchboard, TwinTransfer
from services.transfer.ucx import UcxTransfer

PAGES, PAGE_BYTES = 16, 20_000
SHARD = Shard(0, (0, 30), (0, 3))
WAIT_S = 10.0
QUIET_S = 0.3


@dataclass(eq=False)
class End:
    """A transfer with its pages and its events."""

    pages: torch.Tensor
    events: queue.SimpleQueue[TransferEvent] = field(default_factory=queue.SimpleQueue)
    transfer: Transfer = field(init=False)

    def next(self, kind: type, timeout_s: float = WAIT_S) -> TransferEvent:
        event = self.events.get(timeout=timeout_s)
        assert isinstance(event, kind), event
        return event

    def quiet(self) -> None:
        with pytest.raises(queue.Empty):
            raise AssertionError(self.events.get(timeout=QUIET_S))

    def expect(
        self, grant: int, pages: tuple[int, ...], indices: tuple[int, ...], peer: str = "prefill", starts: tuple[int, ...] = ()
    ) -> GrantedRank:
        self.transfer.expect(peer, grant, pages, indices, (SHARD,), starts)
        posted = self.next(Posted)
        assert isinstance(posted, Posted)
        assert posted.grant == grant
        return posted.ranks[0]


Maker = Callable[..., End]


@pytest.fixture(params=["twin", "ucx"])
def make(request: pytest.FixtureRequest) -> Iterator[Maker]:
    """Makes ends that belong together, and closes them."""
    board, made = Switchboard(), []

    def one(*, checksums: bool = True, fault: str | Fault = "", push_s: float = 5.0) -> End:
        end = End(torch.randint(0, 256, (PAGES, PAGE_BYTES), dtype=torch.uint8))
        fault = parse(fault) if isinstance(fault, str) else fault
        if request.param == "twin":
            end.transfer = TwinTransfer(end.pages, SHARD, end.events.put, board, checksums=checksums, fault=fault, push_s=push_s)
        else:
            end.transfer = UcxTransfer(end.pages, SHARD, end.events.put, checksums=checksums, fault=fault, push_s=push_s)
        made.append(end)
        return end

    yield one
    for end in made:
        end.transfer.close()


ALL = tuple(range(PAGES))


def test_pages_arrive_where_they_were_granted_and_are_counted(make: Maker) -> None:
    prefill, decode = make(), make()
    before = decode.pages.clone()
    places, indices, sources = (9, 3, 4), (0, 1, 5), (2, 7, 1)
    rank = decode.expect(1, places, indices)
    prefill.transfer.push("decode", rank, 4, 1, sources, indices)
    prefill.transfer.finish_push(4, 1)
    sent, arrived = prefill.next(Sent), decode.next(Arrived)
    assert isinstance(sent, Sent)
    assert isinstance(arrived, Arrived)
    assert (sent.handoff, sent.grant, arrived.grant) == (4, 1, 1)
    assert sent.checksums == arrived.checksums
    assert len(set(sent.checksums[0])) == 3
    for place, source in zip(places, sources, strict=True):
        assert torch.equal(decode.pages[place], prefill.pages[source])
    others = [page for page in ALL if page not in places]
    assert torch.equal(decode.pages[others], before[others])
    assert decode.transfer.counts == TransferCounts(received_pages=3, received_bytes=3 * PAGE_BYTES)
    assert prefill.transfer.counts == TransferCounts(sent_pages=3, sent_bytes=3 * PAGE_BYTES)
    assert prefill.transfer.transport


def test_pages_may_be_pushed_while_later_ones_compute(make: Maker) -> None:
    prefill, decode = make(), make()
    rank = decode.expect(1, ALL, ALL)
    for first in range(0, PAGES, 4):
        part = ALL[first : first + 4]
        prefill.transfer.push("decode", rank, 1, 1, part, part)
    prefill.quiet()
    arrived = decode.next(Arrived)
    prefill.transfer.finish_push(1, 1)
    sent = prefill.next(Sent)
    assert sent.checksums == arrived.checksums  # type: ignore[attr-defined]
    assert torch.equal(decode.pages, prefill.pages)


def test_several_grants_of_one_peer_and_several_peers_at_once(make: Maker) -> None:
    prefills, decode = [make(), make()], make()
    grants = {(0, 1): (0, 1), (1, 2): (2, 3), (0, 3): (4, 5), (1, 4): (6, 7)}
    ranks = {}
    for (who, grant), places in grants.items():
        decode.transfer.expect(f"prefill-{who}", grant, places, (0, 1), (SHARD,))
        posted = decode.next(Posted)
        assert isinstance(posted, Posted)
        ranks[grant] = posted.ranks[0]
    assert ranks[1].address != ranks[2].address
    for who, grant in reversed(grants):
        prefills[who].transfer.push("decode", ranks[grant], grant, grant, (grant, grant + 1), (0, 1))
        prefills[who].transfer.finish_push(grant, grant)
    assert {decode.next(Arrived).grant for _ in grants} == {1, 2, 3, 4}  # type: ignore[attr-defined]
    for (who, grant), places in grants.items():
        assert torch.equal(decode.pages[list(places)], prefills[who].pages[[grant, grant + 1]])


def test_a_grant_of_cached_pages_only(make: Maker) -> None:
    prefill, decode = make(), make()
    decode.transfer.expect("prefill", 1, (), (), (SHARD,))
    assert isinstance(decode.next(Posted), Posted)
    assert decode.next(Arrived) == Arrived(1, ((),))
    prefill.transfer.finish_push(1, 1)
    assert prefill.next(Sent) == Sent(1, 1, ())


def test_without_checksums_there_are_none(make: Maker) -> None:
    prefill, decode = make(checksums=False), make(checksums=False)
    rank = decode.expect(1, (0, 1), (0, 1))
    prefill.transfer.push("decode", rank, 1, 1, (0, 1), (0, 1))
    prefill.transfer.finish_push(1, 1)
    assert prefill.next(Sent) == Sent(1, 1, ())
    assert decode.next(Arrived) == Arrived(1, ((),))
    assert torch.equal(decode.pages[:2], prefill.pages[:2])


# ---------------------------------------------------------------------------------------------------------------- runs


def test_a_run_arrives_as_its_pages(make: Maker) -> None:
    prefill, decode = make(), make()
    before = decode.pages.clone()
    places, indices, sources, starts = (9, 10, 11, 3, 4, 15), (1, 2, 3, 4, 5, 6), (2, 3, 4, 7, 8, 9), (1, 4, 6)
    rank = decode.expect(1, places, indices, starts=starts)
    prefill.transfer.push("decode", rank, 4, 1, sources[:3], indices[:3], starts)
    prefill.transfer.push("decode", rank, 4, 1, sources[3:], indices[3:], starts)
    prefill.transfer.finish_push(4, 1)
    sent, arrived = prefill.next(Sent), decode.next(Arrived)
    assert sent.checksums == arrived.checksums  # type: ignore[attr-defined]
    assert len(set(sent.checksums[0])) == 6  # type: ignore[attr-defined]
    assert torch.equal(decode.pages[list(places)], prefill.pages[list(sources)])
    others = [page for page in ALL if page not in places]
    assert torch.equal(decode.pages[others], before[others])
    assert decode.transfer.counts == TransferCounts(received_pages=6, received_bytes=6 * PAGE_BYTES)
    assert prefill.transfer.counts == TransferCounts(sent_pages=6, sent_bytes=6 * PAGE_BYTES)


over_ucx = pytest.mark.parametrize("make", ["ucx"], indirect=True)


@over_ucx
def test_a_run_is_one_message(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    post = Sender._post
    monkeypatch.setattr(Sender, "_post", lambda self, *message: (sizes.append(message[-1]), post(self, *message)))
    prefill, decode = make(), make()
    rank = decode.expect(1, ALL, ALL, starts=(0, 6, 7))
    prefill.transfer.push("decode", rank, 1, 1, ALL, ALL, (0, 6, 7))
    decode.next(Arrived)
    assert sizes == [6 * PAGE_BYTES, PAGE_BYTES, 9 * PAGE_BYTES]
    assert torch.equal(decode.pages, prefill.pages)


@over_ucx
def test_what_is_under_way_is_bounded_in_bytes_and_a_larger_message_goes_alone(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "WINDOW_BYTES", 3 * PAGE_BYTES)
    under_way: list[int] = []
    post = Sender._post

    def posted(self: Sender, channel: Any, message: Any, content: Any, size: int) -> None:
        under_way.append(channel.sent_bytes)
        post(self, channel, message, content, size)

    monkeypatch.setattr(Sender, "_post", posted)
    prefill, decode = make(), make()
    starts = (0, 1, 2, 3, 4, 5, 6, 12, 13)
    rank = decode.expect(1, ALL, ALL, starts=starts)
    prefill.transfer.push("decode", rank, 1, 1, ALL, ALL, starts)
    decode.next(Arrived)
    assert torch.equal(decode.pages, prefill.pages)
    assert len(under_way) == len(starts) and max(under_way) < 3 * PAGE_BYTES


@over_ucx
def test_a_way_that_breaks_at_a_send_fails_its_pushes_and_nothing_else(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    post = Sender._post
    monkeypatch.setattr(Sender, "_post", lambda self, channel, *_: self._break(channel, "no memory for a request"))
    prefill, decode = make(), make()
    rank = decode.expect(1, ALL, ALL)
    prefill.transfer.push("decode", rank, 1, 1, ALL, ALL)
    assert prefill.next(PushFailed) == PushFailed(1, 1, "no memory for a request")
    monkeypatch.setattr(Sender, "_post", post)
    decode.transfer.close_peer("prefill")
    decode.next(Landed)
    prefill.transfer.close_peer("decode")
    rank = decode.expect(2, ALL, ALL)
    prefill.transfer.push("decode", rank, 2, 2, ALL, ALL)
    decode.next(Arrived)


def test_corrupted_pages_of_a_run_are_found_by_their_own_checksums(make: Maker) -> None:
    prefill, decode = make(fault="corrupt:3x3"), make()
    rank = decode.expect(1, ALL, ALL, starts=(0, 4, 10))
    prefill.transfer.push("decode", rank, 1, 1, ALL, ALL, (0, 4, 10))
    prefill.transfer.finish_push(1, 1)
    sent, arrived = prefill.next(Sent), decode.next(Arrived)
    pairs = zip(sent.checksums[0], arrived.checksums[0], strict=True)  # type: ignore[attr-defined]
    assert [index for index, (one, other) in enumerate(pairs) if one != other] == [2, 5, 8]


def test_runs_that_are_held_back_or_were_never_pushed_are_flushed(make: Maker) -> None:
    prefill, decode = make(fault="stall:3x1"), make()
    starts = (0, 2, 5, 9)
    rank = decode.expect(1, ALL, ALL, starts=starts)
    prefill.transfer.push("decode", rank, 1, 1, ALL[:5], ALL[:5], starts)
    decode.transfer.abandon(1, told=True)
    decode.quiet()
    prefill.transfer.flush("decode", rank, 1, 1, ALL[5:], starts)
    assert decode.next(Landed) == Landed(1)
    prefill.quiet()


# -------------------------------------------------------------------------------------------------------------- faults


def test_a_corrupted_page_does_not_verify(make: Maker) -> None:
    prefill, decode = make(fault="corrupt:3x1"), make()
    rank = decode.expect(1, ALL, ALL)
    kept = prefill.pages.clone()
    prefill.transfer.push("decode", rank, 1, 1, ALL, ALL)
    prefill.transfer.finish_push(1, 1)
    sent, arrived = prefill.next(Sent), decode.next(Arrived)
    wrong = [i for i, (a, b) in enumerate(zip(sent.checksums[0], arrived.checksums[0], strict=True)) if a != b]  # type: ignore[attr-defined]
    assert wrong == [2]
    assert torch.equal(prefill.pages, kept)


def test_a_failed_push_says_so_once_and_its_grant_lands_with_the_link(make: Maker) -> None:
    prefill, decode = make(fault="fail:3x1"), make()
    rank = decode.expect(1, ALL, ALL)
    prefill.transfer.push("decode", rank, 1, 1, ALL[:8], ALL[:8])
    prefill.transfer.push("decode", rank, 1, 1, ALL[8:], ALL[8:])
    prefill.transfer.finish_push(1, 1)
    failed = prefill.next(PushFailed)
    assert (failed.handoff, failed.grant) == (1, 1)  # type: ignore[attr-defined]
    prefill.transfer.close_peer("decode")
    decode.transfer.close_peer("prefill")
    assert decode.next(Landed) == Landed(1)
    prefill.quiet()
    assert prefill.transfer.counts.failures == 1


def test_a_stalled_push_fails_at_its_deadline_and_not_before(make: Maker) -> None:
    prefill, decode = make(fault="stall:2x1", push_s=1.0), make()
    rank = decode.expect(1, ALL, ALL)
    began = time.monotonic()
    prefill.transfer.push("decode", rank, 1, 1, ALL, ALL)
    prefill.transfer.finish_push(1, 1)
    prefill.next(PushFailed, timeout_s=5.0)
    assert time.monotonic() - began >= 1.0
    decode.quiet()


def test_a_stalled_page_is_flushed_with_what_was_never_pushed(make: Maker) -> None:
    prefill, decode = make(fault="stall:2x1"), make()
    rank = decode.expect(1, ALL, ALL)
    prefill.transfer.push("decode", rank, 1, 1, ALL[:4], ALL[:4])
    decode.transfer.abandon(1, told=True)
    decode.quiet()
    prefill.transfer.flush("decode", rank, 1, 1, ALL[4:])
    assert decode.next(Landed) == Landed(1)
    prefill.quiet()


# ------------------------------------------------------------------------------------------------------------ giving up


def test_an_abandoned_grant_lands_only_after_the_flush(make: Maker) -> None:
    prefill, decode = make(), make()
    rank = decode.expect(1, ALL, ALL)
    prefill.transfer.push("decode", rank, 1, 1, ALL[:3], ALL[:3])
    decode.transfer.abandon(1, told=True)
    decode.quiet()
    prefill.transfer.flush("decode", rank, 1, 1, ALL[3:])
    assert decode.next(Landed) == Landed(1)
    decode.quiet()
    prefill.quiet()


def test_a_flush_may_come_before_the_abandonment_is_known_to_decode(make: Maker) -> None:
    """An honest prefill flushes only what decode has given up; if it did not, nothing that arrives may verify."""
    prefill, decode = make(), make()
    rank = decode.expect(1, (0, 1), (0, 1))
    prefill.transfer.push("decode", rank, 1, 1, (0,), (0,))
    prefill.transfer.flush("decode", rank, 1, 1, (1,))
    decode.transfer.abandon(1, told=True)
    events = []
    while not events or events[-1] != Landed(1):
        events.append(decode.events.get(timeout=WAIT_S))
    for event in events[:-1]:
        assert isinstance(event, Arrived)
        assert event.checksums[0][1] != 0


def test_a_grant_nobody_was_told_of_lands_at_once_and_its_pages_serve_again(make: Maker) -> None:
    prefill, decode = make(), make()
    decode.expect(1, ALL, ALL)
    decode.transfer.abandon(1, told=False)
    assert decode.next(Landed) == Landed(1)
    rank = decode.expect(2, ALL, ALL)
    prefill.transfer.push("decode", rank, 1, 2, ALL, ALL)
    prefill.transfer.finish_push(1, 2)
    assert decode.next(Arrived).checksums == prefill.next(Sent).checksums  # type: ignore[attr-defined]
    assert torch.equal(decode.pages, prefill.pages)


def test_unknown_and_arrived_grants_land_at_once(make: Maker) -> None:
    prefill, decode = make(), make()
    decode.transfer.abandon(77, told=True)
    assert decode.next(Landed) == Landed(77)
    rank = decode.expect(1, (0,), (0,))
    prefill.transfer.push("decode", rank, 1, 1, (0,), (0,))
    decode.next(Arrived)
    decode.transfer.abandon(1, told=True)
    assert decode.next(Landed) == Landed(1)


def test_closing_a_peer_lands_its_grants_and_it_may_come_back(make: Maker) -> None:
    prefill, decode = make(), make()
    first = decode.expect(1, ALL[:8], ALL[:8])
    decode.expect(2, ALL[8:], ALL[8:])
    prefill.transfer.push("decode", first, 1, 1, ALL[:2], ALL[:2])
    decode.transfer.close_peer("prefill")
    assert {decode.next(Landed).grant for _ in range(2)} == {1, 2}  # type: ignore[attr-defined]
    prefill.transfer.close_peer("decode")
    assert prefill.next(PushFailed).handoff == 1  # type: ignore[attr-defined]
    second = decode.expect(3, ALL, ALL)
    assert second.address != first.address
    prefill.transfer.push("decode", second, 2, 3, ALL, ALL)
    prefill.transfer.finish_push(2, 3)
    assert decode.next(Arrived).checksums == prefill.next(Sent).checksums  # type: ignore[attr-defined]


def test_closing_a_peer_leaves_others_alone(make: Maker) -> None:
    prefill, decode = make(), make()
    decode.expect(1, (0,), (0,), peer="dead")
    rank = decode.expect(2, (1,), (0,), peer="live")
    decode.transfer.close_peer("dead")
    assert decode.next(Landed) == Landed(1)
    prefill.transfer.push("decode", rank, 1, 2, (5,), (0,))
    assert isinstance(decode.next(Arrived), Arrived)
    assert torch.equal(decode.pages[1], prefill.pages[5])


def test_pushes_to_a_closed_door_change_nothing(make: Maker) -> None:
    prefill, decode = make(push_s=1.0), make()
    rank = decode.expect(1, ALL, ALL)
    decode.transfer.close_peer("prefill")
    decode.next(Landed)
    decode.pages.fill_(7)
    prefill.transfer.push("decode", rank, 1, 1, ALL, ALL)
    prefill.transfer.finish_push(1, 1)
    prefill.events.get(timeout=5.0)
    assert bool((decode.pages == 7).all())
    decode.quiet()


def test_closing_unknown_peers_and_closing_twice_is_fine(make: Maker) -> None:
    end = make()
    end.transfer.close_peer("nobody")
    end.quiet()
    end.transfer.close()
    end.transfer.close()


def test_after_close_no_thread_and_no_descriptor_is_left(make: Maker) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def once() -> None:
        prefill, decode = make(), make()
        rank = decode.expect(1, ALL, ALL)
        prefill.transfer.push("decode", rank, 1, 1, ALL, ALL)
        prefill.transfer.finish_push(1, 1)
        prefill.next(Sent)
        decode.next(Arrived)
        decode.expect(2, ALL, ALL)
        decode.transfer.close()
        prefill.transfer.close()

    once()
    threads, files = threading.active_count(), descriptors()
    for _ in range(3):
        once()
    assert threading.active_count() == threads
    assert descriptors() == files
