"""From what each rank's transfer says to what the worker's says: a word of all ranks is said when the last of them has said it. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import zip_longest

from common.messages import GrantedRank
from services.transfer.protocol import Arrived, Landed, NotPosted, Posted, PushFailed, Sent, TransferEvent


@dataclass(eq=False)
class _Grant:
    """What each rank of a decode has said about a grant."""

    posted: dict[int, GrantedRank] = field(default_factory=dict)
    arrived: dict[int, tuple[int, ...]] = field(default_factory=dict)
    landed: set[int] = field(default_factory=set)


class Gather:
    """Words of `ranks` ranks."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._grants: dict[int, _Grant] = {}
        self._pushes: dict[tuple[int, int], dict[int, tuple[tuple[int, ...], ...]]] = {}

    def __len__(self) -> int:
        """Grants and pushes of which something is still to be said."""
        return len(self._grants) + len(self._pushes)

    def finishing(self, handoff: int, grant: int) -> None:
        """Every rank has been told that this push is complete: each will say `Sent`."""
        self._pushes[handoff, grant] = {}

    def withdrawn(self, handoff: int, grant: int) -> None:
        """Nothing more is said about this push."""
        self._pushes.pop((handoff, grant), None)

    def heard(self, rank: int, event: TransferEvent) -> TransferEvent | None:
        """The worker's event that this one completes, if any. A failure on one rank is the worker's at once."""
        match event:
            case Posted(number, ranks):
                grant = self._grants.setdefault(number, _Grant())
                grant.posted[rank] = ranks[0]
                return Posted(number, tuple(grant.posted[r] for r in range(self._ranks))) if self._all(grant.posted) else None
            case Arrived(number, checksums):
                grant = self._grants.setdefault(number, _Grant())
                grant.arrived[rank] = checksums[0]
                if not self._all(grant.arrived):
                    return None
                del self._grants[number]
                return Arrived(number, tuple(grant.arrived[r] for r in range(self._ranks)))
            case Landed(number):
                grant = self._grants.setdefault(number, _Grant())
                grant.landed.add(rank)
                if not self._all(grant.landed):
                    return None
                del self._grants[number]
                return event
            case Sent(handoff, number, checksums):
                sent = self._pushes.get((handoff, number))
                if sent is None:
                    return None
                sent[rank] = checksums
                if not self._all(sent):
                    return None
                del self._pushes[handoff, number]
                return Sent(handoff, number, _by_receiver([sent[r] for r in range(self._ranks)]))
            case NotPosted():
                return event
            case PushFailed(handoff, number):
                self.withdrawn(handoff, number)
                return event

    def _all(self, said: Collection[int]) -> bool:
        return len(said) == self._ranks


def _by_receiver(senders: list[tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
    """Each sender's checksums by receiving rank → those of all senders by receiving rank, one sender behind the other."""
    return tuple(sum(columns, ()) for columns in zip_longest(*senders, fillvalue=()))
