"""What one rank expects, whatever carries it: grants, how many of their receives are open, when they have arrived or landed. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.messages import Incarnation
from services.transfer.protocol import Arrived, Landed, TransferEvent


@dataclass(eq=False)
class _Grant:
    peer: Incarnation
    open: int
    """Receives not yet completed."""
    sums: dict[tuple[int, int], int] = field(default_factory=dict)
    """By sending rank and index."""
    whole: bool = True
    abandoned: bool = False


class Inbound:
    """All grants in transit. A grant is forgotten with its `Arrived` or `Landed`; each comes at most once."""

    def __init__(self) -> None:
        self._grants: dict[int, _Grant] = {}

    def expect(self, peer: Incarnation, grant: int, receives: int) -> list[TransferEvent]:
        """Raises ValueError for a grant already in transit: tags would be used twice."""
        if grant in self._grants:
            raise ValueError(f"grant {grant} is already in transit")
        self._grants[grant] = _Grant(peer, receives)
        return self._judge(grant)

    def wanted(self, grant: int) -> bool:
        """Whether a page of this grant that completes now is worth a checksum: not if it was abandoned or has failed."""
        known = self._grants.get(grant)
        return known is not None and known.whole and not known.abandoned

    def completed(self, grant: int, sums: Mapping[int, int], *, whole: bool, source: int = 0) -> list[TransferEvent]:
        """A receive ended: with all that rank `source` of the peer has of its pages, or cancelled, failed or flushed. `sums`: checksums by
        index."""
        known = self._grants.get(grant)
        if known is None:
            return []
        known.open -= 1
        known.whole &= whole
        for index, checksum in sums.items():
            known.sums[source, index] = checksum
        return self._judge(grant)

    def abandon(self, grant: int, *, told: bool) -> list[TransferEvent]:
        """Unknown grants, and those that the sender has never heard of, land at once."""
        known = self._grants.get(grant)
        if known is None or not told:
            self._grants.pop(grant, None)
            return [Landed(grant)]
        known.abandoned = True
        return self._judge(grant)

    def close(self, peer: Incarnation) -> list[TransferEvent]:
        """The peer's grants are abandoned; those with open receives land when these have ended."""
        events: list[TransferEvent] = []
        for grant in self.of(peer):
            events += self.abandon(grant, told=True)
        return events

    def of(self, peer: Incarnation) -> list[int]:
        """Grants to this peer that are still in transit."""
        return [grant for grant, known in self._grants.items() if known.peer == peer]

    def __len__(self) -> int:
        """Grants in transit."""
        return len(self._grants)

    def _judge(self, grant: int) -> list[TransferEvent]:
        known = self._grants[grant]
        if known.open or not (known.whole or known.abandoned):
            return []
        del self._grants[grant]
        if known.abandoned:
            return [Landed(grant)]
        return [Arrived(grant, (tuple(known.sums[pair] for pair in sorted(known.sums)),))]
