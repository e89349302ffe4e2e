"""What one rank pushes, whatever carries it: messages under way by handoff, when all have left, and deadlines. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import Incarnation
from services.transfer.protocol import PushFailed, Sent, TransferEvent

PUSH_S = 5.0
"""A push has failed when nothing has moved for this long on a way that it was given to: every wait has a deadline."""


@dataclass(eq=False)
class Way:
    """To one address of a peer, first in, first out: what is behind waits for what is in front, however much that is."""

    since: float | None = None
    """When something last moved on it, or began to wait there; None: nothing waits."""


@dataclass(eq=False)
class Push:
    """The messages of one handoff under one grant."""

    peer: Incarnation
    handoff: int
    grant: int
    moved_at: float
    under_way: int = 0
    """Messages."""
    ways: set[Way] = field(default_factory=set)
    """What it was given to. A carrier without any (the twin) is judged by what moves of the push itself."""
    sums: dict[tuple[int, int], int] = field(default_factory=dict)
    """By receiving rank and index."""
    held: set[tuple[int, int]] = field(default_factory=set)
    """Receiving ranks and first indices of messages that an injected fault keeps back; they count as under way, but are on no way."""
    finished: bool = False
    over: bool = False
    """Sent, failed or withdrawn: nothing more is said about it."""

    @property
    def since(self) -> float | None:
        """When that for which it waits last moved: each way that carries something, and itself with pages that are on none."""
        waits = [way.since for way in self.ways if way.since is not None]
        if self.held or (self.under_way and not waits):
            waits.append(self.moved_at)
        return min(waits, default=None)


class Outbound:
    """All pushes by (handoff, grant). One that failed is kept until it is finished, flushed or its peer closed, so that pages which
    are still being given to it go nowhere."""

    def __init__(self, push_s: float = PUSH_S) -> None:
        self._push_s = push_s
        self._pushes: dict[tuple[int, int], Push] = {}
        self.failures = 0

    def push(self, peer: Incarnation, handoff: int, grant: int, now: float) -> Push:
        push = self._pushes.setdefault((handoff, grant), Push(peer, handoff, grant, now))
        push.moved_at = now
        return push

    def left(self, push: Push, now: float) -> list[TransferEvent]:
        """One message has left."""
        push.under_way -= 1
        push.moved_at = now
        return self._judge(push)

    def finish(self, handoff: int, grant: int, now: float) -> list[TransferEvent]:
        """A grant of which nothing had to be pushed is sent at once."""
        push = self.push("", handoff, grant, now)
        push.finished = True
        if push.over:
            del self._pushes[(handoff, grant)]
        return self._judge(push)

    def withdraw(self, handoff: int, grant: int, rank: int) -> set[int]:
        """Nothing more is said about it. Returns the indices held back from this receiving rank, whose receives are open as well. The push
        is forgotten when nothing is held back from the others."""
        push = self._pushes.get((handoff, grant))
        if push is None:
            return set()
        push.over = True
        held = {pair for pair in push.held if pair[0] == rank}
        push.held -= held
        if not push.held:
            del self._pushes[(handoff, grant)]
        return {index for _, index in held}

    def fail(self, push: Push, reason: str) -> list[TransferEvent]:
        if push.over:
            return []
        push.over = True
        self.failures += 1
        if push.finished:
            del self._pushes[(push.handoff, push.grant)]
        return [PushFailed(push.handoff, push.grant, reason)]

    def close(self, peer: Incarnation, reason: str = "the peer was closed") -> list[TransferEvent]:
        """All pushes to this peer have failed and are forgotten."""
        events: list[TransferEvent] = []
        for key, push in list(self._pushes.items()):
            if push.peer == peer:
                events += self.fail(push, reason)
                self._pushes.pop(key, None)
        return events

    def late(self, now: float) -> list[TransferEvent]:
        """Pushes that have waited for `push_s` while nothing moved fail."""
        events: list[TransferEvent] = []
        for push in list(self._pushes.values()):
            if push.since is not None and now - push.since > self._push_s:
                events += self.fail(push, f"nothing has moved for {self._push_s:g} s")
        return events

    def __len__(self) -> int:
        """Pushes that are neither sent nor failed nor withdrawn."""
        return sum(not push.over for push in self._pushes.values())

    def _judge(self, push: Push) -> list[TransferEvent]:
        if push.over or not push.finished or push.under_way:
            return []
        push.over = True
        del self._pushes[(push.handoff, push.grant)]
        return [Sent(push.handoff, push.grant, _by_rank(push.sums))]


def _by_rank(sums: dict[tuple[int, int], int]) -> tuple[tuple[int, ...], ...]:
    """One tuple for each receiving rank up to the last one that was sent anything."""
    ranks = 1 + max((rank for rank, _ in sums), default=-1)
    ordered = sorted(sums)
    return tuple(tuple(sums[pair] for pair in ordered if pair[0] == rank) for rank in range(ranks))
