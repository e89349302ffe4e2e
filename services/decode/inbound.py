"""Decode's half of the handoff: stand offers in line, grant pages, judge what arrived, commit or reject. Pure: no socket, no UCX.

A page is shown to the scheduler only after every one of the handoff's pages has been verified. A grant that lapses keeps its pages
in transit until nothing can write into them any more (`landed`). Pages whose tokens the pool holds already are neither asked for nor
judged: they were verified or computed when they came.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from itertools import zip_longest
from typing import TypeAlias

from common.messages import Committed, Granted, Incarnation, Key, Offer, Pushed, Refused, Rejected, Token, Waiting, Withdrawn
from services.engine.pages import HASH_BYTES
from services.engine.plan import Handoff
from services.engine.sequence import Sequence
from services.transfer.protocol import Arrived, NotPosted, Posted
from services.transfer.runs import message_starts
from services.worker.jobs import leader, sequence_of, unfit

LAND_S = 10.0
"""An abandoned grant that has not landed this long after nothing was in front of it any more never will on this link: a page is stuck in
it. The link is closed. As long as pages of earlier grants come, prefill's transfer watches over the link."""

# ------------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Send:
    """A control message to a prefill."""

    to: Incarnation
    body: Waiting | Granted | Refused | Committed | Rejected | Withdrawn


@dataclass(frozen=True, slots=True)
class Reserve:
    """Stand in the engine's line for pages; it answers with the outcome `Granted`."""

    handoff: Handoff
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Lapse:
    """The engine may forget the handoff; granted pages stay in transit until `Land`."""

    handoff: Handoff


@dataclass(frozen=True, slots=True)
class Land:
    """Nothing can write into the lapsed handoff's pages any more: the engine may use them again."""

    handoff: Handoff


@dataclass(frozen=True, slots=True)
class Expect:
    """Post receives; the transfer answers with `Posted`."""

    handoff: Handoff
    grant: int
    pages: tuple[int, ...]
    indices: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Give the grant's receives up; the transfer answers with `Landed`. `told`: the prefill knows of the grant."""

    grant: int
    told: bool


@dataclass(frozen=True, slots=True)
class ClosePeer:
    """Close this side of the transfer link to a dead or restarted prefill: all its grants land."""

    peer: Incarnation


@dataclass(frozen=True, slots=True)
class Commit:
    """All pages are verified: the sequence runs from here on, its gateway is told, the first token repeated."""

    handoff: Handoff
    offer: Offer
    token: Token
    transfer_s: float


Action: TypeAlias = Send | Reserve | Lapse | Land | Expect | Abandon | ClosePeer | Commit


# --------------------------------------------------------------------------------------------------------------- state


class Stage(Enum):
    LINED_UP = auto()
    """In the engine's line."""
    GRANTED = auto()
    """Pages in transit, receives posted."""
    COMMITTED = auto()
    """Verified and running (or already over); kept to answer repeats."""
    ABANDONED = auto()
    """Given up with receives posted: waiting for them to complete."""


@dataclass(eq=False)
class Arrival:
    """One offered handoff."""

    offer: Offer
    stage: Stage
    deadline: float
    grant: int = -1
    missing: tuple[int, ...] = ()
    """Indices of the pages that have to come."""
    pages: tuple[int, ...] = ()
    """All that are needed, as `Granted` names them: -1 for what the pool holds already."""
    starts: tuple[int, ...] = ()
    """Where a message begins."""
    granted: Granted | None = None
    word: Pushed | None = None
    word_at: float = 0.0
    arrived: Arrived | None = None
    behind: int = 0
    """Once abandoned: pages of grants up to this one may come before what lands it, for a link is first in, first out."""
    foremost_at: float | None = None
    """The first tick that saw it abandoned and nothing in front of it."""


