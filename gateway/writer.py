"""The gateway's hand at the job queue: puts, removes and buries what the desk gives it, and keeps the right to run a request alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeAlias

from redis.asyncio import Redis

from common.connection import close_idle
from common.errors import QueueError
from common.fleet import Fleet
from common.logs import get_logger
from common.messages import Job
from common.queue import Entry, EntryState, JobQueue
from gateway.flight import Bury, Put, Remove

log = get_logger(__name__)

WRITERS = 4
"""Operations under way at once: one that waits for a slow Redis must not hold up all others."""

Write: TypeAlias = Put | Remove | Bury


class QueueWriter:
    """Tells `done` how each put went; a put that failed is the ledger's to repeat, everything else is done again once Redis is back."""

    def __init__(
        self, redis: Redis, fleet: Fleet, done: Callable[[Job, Entry | None], None], on_reenqueued: Callable[[float], None]
    ) -> None:
        """`done`: the job and where it stands now, None if it was not put. `on_reenqueued`: seconds from the last word of a lost worker to
        the new attempt in the queue."""
        self._queue: JobQueue | None = None
        self._redis = redis
        self._fleet = fleet
        self._done = done
        self._on_reenqueued = on_reenqueued
        self._writes: asyncio.Queue[Write] = asyncio.Queue()
        self._undone: list[Write] = []
        """What Redis did not take."""
        self._alone: set[str] = set()
        """Requests for which we hold the fleet's right to run alone."""

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        return [tasks.create_task(self._write_forever(), name=f"writer {number}") for number in range(WRITERS)]

    def open(self, fleet: str, fingerprint: str) -> None:
        """The queue of this fleet and model, from now on; before the first one nothing may be added."""
        self._queue = JobQueue(self._redis, fleet, fingerprint)

    def add(self, write: Write) -> None:
        self._writes.put_nowait(write)

    async def tidy(self, alone: set[str]) -> None:
        """To be called once a second: what was left undone is tried again; the right to run alone is renewed for the requests in `alone`
        and given back for all others. Raises QueueError."""
        undone, self._undone = self._undone, []
        for write in undone:
            self.add(write)
        if self._queue is None:
            return
        for request_id in self._alone - alone:
            await self._queue.unlock_alone(request_id)
        self._alone &= alone
        for request_id in tuple(self._alone):
            await self._queue.lock_alone(request_id)

    async def states(self, entries: list[Entry]) -> dict[Entry, EntryState]:
        """Where these entries stand. Raises QueueError."""
        return await self._queue.states(entries) if self._queue is not None else {}

    async def _write_forever(self) -> None:
        while True:
            write = await self._writes.get()
            if not await self._written(write):
                self._undone.append(write)

    async def _written(self, write: Write) -> bool:
        """False if it has to be done again."""
        assert self._queue is not None
        try:
            match write:
                case Put(job, job_class, silent_since):
                    await self._put(self._queue, job, job_class, silent_since)
                case Remove(entry):
                    await self._queue.remove(entry)
                case Bury(job, reason):
                    await self._queue.bury(job, reason)
        except QueueError as error:
            log.warning("the queue refuses", action=type(write).__name__, error=error)
            return False
        return True

    async def _put(self, queue: JobQueue, job: Job, job_class: str, silent_since: float | None) -> None:
        """One XADD. A suspicious request waits until no other one runs alone in the fleet."""
        try:
            if job.alone and not await queue.lock_alone(job.request_id):
                raise QueueError("another request runs alone")
            if job.alone:
                self._alone.add(job.request_id)
            entry = await self._put_twice(queue, job, job_class)
        except QueueError as error:
            log.warning("a job was not put", request=job.request_id, attempt=job.choices[0].attempt, error=error)
            self._done(job, None)
        else:
            if silent_since is not None:
                self._on_reenqueued(time.monotonic() - silent_since)
            self._done(job, entry)

    async def _put_twice(self, queue: JobQueue, job: Job, job_class: str) -> Entry:
        """A connection that died with an earlier Redis fails once. Should the job stand there twice, the first execution wins (rule 1)."""
        try:
            return await queue.put(job, job_class)
        except QueueError:
            if self._fleet.away:
                raise
            await close_idle(self._redis)
            return await queue.put(job, job_class)
