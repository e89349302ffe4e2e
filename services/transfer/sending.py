"""The sending half over UCX: one worker, an endpoint to each address of a peer, messages posted a few at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.logs import get_logger
from common.messages import GrantedRank, Incarnation, Shard
from services.transfer import environment
from services.transfer.faults import Fault
from services.transfer.outbound import Outbound, Push, Way
from services.transfer.parts import alike
from services.transfer.places import Places
from services.transfer.protocol import TransferEvent, tag
from services.transfer.report import carriers, endpoint_report, way
from services.transfer.runs import messages

environment.prepare()

import ucxx._lib.libucxx as ucx  # noqa: E402  (after its environment)
from ucxx._lib.arr import Array  # noqa: E402

log = get_logger(__name__)

BURST = 4
"""Pages posted between two steps of UCX, or one message more, so that a long push does not keep completions waiting."""
WINDOW = 64
"""Messages under way on one channel. More than a shared-memory FIFO holds (256) would wait inside UCX, and if the peer dies then, those
in front of them never complete (seen with UCX 1.21)."""
WINDOW_BYTES = 128 << 20
"""Besides: of what is under way, all must come before a handoff that is given up on a slow link lands. One message may always go."""


@dataclass(frozen=True, slots=True)
class _Message:
    """Pages of a push that lie together, or, without one, an empty message."""

    push: Push | None
    pages: tuple[int, ...]
    indices: tuple[int, ...]
    tag: int
    to: int
    """The receiving rank."""
    part: Shard | None


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message under way. The receiver reads from `content`, of which UCX keeps no reference: a gathered copy lives by this one."""

    push: Push | None
    request: Any
    content: Array
    pages: int
    size: int


@dataclass(eq=False)
class _Channel:
    """An endpoint, what waits for it, and what is under way on it."""

    peer: Incarnation
    endpoint: ucx.UCXEndpoint
    waiting: deque[_Message] = field(default_factory=deque)
    sent: deque[_Sent] = field(default_factory=deque)
    sent_bytes: int = 0
    """Of what is under way."""
    way: Way = field(default_factory=Way)
    pushes: set[Push] = field(default_factory=set)
    broken: str = ""
    closing: Any = None

    def wait(self, messages: Iterable[_Message]) -> None:
        """Behind what waits already."""
        self.waiting.extend(messages)
        if self.way.since is None:
            self.way.since = time.monotonic()

    def settle(self, moved: bool) -> None:
        """Something has left, or nothing waits any more."""
        if not self.waiting and not self.sent:
            self.way.since = None
        elif moved:
            self.way.since = time.monotonic()

    @property
    def open(self) -> bool:
        """Whether something is under way, or the close itself."""
        return bool(self.sent) or (self.closing is not None and not self.closing.completed)