class Inbound:
    """All handoffs offered to one decode, by (prefill, number)."""

    def __init__(self, page_tokens: int, max_request_tokens: int, *, run_pages: int = 1) -> None:
        """`run_pages`: so many neighbours at most travel as one message."""
        self._page_tokens = page_tokens
        self._max_request_tokens = max_request_tokens
        self._run_pages = run_pages
        self._arrivals: dict[Handoff, Arrival] = {}
        self._by_grant: dict[int, Handoff] = {}
        self._links: dict[Incarnation, int] = {}
        self._last_grant = 0
        self.draining = False
        self.rejections = 0

    def __len__(self) -> int:
        """Handoffs that are neither committed nor over."""
        return sum(arrival.stage is not Stage.COMMITTED for arrival in self._arrivals.values())

    # ------------------------------------------------------------------------------------------------ what prefill says

    def offer(self, peer: Incarnation, offer: Offer, now: float) -> list[Action]:
        handoff = (peer, offer.handoff)
        known = self._arrivals.get(handoff)
        if known is not None:
            return [self._again(peer, known)]
        reason = self._refusal(offer)
        if reason is not None:
            return [Send(peer, Refused(offer.handoff, reason))]
        self._arrivals[handoff] = Arrival(offer, Stage.LINED_UP, now + offer.deadline_s)
        sequence = sequence_of(offer.job, offer.key, parks=False, now=now)
        sequence.hashes = list(offer.hashes)
        return [Reserve(handoff, sequence), Send(peer, Waiting(offer.handoff))]

    def pushed(self, peer: Incarnation, word: Pushed, now: float) -> list[Action]:
        handoff = (peer, word.handoff)
        arrival = self._arrivals.get(handoff)
        if arrival is None or arrival.stage in (Stage.LINED_UP, Stage.ABANDONED) or arrival.grant != word.grant:
            return [Send(peer, Refused(word.handoff, "no such grant"))]
        if arrival.stage is Stage.COMMITTED:
            return [Send(peer, Committed(word.handoff))]
        arrival.word, arrival.word_at = word, now
        return self._judge(handoff, arrival, now)

    def withdraw(self, peer: Incarnation, number: int) -> list[Action]:
        """Prefill has given it up. One that is committed goes on: the gateway decides between two runners."""
        handoff = (peer, number)
        arrival = self._arrivals.get(handoff)
        if arrival is None or arrival.stage is Stage.COMMITTED:
            return [Send(peer, Withdrawn(number))]
        return [*self._abandon(handoff, arrival), Send(peer, Withdrawn(number, arrival.granted))]

    def beat(self, peer: Incarnation, link: int, pursued: list[int]) -> list[Action]:
        """A raised link number means that prefill has closed its side; what it does not pursue any more is over."""
        actions: list[Action] = []
        if self._links.setdefault(peer, link) != link:
            actions += self._close(peer)
            self._links[peer] = link
        wanted = set(pursued)
        for handoff, arrival in list(self._arrivals.items()):
            if handoff[0] != peer or handoff[1] in wanted:
                continue
            if arrival.stage is Stage.COMMITTED:
                del self._arrivals[handoff]
            else:
                actions += self._abandon(handoff, arrival)
        return actions

    def peer_dead(self, peer: Incarnation) -> list[Action]:
        self._links.pop(peer, None)
        return self._close(peer)

    # ------------------------------------------------------------------------------------ what engine and transfer say

    def granted(self, handoff: Handoff, pages: tuple[int, ...], shared: int = 0) -> list[Action]:
        """The engine has reserved pages: those for known ids first, then room to grow. The first `shared` need not be sent."""
        arrival = self._arrivals.get(handoff)
        if arrival is None or arrival.stage is not Stage.LINED_UP:
            return [Land(handoff)]
        self._last_grant += 1
        needed = -(-arrival.offer.length // self._page_tokens)
        arrival.stage, arrival.grant = Stage.GRANTED, self._last_grant
        arrival.missing = tuple(range(shared, needed))
        arrival.pages = (*[-1] * shared, *pages[shared:needed])
        if arrival.offer.breaks is not None:
            arrival.starts = message_starts(shared, pages[shared:needed], set(arrival.offer.breaks), self._run_pages)
        self._by_grant[arrival.grant] = handoff
        return [Expect(handoff, arrival.grant, pages[shared:needed], arrival.missing, arrival.starts)]

    def posted(self, event: Posted) -> list[Action]:
        """Receives are posted: prefill may push."""
        handoff = self._by_grant.get(event.grant)
        if handoff is None or self._arrivals[handoff].stage is not Stage.GRANTED:
            return []
        arrival = self._arrivals[handoff]
        arrival.granted = Granted(handoff[1], arrival.grant, list(arrival.pages), list(event.ranks), list(arrival.starts))
        return [Send(handoff[0], arrival.granted)]

    def not_posted(self, event: NotPosted) -> list[Action]:
        """A rank can take no pages of this prefill now: another decode may."""
        handoff = self._by_grant.get(event.grant)
        if handoff is None or self._arrivals[handoff].stage is not Stage.GRANTED:
            return []
        return [*self._abandon(handoff, self._arrivals[handoff]), Send(handoff[0], Refused(handoff[1], "nothing can be received now"))]

    def arrived(self, event: Arrived, now: float) -> list[Action]:
        handoff = self._by_grant.get(event.grant)
        if handoff is None:
            return []
        arrival = self._arrivals[handoff]
        arrival.arrived = event
        return self._judge(handoff, arrival, now)

    def landed(self, grant: int) -> list[Action]:
        handoff = self._by_grant.pop(grant, None)
        if handoff is None:
            return []
        self._arrivals.pop(handoff, None)
        return [Land(handoff)]

    # ---------------------------------------------------------------------------------------------- what others decide

    def cancel(self, key: Key) -> list[Action]:
        """The gateway wants nothing of this execution (an empty execution matches any)."""
        actions: list[Action] = []
        for handoff, arrival in list(self._arrivals.items()):
            if key.covers(arrival.offer.key) and arrival.stage in (Stage.LINED_UP, Stage.GRANTED):
                actions += [*self._abandon(handoff, arrival), Send(handoff[0], Refused(handoff[1], "cancelled"))]
        return actions

    def drain(self) -> list[Action]:
        """Take nothing new; what stands in line or is in transit goes elsewhere: it would only have to be handed back (rule 12)."""
        self.draining = True
        actions: list[Action] = []
        for handoff, arrival in list(self._arrivals.items()):
            if arrival.stage in (Stage.LINED_UP, Stage.GRANTED):
                actions += [*self._abandon(handoff, arrival), Send(handoff[0], Refused(handoff[1], "draining"))]
        return actions

    def tick(self, now: float) -> list[Action]:
        """Offers whose deadline has passed, and links on which a page is stuck."""
        actions: list[Action] = []
        stuck = set()
        first = self._first_coming()
        for handoff, arrival in list(self._arrivals.items()):
            if now > arrival.deadline and arrival.stage in (Stage.LINED_UP, Stage.GRANTED):
                actions += [*self._abandon(handoff, arrival), Send(handoff[0], Refused(handoff[1], "the deadline has passed"))]
            if arrival.stage is Stage.ABANDONED:
                if arrival.foremost_at is None or first.get(handoff[0], arrival.behind + 1) <= arrival.behind:
                    arrival.foremost_at = now
                if now - arrival.foremost_at > LAND_S:
                    arrival.foremost_at = now
                    stuck.add(handoff[0])
        for peer in sorted(stuck):
            actions += self._close(peer)
        return actions

    # ---------------------------------------------------------------------------------------------------------- inside

    def _first_coming(self) -> dict[Incarnation, int]:
        """By prefill, the first grant of which pages are still to come."""
        first: dict[Incarnation, int] = {}
        for (peer, _), arrival in self._arrivals.items():
            if arrival.stage is Stage.GRANTED and arrival.arrived is None:
                first[peer] = min(arrival.grant, first.get(peer, arrival.grant))
        return first

    def _refusal(self, offer: Offer) -> str | None:
        if self.draining:
            return "draining"
        most = offer.length // self._page_tokens
        if len(offer.hashes) > most or any(len(digest) != HASH_BYTES for digest in offer.hashes):
            return f"{len(offer.hashes)} hashes for {most} full pages, each of {HASH_BYTES} bytes"
        return unfit(offer.job, self._max_request_tokens)

    def _again(self, peer: Incarnation, known: Arrival) -> Action:
        number = known.offer.handoff
        match known.stage:
            case Stage.COMMITTED:
                return Send(peer, Committed(number))
            case Stage.GRANTED if known.granted is not None:
                return Send(peer, known.granted)
            case Stage.ABANDONED:
                return Send(peer, Refused(number, "given up"))
        return Send(peer, Waiting(number))

    def _judge(self, handoff: Handoff, arrival: Arrival, now: float) -> list[Action]:
        """Commit if what arrived is what was sent, page by page (rule 10)."""
        word, arrived = arrival.word, arrival.arrived
        if word is None or arrived is None or arrival.stage is not Stage.GRANTED:
            return []
        sent = [tuple(sums) for sums in word.checksums]
        wrong = first_differing(arrival.missing, sent, arrived.checksums)
        if wrong is not None:
            self.rejections += 1
            return [*self._abandon(handoff, arrival), Send(handoff[0], Rejected(handoff[1], *wrong))]
        first, due = word.tokens[0][1], leader(arrival.offer.job).index
        if first.index != due:
            return [*self._abandon(handoff, arrival), Send(handoff[0], Refused(handoff[1], f"token {first.index} where {due} is due"))]
        del self._by_grant[arrival.grant]
        arrival.stage = Stage.COMMITTED
        transfer_s = word.spent_s + now - arrival.word_at
        return [Commit(handoff, arrival.offer, first, transfer_s), Send(handoff[0], Committed(handoff[1]))]

    def _abandon(self, handoff: Handoff, arrival: Arrival) -> list[Action]:
        match arrival.stage:
            case Stage.LINED_UP:
                del self._arrivals[handoff]
                return [Lapse(handoff)]
            case Stage.GRANTED:
                arrival.stage, arrival.behind = Stage.ABANDONED, self._last_grant
                return [Lapse(handoff), Abandon(arrival.grant, told=arrival.granted is not None)]
        return []

    def _close(self, peer: Incarnation) -> list[Action]:
        actions: list[Action] = []
        for handoff, arrival in list(self._arrivals.items()):
            if handoff[0] != peer:
                continue
            if arrival.stage is Stage.COMMITTED:
                del self._arrivals[handoff]
            actions += self._abandon(handoff, arrival)
        return [*actions, ClosePeer(peer)]


def first_differing(
    indices: tuple[int, ...], sent: list[tuple[int, ...]], arrived: tuple[tuple[int, ...], ...]
) -> tuple[int, list[int]] | None:
    """The first rank of which checksums differ, and the pages that they are of; all of them if the two sides do not speak of as many."""
    for rank, (theirs, ours) in enumerate(zip_longest(sent, arrived, fillvalue=())):
        if theirs == ours:
            continue
        if not indices or len(theirs) != len(ours) or len(ours) % len(indices):
            return rank, list(indices)
        places = indices * (len(ours) // len(indices))
        return rank, sorted({index for index, sum_sent, sum_here in zip(places, theirs, ours, strict=True) if sum_sent != sum_here})
    return None
