"""What one rank pushes, whatever carries it: pages under way by handoff, when all have left, and deadlines. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import Incarnation
from services.transfer.protocol import PushFailed, Sent, TransferEvent

PUSH_S = 5.0
"""A push of which nothing has moved for this long has failed: every wait has a deadline."""


@dataclass(eq=False)
class Push:
    """The pages of one handoff under one grant."""

    peer: Incarnation
    handoff: int
    grant: int
    moved_at: float
    under_way: int = 0
    sums: dict[int, int] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    """Indices that an injected fault keeps back; they count as under way."""
    finished: bool = False
    over: bool = False
    """Sent, failed or withdrawn: nothing more is said about it."""


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
        """One page has left."""
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

    def withdraw(self, handoff: int, grant: int) -> set[int]:
        """Nothing more is said about it. Returns the indices held back, whose receives are open as well."""
        push = self._pushes.pop((handoff, grant), None)
        if push is None:
            return set()
        push.over = True
        return push.held

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
        """Pushes of which nothing has moved for `push_s` fail."""
        events: list[TransferEvent] = []
        for push in list(self._pushes.values()):
            if push.under_way and now - push.moved_at > self._push_s:
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
        return [Sent(push.handoff, push.grant, tuple(push.sums[index] for index in sorted(push.sums)))]
