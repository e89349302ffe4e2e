"""The transfers of all ranks of a worker as one: rank to rank, without a detour through rank 0, which only says what goes where."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.messages import GrantedRank, Incarnation, Shard
from common.settings import WorkerSettings
from services.transfer.faults import parse
from services.transfer.gather import Gather
from services.transfer.parts import common_part
from services.transfer.protocol import TransferCounts, TransferEvent
from services.transfer.ucx import UcxTransfer
from services.worker.orders import Abandon, ClosePeer, Expect, FinishPush, Flush, Heard, Push
from services.worker.room import Room
from services.worker.watch import Watch


class Transfers:
    """Used on the event loop; events come there. The methods are those of `Transfer` (services/transfer/protocol.py)."""

    def __init__(self, room: Room, settings: WorkerSettings, on_event: Callable[[TransferEvent], None]) -> None:
        self._ranks = room.ranks
        self._shards = room.shards
        self._on_event = on_event
        self._gather = Gather(len(room.shards))
        self._loop = asyncio.get_running_loop()
        self._own = UcxTransfer(
            room.pool.bytes, room.shards[0], self._transferred, checksums=settings.checksums, fault=parse(settings.fault)
        )
        self._watch = Watch(self._own)

    @property
    def counts(self) -> TransferCounts:
        every = [self._own.counts, *self._ranks.counts]
        return TransferCounts(
            sent_pages=sum(one.sent_pages for one in every),
            sent_bytes=sum(one.sent_bytes for one in every),
            received_pages=sum(one.received_pages for one in every),
            received_bytes=sum(one.received_bytes for one in every),
            failures=sum(one.failures for one in every),
        )

    @property
    def transport(self) -> str:
        """Rank 0's."""
        return self._own.transport

    def watch(self, now: float) -> None:
        """Once a beat. Raises TransferError if rank 0's thread has died or hangs; the other ranks watch their own."""
        self._watch.look(now)

    def heard(self, rank: int, word: Heard) -> None:
        """Another rank's transfer has said this."""
        self._said(rank, word.event)

    def expect(
        self,
        peer: Incarnation,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
        sources: tuple[Shard, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        self._ranks.command(Expect(peer, grant, pages, indices, sources, starts))
        self._own.expect(peer, grant, pages, indices, sources, starts)

    def abandon(self, grant: int, *, told: bool) -> None:
        self._ranks.command(Abandon(grant, told))
        self._own.abandon(grant, told=told)

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
        """By every rank that holds something of what `to` wants."""
        for rank in self._concerned(to):
            if rank:
                self._ranks.command_one(rank, Push(peer, to, handoff, grant, pages, indices, starts))
            else:
                self._own.push(peer, to, handoff, grant, pages, indices, starts)

    def finish_push(self, handoff: int, grant: int) -> None:
        self._gather.finishing(handoff, grant)
        self._ranks.command(FinishPush(handoff, grant))
        self._own.finish_push(handoff, grant)

    def flush(
        self,
        peer: Incarnation,
        to: GrantedRank,
        handoff: int,
        grant: int,
        indices: tuple[int, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        self._gather.withdrawn(handoff, grant)
        for rank in self._concerned(to):
            if rank:
                self._ranks.command_one(rank, Flush(peer, to, handoff, grant, indices, starts))
            else:
                self._own.flush(peer, to, handoff, grant, indices, starts)

    def close_peer(self, peer: Incarnation) -> None:
        self._ranks.command(ClosePeer(peer))
        self._own.close_peer(peer)

    def close(self) -> None:
        """Rank 0's own: the others close theirs when they end."""
        self._own.close()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _concerned(self, to: GrantedRank) -> list[int]:
        return [shard.rank for shard in self._shards if common_part(shard, to.shard) is not None]

    def _transferred(self, event: TransferEvent) -> None:
        """On the transfer's thread."""
        self._loop.call_soon_threadsafe(self._said, 0, event)

    def _said(self, rank: int, event: TransferEvent) -> None:
        whole = self._gather.heard(rank, event)
        if whole is not None:
            self._on_event(whole)
