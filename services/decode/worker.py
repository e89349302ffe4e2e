"""The decode worker: pages from the prefills, tokens to the gateways."""

from __future__ import annotations

import time
from typing import ClassVar

from redis.asyncio import Redis

from common.beats import Liveness
from common.logs import get_logger
from common.messages import (
    PROTOCOL,
    Identity,
    Incarnation,
    Key,
    Letter,
    Mismatch,
    Offer,
    PeerBeat,
    Pushed,
    Role,
    Shard,
    Withdraw,
)
from common.service import Service
from common.settings import WorkerSettings
from services.decode.core import Action, DecodeCore
from services.decode.inbound import Abandon, ClosePeer, Commit, Expect, Inbound, Land, Lapse, Reserve, Send
from services.engine.plan import Drawn, Outcome
from services.transfer.parts import covers
from services.transfer.protocol import Arrived, Landed, NotPosted, Posted, TransferEvent
from services.transfer.runs import RUN_BYTES, most_pages
from services.worker.figures import transfer_figures
from services.worker.orders import Heard
from services.worker.room import Room
from services.worker.runs import Runs
from services.worker.transfers import Transfers
from services.worker.worker import Worker

log = get_logger(__name__)


class DecodeWorker(Worker[Action]):
    role: ClassVar[Role] = "decode"

    def __init__(self, room: Room, settings: WorkerSettings, service: Service, redis: Redis, identity: Identity) -> None:
        super().__init__(room, settings, service, redis, identity)
        most = identity.max_request_pages * room.layout.page_tokens
        run_pages = most_pages(room.pool.layout.page_bytes, RUN_BYTES[room.pool.tensor.device.type])
        self._core = DecodeCore(
            self.gateways.outbox,
            Inbound(room.layout.page_tokens, most, run_pages=run_pages),
            max_request_tokens=most,
        )
        self._transfer = Transfers(room, settings, self._transferred)
        self._prefills = Liveness()
        self._shards: dict[Incarnation, tuple[Shard, ...]] = {}
        """What each rank of a living prefill holds."""

    # ----------------------------------------------------------------------------------------------------------- hooks

    @property
    def runs(self) -> Runs:
        return self._core.runs

    def outcome(self, outcome: Outcome, now: float) -> list[Action]:
        if isinstance(outcome, Drawn):
            self.death.strike("decode")
        return self._core.outcome(outcome, now)

    def cancel(self, key: Key, now: float) -> list[Action]:
        return self._core.cancel(key, now)

    def over(self, key: Key) -> list[Action]:
        return self._core.over(key)

    def drain(self, now: float) -> list[Action]:
        return self._core.drain(now)

    def letter(self, letter: Letter) -> None:
        now = time.monotonic()
        body, peer = letter.body, letter.sender
        if isinstance(body, PeerBeat):
            reason = self._mismatch(body)
            if reason is not None:
                self.server.refusals.note("mismatch", sender=peer)
                self.server.send(peer, Mismatch(reason))
                return
            if peer not in self._prefills.alive:
                self.server.send(peer, self.facts())  # it makes no offers before our first beat
            self._prefills.heard(peer, now)
            self._shards[peer] = tuple(body.shards)
        elif peer not in self._prefills.alive:
            self.server.refusals.note("stranger", sender=peer)
            return
        if isinstance(body, PeerBeat | Offer | Pushed | Withdraw):
            if isinstance(body, Offer):
                self.gateways.meet(body.job.gateway, body.job.tokens_address)
            self.do(self._core.letter(peer, body, now))
        else:
            super().letter(letter)

    def tick(self, now: float) -> list[Action]:
        self._transfer.watch(now)
        actions: list[Action] = []
        for peer, reason in self._prefills.dead(now):
            log.warning("prefill lost", prefill=peer, reason=reason)
            self._prefills.forget(peer)
            self._shards.pop(peer, None)
            actions += self._core.peer_dead(peer, now)
        facts = self.facts()
        for peer in self._prefills.alive:
            self.server.send(peer, facts)
        return actions + self._core.tick(now)

    def perform(self, action: Action) -> None:
        scheduler = self.room.scheduler
        match action:
            case Send(to, body):
                self.server.send(to, body)
            case Reserve(handoff, sequence):
                self.engine.post(scheduler.reserve, handoff, sequence)
            case Lapse(handoff):
                self.engine.post(scheduler.lapse, handoff)
            case Land(handoff):
                self.engine.post(scheduler.landed, handoff)
            case Expect(handoff, grant, pages, indices, starts):
                self.death.strike("transfer")
                self._transfer.expect(handoff[0], grant, pages, indices, self._shards[handoff[0]], starts)
            case Abandon(grant, told):
                self._transfer.abandon(grant, told=told)
            case ClosePeer(peer):
                self._transfer.close_peer(peer)
            case Commit(handoff, offer, token, _):
                self.gateways.meet(offer.job.gateway, offer.job.tokens_address)
                self.engine.post(scheduler.admit, handoff, token)
                self.death.strike("decode_queue")

    def rank_heard(self, rank: int, word: Heard) -> None:
        self._transfer.heard(rank, word)

    def own_figures(self) -> dict[str, float]:
        return transfer_figures(self._transfer.counts)

    def close(self) -> None:
        self._transfer.close()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _mismatch(self, beat: PeerBeat) -> str | None:
        """Why a prefill cannot hand over to this decode, or None. Degrees of parallelism may differ: ranks exchange what both hold."""
        if beat.protocol != PROTOCOL:
            return f"protocol {beat.protocol}, this decode speaks {PROTOCOL}"
        if (beat.fleet, beat.fingerprint) != (self.settings.fleet, self.identity.fingerprint):
            return f"fleet {beat.fleet} and fingerprint {beat.fingerprint}, this decode has {self.identity.fingerprint}"
        if beat.layout != self.room.layout:
            return f"pages of {beat.layout}, this decode has {self.room.layout}"
        if beat.checksums != self.settings.checksums:
            return f"checksums {'on' if beat.checksums else 'off'}, this decode has them {'on' if self.settings.checksums else 'off'}"
        if not covers(beat.layout, beat.shards):
            return f"ranks that do not hold each head of each layer once: {beat.shards}"
        return None

    def _transferred(self, event: TransferEvent) -> None:
        now = time.monotonic()
        match event:
            case Posted():
                self.do(self._core.posted(event, now))
            case NotPosted():
                self.do(self._core.not_posted(event, now))
            case Arrived():
                self.do(self._core.arrived(event, now))
            case Landed():
                self.do(self._core.landed(event, now))
            case _:
                raise AssertionError(f"a decode pushes no pages: {event}")
