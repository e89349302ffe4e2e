"""What `Handoffs` has its worker do. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from common.messages import GrantedRank, Incarnation, Key, Offer, Pushed, Withdraw


@dataclass(frozen=True, slots=True)
class Send:
    """A control message to a decode."""

    to: Incarnation
    body: Offer | Pushed | Withdraw


@dataclass(frozen=True, slots=True)
class Push:
    """Send final pages, in messages that begin at `starts`."""

    to: Incarnation
    rank: GrantedRank
    handoff: int
    grant: int
    pages: tuple[int, ...]
    indices: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FinishPush:
    """All pages of the grant have been given to `Push`."""

    handoff: int
    grant: int


@dataclass(frozen=True, slots=True)
class Flush:
    """Complete the receives of pages that will never be pushed, and forget the push. `indices` may be empty."""

    to: Incarnation
    rank: GrantedRank
    handoff: int
    grant: int
    indices: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ResetLink:
    """The way for pages to this decode is broken: close it on this side, and say so (`PeerBeat.link`) before anything else."""

    peer: Incarnation


@dataclass(frozen=True, slots=True)
class HandedOver:
    """`to` has committed: the pages may go, the gateway is told, the job is acknowledged."""

    key: Key
    to: Incarnation


@dataclass(frozen=True, slots=True)
class GivenUp:
    """No decode takes its pages."""

    key: Key
    detail: str


Action: TypeAlias = Send | Push | FinishPush | Flush | ResetLink | HandedOver | GivenUp
