"""Handoffs on their way into this engine: a line of offers, first in first out, and the grants whose pages are in transit.

    reserve ──► in line ──grant──► granted ──admit──► (a running sequence)
                   │                  │
                 lapse              lapse ──► lapsed ──landed──► (pages free)

A lapsed grant's pages stay in transit until `landed`: somebody may still be writing into them. What it shares goes with them, because a
lapsed grant can be taken up again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from services.engine.pages import PagePool
from services.engine.plan import Granted, Handoff
from services.engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class Grant:
    """Pages in transit for a handoff, and those before them that the pool held already: referenced until the handoff is over."""

    sequence: Sequence
    shared: tuple[int, ...]
    pages: tuple[int, ...]
    lapsed: bool = False


class InboundLine:
    """Offers and grants by handoff. Commands that come twice or too late change nothing."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._line: deque[tuple[Handoff, Sequence]] = deque()
        self._grants: dict[Handoff, Grant] = {}

    def __len__(self) -> int:
        """Handoffs in line or in transit."""
        return len(self._line) + len(self._grants)

    @property
    def granted(self) -> int:
        """Grants that are live."""
        return sum(not grant.lapsed for grant in self._grants.values())

    @property
    def head(self) -> Sequence | None:
        """The sequence whose turn it is."""
        return self._line[0][1] if self._line else None

    def sequences(self) -> list[tuple[Handoff, Sequence]]:
        return [*self._line, *((handoff, grant.sequence) for handoff, grant in self._grants.items())]

    def reserve(self, handoff: Handoff, sequence: Sequence) -> bool:
        """Stand in line. True: it has a grant already, which is taken up again; nobody can have acted on it, or its receives would have
        had to land before the handoff could be offered anew."""
        grant = self._grants.get(handoff)
        if grant is not None:
            revived, grant.lapsed = grant.lapsed, False
            if revived:
                grant.sequence = sequence
            return revived
        if all(handoff != other for other, _ in self._line):
            self._line.append((handoff, sequence))
        return False

    def grant(self, count: int, known: tuple[int, ...] = ()) -> Granted | None:
        """`count` pages for the head of the line, of which those of its known beginning are shared and the others reserved; None if there
        are not as many."""
        missing = count - len(known)
        if missing + self._pool.idle(known) > self._pool.available:
            return None
        self._pool.share(known)
        pages = self._pool.reserve(missing)
        assert pages is not None, "there was room for a grant"
        handoff, sequence = self._line.popleft()
        self._grants[handoff] = Grant(sequence, known, pages)
        return Granted(handoff, (*known, *pages), len(known))

    def admit(self, handoff: Handoff) -> tuple[Sequence, tuple[int, ...]]:
        """All of its pages are verified: they are held from now on. Raises ValueError if it has no live grant."""
        grant = self._grants.get(handoff)
        if grant is None or grant.lapsed:
            raise ValueError(f"handoff {handoff} has no live grant")
        del self._grants[handoff]
        self._pool.arrived(grant.pages)
        return grant.sequence, (*grant.shared, *grant.pages)

    def lapse(self, handoff: Handoff) -> Sequence | None:
        """Give it up; the sequence that had a live grant, if any."""
        grant = self._grants.get(handoff)
        if grant is None:
            self._line = deque(offer for offer in self._line if offer[0] != handoff)
            return None
        lapsed, grant.lapsed = grant.lapsed, True
        return None if lapsed else grant.sequence

    def landed(self, handoff: Handoff) -> Sequence | None:
        """Nothing can write into its pages any more: they are free. The sequence if its grant was still live."""
        grant = self._grants.pop(handoff, None)
        if grant is None:
            return None
        self._pool.landed(grant.pages)
        self._pool.release(grant.shared)
        return None if grant.lapsed else grant.sequence