class Sender:
    """All pushes of one rank. Used on the transfer's thread only."""

    def __init__(
        self,
        worker: ucx.UCXWorker,
        places: Places,
        book: Outbound,
        emit: Callable[[list[TransferEvent]], None],
        *,
        checksums: bool,
        fault: Fault,
    ) -> None:
        self.worker = worker
        self._places = places
        self._book = book
        self._emit = emit
        self._checksums = checksums
        self._fault = fault
        self._channels: dict[tuple[Incarnation, int], dict[bytes, _Channel]] = {}
        self._closing: list[_Channel] = []
        self._nothing = Array(np.zeros(1, dtype=np.uint8))
        self._numbered = 0
        self.sent_pages = self.sent_bytes = 0
        self.transport = ""

    # ------------------------------------------------------------------------------------------------------- commands

    def push(
        self,
        peer: Incarnation,
        to: GrantedRank,
        handoff: int,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
        starts: tuple[int, ...],
    ) -> None:
        push = self._book.push(peer, handoff, grant, time.monotonic())
        channel = None if push.over else self._channel(peer, to)
        part = self._places.part(to.shard)
        if channel is None or part is None:
            self._emit(self._book.fail(push, "no way to the peer"))
            return
        cuts = messages(indices, starts if alike(self._places.shard, to.shard) else ())
        channel.pushes.add(push)
        push.ways.add(channel.way)
        push.under_way += len(cuts)
        channel.wait(
            _Message(push, pages[cut], indices[cut], tag(grant, indices[cut.start], self._places.rank), to.shard.rank, part) for cut in cuts
        )

    def finish(self, handoff: int, grant: int) -> None:
        self._emit(self._book.finish(handoff, grant, time.monotonic()))

    def flush(
        self,
        peer: Incarnation,
        to: GrantedRank,
        handoff: int,
        grant: int,
        indices: tuple[int, ...],
        starts: tuple[int, ...],
    ) -> None:
        """One byte for each receive that would otherwise wait for ever: never pushed, not posted yet, or held back by a fault."""
        channel = self._channel(peer, to)
        held = self._book.withdraw(handoff, grant, to.shard.rank)
        if channel is None:
            return
        never = {indices[cut.start] for cut in messages(indices, starts if alike(self._places.shard, to.shard) else ())}
        waiting = [waits for waits in channel.waiting if waits.push and (waits.push.handoff, waits.push.grant) == (handoff, grant)]
        channel.wait(
            _Message(None, (), (index,), tag(grant, index, self._places.rank), to.shard.rank, None)
            for index in sorted({*never, *held, *(waits.indices[0] for waits in waiting)})
        )

    def close_peer(self, peer: Incarnation) -> None:
        for key in [key for key in self._channels if key[0] == peer]:
            for channel in self._channels.pop(key).values():
                self._close(channel)
        self._emit(self._book.close(peer))

    def close(self) -> None:
        for peer in {key[0] for key in self._channels}:
            self.close_peer(peer)

    @property
    def closed(self) -> bool:
        """After `close`: every endpoint has gone."""
        return not self._closing

    def release(self) -> None:
        """Destroy the worker; counts stay."""
        self._closing.clear()
        del self.worker

    # ------------------------------------------------------------------------------------------------------- progress

    def work(self) -> bool:
        """Post a few messages, one step of UCX, then what has left. Whether anything moved."""
        moved = False
        for channels in tuple(self._channels.values()):
            for channel in tuple(channels.values()):
                pages = max(BURST, self._places.at_once)
                while pages > 0 and (room := self._room(channel)) > 0:
                    moved = True
                    group = self._summed_at_once(channel.waiting, room)
                    pages -= sum(max(len(message.pages), 1) for message in group)
                    self._sum(group)
                    for message in group:
                        self._send(channel, message)
        moved |= bool(self.worker.progress_once())
        for channels in tuple(self._channels.values()):
            for channel in tuple(channels.values()):
                moved |= self._collect(channel)
        return moved

    def look(self) -> None:
        """Before a sleep, or now and then: endpoints that have died, pushes that wait for what does not move, closed channels whose last
        requests have ended."""
        for key, channels in list(self._channels.items()):
            for address, channel in list(channels.items()):
                channel.pushes = {push for push in channel.pushes if not push.over}
                if not channel.broken and not channel.endpoint.alive:
                    self._break(channel, "the peer is gone")
                if channel.broken:
                    del channels[address]
                    self._close(channel)
            if not channels:
                del self._channels[key]
        self._emit(self._book.late(time.monotonic()))
        if self._closing:
            self.worker.progress()  # more than a step: cancels what closing has only scheduled
        for channel in self._closing:
            while channel.sent and channel.sent[0].request.completed:
                channel.sent.popleft()
        self._closing = [channel for channel in self._closing if channel.open]

    def _room(self, channel: _Channel) -> int:
        """Messages that may be posted on it now."""
        full = channel.sent_bytes >= WINDOW_BYTES
        return 0 if full else min(WINDOW - len(channel.sent), len(channel.waiting))

    def _summed_at_once(self, waiting: deque[_Message], most: int) -> list[_Message]:
        """The next messages, at most so many: as many pages as are summed at once, whole messages."""
        group = [waiting.popleft()]
        pages = len(group[0].pages)
        while len(group) < most and pages + len(waiting[0].pages) <= self._places.at_once:
            group.append(waiting.popleft())
            pages += len(group[-1].pages)
        return group

    def _sum(self, group: list[_Message]) -> None:
        """The checksums of these pages, for the word that follows them."""
        by_part: dict[Shard, list[_Message]] = {}
        for message in group if self._checksums else ():
            if message.push is not None and message.part is not None and not message.push.over:
                by_part.setdefault(message.part, []).append(message)
        for part, those in by_part.items():
            places = [(message, index) for message in those for index in message.indices]
            sums = self._places.checksums([page for message in those for page in message.pages], [index for _, index in places], part)
            for (message, index), value in zip(places, sums, strict=True):
                assert message.push is not None
                message.push.sums[message.to, index] = value

    def _send(self, channel: _Channel, message: _Message) -> None:
        push, part = message.push, message.part
        if push is None or part is None:
            self._post(channel, message, self._nothing, 0)
            return
        if push.over:
            return
        size, pages = self._places.size(part), message.pages
        struck = self._struck(len(pages))
        if struck and self._fault.kind == "fail":
            self._emit(self._book.fail(push, "an injected fault"))
        elif struck and self._fault.kind == "stall":
            push.held.add((message.to, message.indices[0]))
        else:
            content = self._places.run(pages) if len(pages) > 1 else self._places.content(pages[0], part)
            content = self._places.spoiled(content, [i * size for i in struck]) if struck else content
            self._post(channel, message, Array(content), size * len(pages))

    def _struck(self, pages: int) -> list[int]:
        """Which of the next pages an injected fault strikes."""
        first = self._numbered + 1
        self._numbered += pages
        return [i for i in range(pages) if self._fault.strikes(first + i) is not None]

    def _post(self, channel: _Channel, message: _Message, content: Array, size: int) -> None:
        try:
            request = channel.endpoint.tag_send(content, ucx.UCXXTag(message.tag))
        except Exception as error:  # UCXX raises bare RuntimeErrors besides its own
            self._break(channel, f"{type(error).__name__}: {error}")
            return
        channel.sent_bytes += size
        channel.sent.append(_Sent(message.push, request, content, len(message.pages), size))

    def _collect(self, channel: _Channel) -> bool:
        moved = False
        while channel.sent and channel.sent[0].request.completed:
            sent = channel.sent.popleft()
            channel.sent_bytes -= sent.size
            moved = True
            if sent.request.status != 0:
                self._break(channel, f"pages could not be sent (UCX status {sent.request.status})")
            elif sent.push is not None:
                self.sent_pages += sent.pages
                self.sent_bytes += sent.size
                self._say_transport(channel)
                self._emit(self._book.left(sent.push, time.monotonic()))
                if sent.push.over:
                    channel.pushes.discard(sent.push)
        channel.settle(moved)
        return moved

    # ------------------------------------------------------------------------------------------------------- channels

    def _channel(self, peer: Incarnation, to: GrantedRank) -> _Channel | None:
        """The endpoint to this address. One to a former address of the same rank goes when nothing is under way on it."""
        channels = self._channels.setdefault((peer, to.shard.rank), {})
        channel = channels.get(to.address)
        if channel is None:
            for address, former in list(channels.items()):
                if not former.pushes:
                    self._close(channels.pop(address))
            try:
                address_of = ucx.UCXAddress.create_from_buffer(to.address)
                endpoint = ucx.UCXEndpoint.create_from_worker_address(self.worker, address_of, endpoint_error_handling=True)
            except Exception as error:  # whatever UCXX makes of an address that nobody answers at
                log.warning("no endpoint to a peer", peer=peer, reason=f"{type(error).__name__}: {error}")
                return None
            channel = channels[to.address] = _Channel(peer, endpoint)
        return channel if not channel.broken else None

    def _break(self, channel: _Channel, reason: str) -> None:
        channel.broken = channel.broken or reason
        channel.waiting.clear()
        for push in channel.pushes:
            self._emit(self._book.fail(push, reason))
        channel.pushes.clear()

    def _close(self, channel: _Channel) -> None:
        """Sends under way to a peer that neither reads nor dies end when it does: the channel is kept until then."""
        channel.pushes.clear()
        channel.waiting.clear()
        if channel.endpoint.alive:  # closing a dead one returns a request that UCXX itself cannot touch
            channel.closing = channel.endpoint.close()
        self._closing.append(channel)

    def _say_transport(self, channel: _Channel) -> None:
        """Asked once, of the first channel that has carried a page."""
        if self.transport:
            return
        report = endpoint_report(channel.endpoint.handle)
        protocol, carrier = way(report, self._places.page_bytes)
        self.transport = carriers(report) or "unknown"
        log.info("transfer open", transport=self.transport, pages_by=carrier, protocol=protocol)
