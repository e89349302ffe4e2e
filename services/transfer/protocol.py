"""The contract of moving pages between two workers, whatever carries them (UCX, or the in-process twin).

Only the receiver writes its pages. Prefill pushes what is final, while later chunks still compute; decode has posted a receive for every
granted page, or run of neighbouring pages (services/transfer/runs.py), from each rank of the prefill that holds some of it. A tag names
(grant, first page, sending rank) and is never used twice.
Everything here may be called from any thread and never blocks; results arrive as events through the callback given at construction,
which is called on the transfer's own thread and must only pass them on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from msgspec import Struct

from common.messages import GrantedRank, Incarnation, Shard

PAGE_BITS, RANK_BITS = 20, 8


def tag(grant: int, page: int, rank: int) -> int:
    """The 64-bit UCX tag of one message: grant (36 bits), index of its first page in the sequence (20), sending rank (8). The receiving
    rank needs none: each has an address of its own."""
    if not (0 <= grant < 1 << 36 and 0 <= page < 1 << PAGE_BITS and 0 <= rank < 1 << RANK_BITS):
        raise ValueError(f"no tag for grant {grant}, page {page}, rank {rank}")
    return (grant << (PAGE_BITS + RANK_BITS)) | (page << RANK_BITS) | rank


# -------------------------------------------------------------------------------------------------------------- events


class Sent(Struct, frozen=True, tag=True):
    """Every page of the handoff given to `push` so far, and `finish_push` after it, has left. `checksums[rank]` of what went to that rank
    of the receiver, by sending rank, then in page order; empty when off."""

    handoff: int
    grant: int
    checksums: tuple[tuple[int, ...], ...]


class PushFailed(Struct, frozen=True, tag=True):
    """The pages of this handoff could not be sent: the peer is gone, the way there is stuck, or an injected fault says so."""

    handoff: int
    grant: int
    reason: str


class Posted(Struct, frozen=True, tag=True):
    """Receives of the grant are posted; `ranks` says where the sender has to push."""

    grant: int
    ranks: tuple[GrantedRank, ...]


class NotPosted(Struct, frozen=True, tag=True):
    """Nothing can be received from this peer now: the grant is to be abandoned. Comes in the place of `Posted`."""

    grant: int


class Arrived(Struct, frozen=True, tag=True):
    """Every receive of the grant has completed with a whole message; `checksums` of what lies there, as in `Sent`."""

    grant: int
    checksums: tuple[tuple[int, ...], ...]


class Landed(Struct, frozen=True, tag=True):
    """Nothing can write into this abandoned grant's pages any more: they may be granted again."""

    grant: int


TransferEvent: TypeAlias = Sent | PushFailed | Posted | NotPosted | Arrived | Landed


@dataclass(frozen=True, slots=True)
class TransferCounts:
    """Since the start, for metrics and tests. Bytes are payload of whole pages."""

    sent_pages: int = 0
    sent_bytes: int = 0
    received_pages: int = 0
    received_bytes: int = 0
    failures: int = 0


class Transfer(Protocol):
    """One per worker rank. `peer` is always the incarnation of the process at the other end."""

    @property
    def counts(self) -> TransferCounts: ...

    @property
    def transport(self) -> str:
        """What carries the bytes, from the carrier's own report ("posix+cma", "tcp", "cuda_ipc", "in-process"); "" before the first."""

    # -- decode's side

    def expect(
        self,
        peer: Incarnation,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
        sources: tuple[Shard, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        """Post receives: page `pages[i]` takes the sequence's page `indices[i]`, from each of the peer's ranks (`sources`) what both hold
        of it. From a rank that holds the same part, a message begins at each index of `starts` and takes the pages up to the next, which
        lie together; without `starts`, and from other ranks, each page is a message. `Posted` says where this rank wants them sent, or
        `NotPosted` that it can take none now. Ends in `Arrived`, or, after `abandon` or `close_peer`, in `Landed`."""

    def abandon(self, grant: int, *, told: bool) -> None:
        """Give the grant up. `Landed` follows once every receive has completed (the sender flushes what it never pushed) or the peer is
        closed. `told` is False if the sender was never told of the grant: then nobody can write, and it lands at once."""

    # -- prefill's side

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
        """Send what this rank and that one hold of pages that are final: whole messages, which begin where the receiver's do. May be
        called several times for a grant while later chunks compute; pages must stay unchanged until the handoff is over."""

    def finish_push(self, handoff: int, grant: int) -> None:
        """No more pages for this grant: `Sent` follows when all have left, which takes as long as what is in front of them, or
        `PushFailed`, within PUSH_S (services/transfer/outbound.py) of the last thing that moved on their way. Nobody else has to watch
        over it."""

    def flush(
        self,
        peer: Incarnation,
        to: GrantedRank,
        handoff: int,
        grant: int,
        indices: tuple[int, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        """Withdraw: complete the receives of pages that were never pushed with one-byte messages. No event follows."""

    # -- both

    def close_peer(self, peer: Incarnation) -> None:
        """The peer is dead, or its link was: cancel what is in flight and close its endpoints; its grants end in `Landed`, its
        handoffs in `PushFailed`. It may come back under a new address."""

    def close(self) -> None:
        """Stop the thread and release everything. Pages are not touched afterwards."""


def keyed(shard: Shard, page: int) -> int:
    """The 64-bit seed of a page's checksum: its logical position in the sequence, the layer range and the head range it carries."""
    mixed = page
    for part in (*shard.layers, *shard.kv_heads):
        mixed = (mixed * 0x9E3779B97F4A7C15 + part + 1) & 0xFFFFFFFFFFFFFFFF
    return mixed
