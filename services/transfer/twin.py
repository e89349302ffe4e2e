"""The same contract without UCX, inside one process: for tests of workers, and the reference that the UCX carrier is compared with.

A twin moves pages as UCX does: the sender only announces them, and the receiver's own thread copies them into its pages, each by itself
however they lie. Twins that belong together share a `Switchboard`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor

from common.messages import GrantedRank, Incarnation, Shard
from services.transfer.faults import Fault
from services.transfer.inbound import Inbound
from services.transfer.outbound import PUSH_S, Outbound, Push
from services.transfer.places import Places
from services.transfer.protocol import Posted, TransferCounts, TransferEvent, tag


@dataclass(eq=False)
class Switchboard:
    """Finds a twin by the address it has given to one peer."""

    doors: dict[bytes, TwinTransfer] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=count)


@dataclass(frozen=True, slots=True)
class _Receive:
    """What one rank of the peer (`source`) has of a page, awaited."""

    grant: int
    index: int
    page: int
    source: int
    part: Shard


class TwinTransfer:
    """The Transfer of one rank over `pages` (uint8 `[pages, page_bytes]`)."""

    transport = "in-process"

    def __init__(
        self,
        pages: Tensor,
        shard: Shard,
        on_event: Callable[[TransferEvent], None],
        board: Switchboard,
        *,
        checksums: bool = True,
        fault: Fault = Fault(),  # noqa: B008  (frozen)
        push_s: float = PUSH_S,
    ) -> None:
        self._places = Places(pages, shard)
        self._on_event = on_event
        self._board = board
        self._checksums = checksums
        self._fault = fault
        self._inbound, self._outbound = Inbound(), Outbound(push_s)
        self._doors: dict[Incarnation, bytes] = {}
        self._posted: dict[bytes, dict[int, _Receive]] = {}
        """By door and tag."""
        self._numbered = self._sent = self._sent_bytes = self._received = self._received_bytes = 0
        self._commands: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._live, name="twin", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------------------------------------------- from any thread

    @property
    def counts(self) -> TransferCounts:
        return TransferCounts(self._sent, self._sent_bytes, self._received, self._received_bytes, self._outbound.failures)

    def expect(
        self,
        peer: Incarnation,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
        sources: tuple[Shard, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        self._command(self._expect, peer, grant, pages, indices, sources)

    def abandon(self, grant: int, *, told: bool) -> None:
        self._command(self._abandon, grant, told)

    def push(
        self,
        peer: Incarnation,
        to: GrantedRank,
        handoff: int,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        self._command(self._push, peer, to, handoff, grant, pages, indices)

    def finish_push(self, handoff: int, grant: int) -> None:
        self._command(self._finish, handoff, grant)

    def flush(
        self,
        peer: Incarnation,
        to: GrantedRank,
        handoff: int,
        grant: int,
        indices: tuple[int, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        self._command(self._flush, peer, to, handoff, grant, indices)

    def close_peer(self, peer: Incarnation) -> None:
        self._command(self._close_peer, peer)

    def close(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(PUSH_S)

    def _command(self, command: Callable[..., None], *arguments: object) -> None:
        with self._wake:
            self._commands.append((command, arguments))
            self._wake.notify()

    # -------------------------------------------------------------------------------------------------- on its own thread

    def _live(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._commands or self._stopping, timeout=PUSH_S / 10)
                if self._stopping:
                    break
                ready, self._commands = self._commands, deque()
            for command, arguments in ready:
                command(*arguments)
            self._emit(self._outbound.late(time.monotonic()))
        for address in self._doors.values():
            self._board.doors.pop(address, None)

    def _emit(self, events: list[TransferEvent]) -> None:
        for event in events:
            self._on_event(event)

    # ------------------------------------------------------------------------------------------------------- receiving

    def _expect(self, peer: Incarnation, grant: int, pages: tuple[int, ...], indices: tuple[int, ...], sources: tuple[Shard, ...]) -> None:
        address = self._doors.get(peer)
        if address is None:
            address = self._doors[peer] = b"twin-%d" % next(self._board.numbers)
            self._board.doors[address] = self
            self._posted[address] = {}
        parts = [(source.rank, part) for source in sources if (part := self._places.part(source)) is not None]
        for page, index in zip(pages, indices, strict=True):
            for source, part in parts:
                self._posted[address][tag(grant, index, source)] = _Receive(grant, index, page, source, part)
        receives = len(pages) * len(parts)
        self._emit([Posted(grant, (GrantedRank(self._places.shard, address),)), *self._inbound.expect(peer, grant, receives)])

    def _abandon(self, grant: int, told: bool) -> None:
        if not told:
            for posted in self._posted.values():
                for number in [number for number, place in posted.items() if place.grant == grant]:
                    del posted[number]
        self._emit(self._inbound.abandon(grant, told=told))

    def _deliver(self, address: bytes, number: int, content: Any, left: Callable[[], None]) -> None:
        """A page announced by its sender; None is an empty message. Closed doors and unknown tags discard it."""
        place = self._posted.get(address, {}).pop(number, None)
        if place is not None:
            wanted, sums = self._inbound.wanted(place.grant), dict[int, int]()
            if content is not None:
                if self._places.lies_whole(place.part):
                    self._places.content(place.page, place.part)[:] = content
                elif wanted:
                    self._places.fill(place.page, place.part, content)
                if wanted:
                    self._received += 1
                    self._received_bytes += self._places.size(place.part)
                    if self._checksums:
                        sums[place.index] = self._places.checksum(place.page, place.index, place.part)
            self._emit(self._inbound.completed(place.grant, sums, whole=content is not None, source=place.source))
        left()

    # --------------------------------------------------------------------------------------------------------- sending

    def _push(self, peer: Incarnation, to: GrantedRank, handoff: int, grant: int, pages: tuple[int, ...], indices: tuple[int, ...]) -> None:
        push = self._outbound.push(peer, handoff, grant, time.monotonic())
        other = self._board.doors.get(to.address)
        part = self._places.part(to.shard)
        if other is None or part is None:
            self._emit(self._outbound.fail(push, "no way to the peer"))
        for page, index in zip(pages, indices, strict=True):
            if push.over or other is None or part is None:
                return
            place = to.shard.rank, index
            push.under_way += 1
            if self._checksums:
                push.sums[place] = self._places.checksum(page, index, part)
            self._numbered += 1
            struck = self._fault.strikes(self._numbered)
            if struck == "fail":
                self._emit(self._outbound.fail(push, "an injected fault"))
            elif struck == "stall":
                push.held.add(place)
            else:
                content = self._places.content(page, part)
                content = self._places.spoiled(content, [0]) if struck == "corrupt" else content
                number, size = tag(grant, index, self._places.rank), self._places.size(part)
                other._command(other._deliver, to.address, number, content, partial(self._command, self._left, push, size))

    def _left(self, push: Push, size: int) -> None:
        self._sent += 1
        self._sent_bytes += size
        self._emit(self._outbound.left(push, time.monotonic()))

    def _finish(self, handoff: int, grant: int) -> None:
        self._emit(self._outbound.finish(handoff, grant, time.monotonic()))

    def _flush(self, peer: Incarnation, to: GrantedRank, handoff: int, grant: int, indices: tuple[int, ...]) -> None:
        held = self._outbound.withdraw(handoff, grant, to.shard.rank)
        other = self._board.doors.get(to.address)
        if other is None:
            return
        for index in {*indices, *held}:
            other._command(other._deliver, to.address, tag(grant, index, self._places.rank), None, lambda: None)

    # --------------------------------------------------------------------------------------------------------- closing

    def _close_peer(self, peer: Incarnation) -> None:
        self._emit(self._outbound.close(peer))
        address = self._doors.pop(peer, None)
        if address is not None:
            self._board.doors.pop(address, None)
            cancelled = self._posted.pop(address)
            events = self._inbound.close(peer)
            for place in cancelled.values():
                events += self._inbound.completed(place.grant, {}, whole=False)
            self._emit(events)
