"""The prefill worker: jobs from the queue, first tokens to the gateways, pages to the decodes."""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar

from redis.asyncio import Redis

from common.logs import get_logger
from common.messages import (
    Committed,
    Granted,
    Identity,
    Incarnation,
    Introduction,
    Key,
    Letter,
    Refused,
    Rejected,
    Role,
    Waiting,
    Withdrawn,
)
from common.queue import Claimed
from common.service import Service
from common.settings import WorkerSettings
from services.engine.binding import prefill_wants
from services.engine.plan import Computed, Outcome
from services.prefill.core import Action, PrefillCore
from services.prefill.handoffs import Handoffs
from services.prefill.moves import FinishPush, Flush, Push, ResetLink, Send
from services.prefill.peers import Peers
from services.prefill.routing import Holders, Load
from services.transfer.protocol import PushFailed, Sent, TransferEvent
from services.worker.claims import Claims
from services.worker.figures import transfer_figures
from services.worker.orders import Heard
from services.worker.room import Room
from services.worker.runs import Acknowledge, Runs
from services.worker.transfers import Transfers
from services.worker.worker import Worker

log = get_logger(__name__)


class PrefillWorker(Worker[Action]):
    role: ClassVar[Role] = "prefill"

    def __init__(self, room: Room, settings: WorkerSettings, service: Service, redis: Redis, identity: Identity) -> None:
        super().__init__(room, settings, service, redis, identity)
        page_tokens = room.layout.page_tokens
        self._core = PrefillCore(
            self.gateways.outbox,
            Handoffs(page_tokens, holders=Holders() if settings.prefix_reuse else None, growth_pages=settings.growth_pages),
            fingerprint=identity.fingerprint,
            page_tokens=page_tokens,
            max_request_tokens=identity.max_request_pages * page_tokens,
            short_tokens=settings.short_tokens,
        )
        self._transfer = Transfers(room, settings, self._transferred)
        self._peers = Peers(
            self.incarnation,
            settings.fleet,
            identity.fingerprint,
            room.layout,
            list(room.shards),
            settings.checksums,
            self._core.handoffs.pursued,
            self._answer,
            self._beaten,
            self.seal,
            self.fault,
        )
        self._claims = Claims(self.queue, self.incarnation, self._wanted_tokens, self._claimed)

    # ----------------------------------------------------------------------------------------------------------- hooks

    @property
    def runs(self) -> Runs:
        return self._core.runs

    def outcome(self, outcome: Outcome, now: float) -> list[Action]:
        if isinstance(outcome, Computed):
            self.death.strike("prefill")
        return self._core.outcome(outcome, now)

    def cancel(self, key: Key, now: float) -> list[Action]:
        return self._core.cancel(key, now)

    def over(self, key: Key) -> list[Action]:
        return self._core.over(key)

    def drain(self, now: float) -> list[Action]:
        return self._core.drain(now)

    def woken(self) -> None:
        self._claims.wake()

    def own_tasks(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        return [
            tasks.create_task(self._claims.run(), name="claims"),
            tasks.create_task(self._claims.sweep(lambda: self.gateways.alive), name="sweep"),
        ]

    def introduced(self, members: dict[Incarnation, Introduction], identity: Identity | None) -> bool:
        return self._peers.introduced(members)

    def tick(self, now: float) -> list[Action]:
        self._transfer.watch(now)
        actions: list[Action] = []
        for peer in self._peers.reap():
            actions += self._core.peer_dead(peer, now)
        self._peers.beat()
        return actions + self._core.tick(now)

    def perform(self, action: Action) -> None:
        match action:
            case Send(to, body):
                self._peers.send(to, body)
            case Push():
                self._transfer.push(action.to, action.rank, action.handoff, action.grant, action.pages, action.indices, action.starts)
            case FinishPush(handoff, grant):
                self._transfer.finish_push(handoff, grant)
                self.death.strike("transfer")
            case Flush():
                self._transfer.flush(action.to, action.rank, action.handoff, action.grant, action.indices, action.starts)
            case ResetLink(peer):
                self._transfer.close_peer(peer)
                self._peers.reset_link(peer)

    def rank_heard(self, rank: int, word: Heard) -> None:
        self._transfer.heard(rank, word)

    def own_figures(self) -> dict[str, float]:
        spared = self._core.handoffs.spared_pages
        return {**transfer_figures(self._transfer.counts), "spared_pages_total": spared, "decodes": self._core.handoffs.decodes}

    def own_words(self) -> dict[str, str]:
        """What carries the pages, by UCX's own report; empty until the first have left."""
        return {"transport": self._transfer.transport}

    def close(self) -> None:
        self._transfer.close()
        self._peers.close()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _wanted_tokens(self) -> int:
        return prefill_wants(self.snapshot, self.runs.unbegun, self.room.budget_tokens, self.settings.pp)

    def _claimed(self, batch: list[Claimed]) -> None:
        now = time.monotonic()
        for claimed in batch:
            if not self.gateways.works_for(claimed.job):
                self.do([Acknowledge(claimed.entry)])
                continue
            self.do(self._core.claimed(claimed.entry, claimed.aged, now))
            self.death.strike("prefill_queue")

    def _answer(self, letter: Letter) -> None:
        body = letter.body
        if isinstance(body, Waiting | Granted | Refused | Committed | Rejected | Withdrawn):
            self.do(self._core.letter(letter.sender, body, time.monotonic()))

    def _beaten(self, peer: Incarnation, load: Load | None) -> None:
        self.do(self._core.beat(peer, load, time.monotonic()))

    def _transferred(self, event: TransferEvent) -> None:
        now = time.monotonic()
        match event:
            case Sent():
                self.do(self._core.sent(event, now))
            case PushFailed():
                log.warning("pages could not be pushed", handoff=event.handoff, reason=event.reason)
                self.do(self._core.push_failed(event, now))
            case _:
                raise AssertionError(f"a prefill receives no pages: {event}")
