"""A transfer without a network, obeying services/transfer/protocol.py: posted receives, pushes, flushes, closed links, late reads.

The receiver reads the sender's page at the moment of delivery (as rendezvous does), so a page that is reused too early shows. No write
may land in a page that is not in transit for that very grant: `owns` is asked at every write.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from common.messages import GrantedRank, Shard
from services.transfer.outbound import PUSH_S
from services.transfer.protocol import Arrived, Landed, NotPosted, Posted, PushFailed, Sent, TransferEvent, keyed
from services.transfer.runs import breaks, messages
from tests.unit.recovery.fabric import MASK, PAGE_TOKENS, Clock, Process, Weather

SHARD = Shard(0, (0, 1), (0, 1))


def checksum(content: list[int], index: int) -> int:
    total = keyed(SHARD, index)
    for value in content:
        total = (total * 1099511628211 ^ value) & MASK
    return total


@dataclass(eq=False)
class Receives:
    """Posted receives of one grant."""

    pages: dict[int, int]
    """Index in the sequence → page."""
    open: dict[int, tuple[int, ...]]
    """Of each message not come yet, by its first index: those of its pages."""
    sums: dict[int, int] = field(default_factory=dict)
    abandoned: bool = False


@dataclass(eq=False)
class Link:
    """What receives from one peer under one address, until it is closed."""

    address: bytes
    grants: dict[int, Receives] = field(default_factory=dict)
    closed: bool = False


@dataclass(eq=False)
class Pushing:
    peer: str
    address: bytes
    under_way: set[int] = field(default_factory=set)
    sums: dict[int, int] = field(default_factory=dict)
    finished: bool = False


class Carrier:
    """One worker's end. Commands act at once, completions come as events on the `transfer` channel of the process."""

    def __init__(
        self,
        process: Process,
        clock: Clock,
        rng: random.Random,
        weather: Weather,
        others: dict[str, Carrier],
        emit: Callable[[TransferEvent], None],
        owns: Callable[[int, int], bool],
        pages: int,
    ) -> None:
        self.process, self._clock, self._rng, self._weather = process, clock, rng, weather
        self._others = others
        others[process.name] = self
        self._emit_now = emit
        self._owns = owns
        self.memory = [[0] * PAGE_TOKENS for _ in range(pages)]
        self.links: dict[str, Link] = {}
        self.pushes: dict[tuple[int, int], Pushing] = {}
        self.failed: set[tuple[int, int]] = set()
        self._addresses = 0

    def _emit(self, event: TransferEvent) -> None:
        self._clock.after(0.0001, lambda: self.process.deliver("transfer", lambda: self._emit_now(event)))

    # ------------------------------------------------------------------------------------------------------- receiving

    def expect(self, peer: str, grant: int, pages: tuple[int, ...], indices: tuple[int, ...], starts: tuple[int, ...]) -> None:
        link = self.links.get(peer)
        if link is None:
            if self._weather.not_posted and self._rng.random() < self._weather.not_posted:
                self._emit(NotPosted(grant))
                return
            self._addresses += 1
            link = self.links[peer] = Link(f"{self.process.name}/{self._addresses}".encode())
        self._emit(Posted(grant, (GrantedRank(SHARD, link.address),)))
        if indices:
            cuts = messages(indices, starts)
            assert all(breaks(pages[cut]) == () for cut in cuts), f"{pages} in messages from {starts} on"
            link.grants[grant] = Receives(dict(zip(indices, pages, strict=True)), {indices[cut.start]: indices[cut] for cut in cuts})
        else:
            self._emit(Arrived(grant, ((),)))

    def abandon(self, grant: int, *, told: bool) -> None:
        for link in self.links.values():
            if grant in link.grants:
                link.grants[grant].abandoned = True
                if not told:
                    del link.grants[grant]
                    self._emit(Landed(grant))
                return
        self._emit(Landed(grant))

    def receive(self, link: Link, grant: int, first: int, contents: list[list[int]] | None) -> None:
        """A message (or a flush: None) meets its posted receive; with no receive posted it goes nowhere."""
        receives = link.grants.get(grant)
        if receives is None or first not in receives.open:
            return
        indices = receives.open.pop(first)
        assert contents is None or len(contents) == len(indices), f"{self.process.name}: {len(contents or ())} pages for {indices}"
        for i, index in enumerate(indices):
            page = receives.pages[index]
            if contents is not None:
                assert self._owns(page, grant), f"{self.process.name}: a late write into page {page} for grant {grant}"
                self.memory[page] = contents[i]
            receives.sums[index] = checksum(self.memory[page], index)
        if not receives.open:
            del link.grants[grant]
            sums = tuple(receives.sums[i] for i in sorted(receives.sums))
            self._emit(Landed(grant) if receives.abandoned else Arrived(grant, (sums,)))

    # --------------------------------------------------------------------------------------------------------- sending

    def push(
        self,
        peer: str,
        to: GrantedRank,
        handoff: int,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
        starts: tuple[int, ...],
    ) -> None:
        pushing = self.pushes.setdefault((handoff, grant), Pushing(peer, to.address))
        for cut in messages(indices, starts):
            assert breaks(pages[cut]) == (), f"{pages} in messages from {starts} on"
            pushing.sums |= {index: checksum(self.memory[page], index) for page, index in zip(pages[cut], indices[cut], strict=True)}
            pushing.under_way.add(indices[cut.start])
            if self._rng.random() < self._weather.push_fail:
                self._fail(handoff, grant, "an injected fault")
                return
            if self._rng.random() >= self._weather.push_stall:
                self._move(peer, to.address, handoff, grant, indices[cut.start], pages[cut])
            else:
                self._clock.after(PUSH_S, lambda: self.process.deliver("progress", lambda: self._fail(handoff, grant, "it does not move")))

    def _move(self, peer: str, address: bytes, handoff: int, grant: int, first: int, pages: tuple[int, ...]) -> None:
        """The receiver's thread reads the pages when it gets to them (none: a flush); a dead or closed receiver is an error here."""
        other = self._others.get(peer)

        def meet() -> None:
            link = next((link for link in other.links.values() if link.address == address), None) if other is not None else None
            if other is None or link is None or link.closed:
                self.process.deliver("progress", lambda: self._fail(handoff, grant, "the link is closed"))
                return
            if not self.process.alive:
                return
            if not pages:
                other.receive(link, grant, first, None)
                return
            contents = [list(self.memory[page]) for page in pages]
            if self._rng.random() < self._weather.corrupt:
                self._rng.choice(contents)[0] ^= 1
            other.receive(link, grant, first, contents)
            self.process.deliver("progress", lambda: self._left(handoff, grant, first))

        def reach() -> None:
            if other is None or not other.process.alive:
                self._clock.after(1.0, lambda: self.process.deliver("progress", lambda: self._fail(handoff, grant, "the peer is gone")))
            else:
                other.process.deliver("progress", meet)

        self._clock.after(self._rng.choice((0.0005, 0.002, 0.05)), reach)

    def _left(self, handoff: int, grant: int, index: int) -> None:
        pushing = self.pushes.get((handoff, grant))
        if pushing is not None:
            pushing.under_way.discard(index)
            self._settle(handoff, grant, pushing)

    def finish_push(self, handoff: int, grant: int) -> None:
        if (handoff, grant) in self.failed:
            return
        pushing = self.pushes.setdefault((handoff, grant), Pushing("", b""))  # of a grant that asked for nothing
        pushing.finished = True
        self._settle(handoff, grant, pushing)

    def _settle(self, handoff: int, grant: int, pushing: Pushing) -> None:
        if pushing.finished and not pushing.under_way:
            del self.pushes[(handoff, grant)]
            self._emit(Sent(handoff, grant, (tuple(pushing.sums[i] for i in sorted(pushing.sums)),)))

    def _fail(self, handoff: int, grant: int, reason: str) -> None:
        if self.pushes.pop((handoff, grant), None) is not None:
            self.failed.add((handoff, grant))
            self._emit(PushFailed(handoff, grant, reason))

    def flush(self, peer: str, to: GrantedRank, handoff: int, grant: int, indices: tuple[int, ...], starts: tuple[int, ...]) -> None:
        self.pushes.pop((handoff, grant), None)
        for cut in messages(indices, starts):
            self._move(peer, to.address, handoff, grant, indices[cut.start], ())

    # ------------------------------------------------------------------------------------------------------------ both

    def close_peer(self, peer: str) -> None:
        for handoff, grant in [name for name, pushing in self.pushes.items() if pushing.peer == peer]:
            self._fail(handoff, grant, "the peer was closed")
        link = self.links.pop(peer, None)
        if link is not None:
            link.closed = True
            for grant in link.grants:
                self._emit(Landed(grant))
            if peer in self._others:
                self._others[peer].broken(link.address)

    def broken(self, address: bytes) -> None:
        """The other end of a way out is gone: what still waits on it fails, soon (UCX's keep-alive)."""

        def fail() -> None:
            for handoff, grant in [name for name, pushing in self.pushes.items() if pushing.address == address]:
                self._fail(handoff, grant, "the link is closed")

        self._clock.after(1.0, lambda: self.process.deliver("progress", fail))

    def died(self) -> None:
        for peer, link in self.links.items():
            if peer in self._others:
                self._others[peer].broken(link.address)

    @property
    def quiet(self) -> bool:
        return not self.pushes and not any(link.grants for link in self.links.values())
