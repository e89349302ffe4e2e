"""The colocated worker: both phases with one engine, from the same queue. The baseline, and a way to serve from one device."""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar

from redis.asyncio import Redis

from common.messages import Identity, Key, Role
from common.queue import Claimed
from common.service import Service
from common.settings import WorkerSettings
from services.engine.binding import colocated_wants
from services.engine.plan import Began, Computed, Drawn, Failed, Granted, Outcome, Preempted
from services.worker.claims import Claims
from services.worker.room import Room
from services.worker.runs import Acknowledge, Action, Runs
from services.worker.worker import Worker


class ColocatedWorker(Worker[Action]):
    role: ClassVar[Role] = "colocated"

    def __init__(self, room: Room, settings: WorkerSettings, service: Service, redis: Redis, identity: Identity) -> None:
        super().__init__(room, settings, service, redis, identity)
        most = identity.max_request_pages * room.layout.page_tokens
        self._runs = Runs(self.gateways.outbox, most, parks=False)
        self._claims = Claims(self.queue, self.incarnation, self._wanted_tokens, self._claimed)

    @property
    def runs(self) -> Runs:
        return self._runs

    def outcome(self, outcome: Outcome, now: float) -> list[Action]:
        match outcome:
            case Began():
                self._runs.began(outcome, now)
            case Drawn():
                self._runs.drawn(outcome, now)
            case Preempted() | Failed():
                self._runs.ended(outcome)
            case Computed():
                pass
            case Granted():
                raise AssertionError("a colocated worker reserves no pages for others")
        return []

    def cancel(self, key: Key, now: float) -> list[Action]:
        return self._runs.cancel(key)

    def over(self, key: Key) -> list[Action]:
        return self._runs.over(key)

    def drain(self, now: float) -> list[Action]:
        return self._runs.drain()

    def perform(self, action: Action) -> None:
        raise AssertionError(f"no action of its own: {action}")

    def woken(self) -> None:
        self._claims.wake()

    def own_tasks(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        return [
            tasks.create_task(self._claims.run(), name="claims"),
            tasks.create_task(self._claims.sweep(lambda: self.gateways.alive), name="sweep"),
        ]

    def _wanted_tokens(self) -> int:
        return colocated_wants(self.snapshot, self._runs.unbegun, self.room.budget_tokens, self.settings.max_batch)

    def _claimed(self, batch: list[Claimed]) -> None:
        now = time.monotonic()
        for claimed in batch:
            if self.gateways.works_for(claimed.job):
                self.do(self._runs.claimed(claimed.entry, claimed.aged, now))
            else:
                self.do([Acknowledge(claimed.entry)])
