"""Jobs through Redis Streams: one stream per class, one consumer group, consumers named by incarnation.

Redis may restart empty at any moment: a missing group is made again and the operation repeated once. redis-py's silent retries are
off, because a retried XADD can enter a job twice; what fails becomes a QueueError, and the gateway decides (protocol rules 1, 4, 14).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from common import names
from common.errors import MessageError, QueueError
from common.logs import get_logger
from common.messages import Incarnation, Job, decode, encode

log = get_logger(__name__)

CONNECT_S = 2.0
ANSWER_S = 5.0
"""Redis answers within this long, or it counts as away. Blocking reads must be shorter."""
MAX_JOB_BYTES = 16 << 20
DEAD_LETTERS = 1000
"""The dead-letter stream keeps about this many."""
ALONE_S = 60
"""A request that runs alone keeps others from doing so for at most this long."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Entry:
    """A job's place in the queue."""

    job_class: str
    id: str


@dataclass(frozen=True, slots=True)
class Claimed:
    entry: Entry
    job: Job


@dataclass(frozen=True, slots=True)
class Absent:
    """Not in Redis: acknowledged, or lost with a Redis that restarted empty."""


@dataclass(frozen=True, slots=True)
class Queued:
    """In the stream, delivered to nobody."""


@dataclass(frozen=True, slots=True)
class Pending:
    """Delivered to a consumer `idle_s` seconds ago and not acknowledged."""

    consumer: Incarnation
    idle_s: float


EntryState: TypeAlias = Absent | Queued | Pending


@dataclass(frozen=True, slots=True)
class Delivered:
    """A pending entry with its job (None if it is gone from the stream or unreadable)."""

    entry: Entry
    state: Pending
    job: Job | None


def connect(url: str) -> Redis:
    """A client for the queue and the fleet. Raises QueueError on a URL that is none."""
    try:
        return Redis.from_url(
            url,
            socket_connect_timeout=CONNECT_S,
            socket_timeout=ANSWER_S,
            retry=Retry(NoBackoff(), 0),
            retry_on_timeout=False,
            health_check_interval=0,
            decode_responses=False,
        )
    except ValueError as error:
        raise QueueError(f"not a Redis URL: {error}") from error


async def mapped(operation: Awaitable[_T]) -> _T:
    """Redis' errors become ours."""
    try:
        return await operation
    except (RedisError, OSError, TimeoutError) as error:
        raise QueueError(f"{type(error).__name__}: {error}") from error


class JobQueue:
    """The job streams of one fleet and model."""

    def __init__(self, redis: Redis, fleet: str, fingerprint: str) -> None:
        self._redis: Any = redis
        self._fleet = fleet
        self._streams = {job_class: names.stream(fleet, fingerprint, job_class) for job_class in names.CLASSES}
        self._classes = {stream: job_class for job_class, stream in self._streams.items()}

    # --------------------------------------------------------------------------------------------------------- gateway

    async def put(self, job: Job, job_class: str) -> Entry:
        """One XADD, never repeated here. Raises QueueError when Redis is away, refuses, or the job is absurdly large."""
        data = encode(job)
        if len(data) > MAX_JOB_BYTES:
            raise QueueError(f"a job of {len(data)} bytes; the limit is {MAX_JOB_BYTES}")
        entry = await mapped(self._redis.xadd(self._streams[job_class], {b"job": data}))
        return Entry(job_class, entry.decode())

    async def states(self, entries: list[Entry]) -> dict[Entry, EntryState]:
        """Where these entries stand, in one round trip."""

        async def look() -> dict[Entry, EntryState]:
            pipe = self._redis.pipeline(transaction=False)
            for entry in entries:
                stream = self._streams[entry.job_class]
                pipe.xrange(stream, min=entry.id, max=entry.id, count=1)
                pipe.xpending_range(stream, names.GROUP, min=entry.id, max=entry.id, count=1)
            answers = await pipe.execute()
            return {entry: self._state(*answers[2 * i : 2 * i + 2]) for i, entry in enumerate(entries)}

        return await self._with_groups(look)

    @staticmethod
    def _state(there: list[Any], pending: list[Any]) -> EntryState:
        if pending:
            return Pending(pending[0]["consumer"].decode(), pending[0]["time_since_delivered"] / 1000)
        return Queued() if there else Absent()

    async def remove(self, *entries: Entry) -> None:
        """Acknowledge and delete; idempotent."""

        async def drop() -> None:
            pipe = self._redis.pipeline(transaction=False)
            for entry in entries:
                stream = self._streams[entry.job_class]
                pipe.xack(stream, names.GROUP, entry.id)
                pipe.xdel(stream, entry.id)
            await pipe.execute()

        await self._with_groups(drop)

    async def bury(self, job: Job, reason: str) -> None:
        """Into the dead-letter stream, for people to look at."""
        await self._bury(encode(job), reason)

    async def lock_alone(self, request_id: str) -> bool:
        """Whether this request may run alone now: at most one in the fleet does. Asked again, it keeps the right."""
        key = names.alone(self._fleet)
        taken = await mapped(self._redis.set(key, request_id, nx=True, ex=ALONE_S))
        if taken:
            return True
        holder = await mapped(self._redis.get(key))
        if holder != request_id.encode():
            return False
        await mapped(self._redis.expire(key, ALONE_S))
        return True

    async def unlock_alone(self, request_id: str) -> None:
        key = names.alone(self._fleet)
        if await mapped(self._redis.get(key)) == request_id.encode():
            await mapped(self._redis.delete(key))

    # --------------------------------------------------------------------------------------------------------- prefill

    async def claim(self, consumer: Incarnation) -> Claimed | None:
        """The next job, of the first class that has one; does not wait."""
        for job_class in names.CLASSES:
            claimed = await self._read(consumer, {self._streams[job_class]: ">"}, None)
            if claimed:
                return claimed[0]
        return None

    async def wait(self, consumer: Incarnation, timeout_s: float) -> list[Claimed]:
        """The next jobs, at most one per class (COUNT counts per stream); [] after `timeout_s`."""
        return await self._read(consumer, dict.fromkeys(self._classes, ">"), max(1, int(timeout_s * 1000)))

    async def _read(self, consumer: Incarnation, streams: dict[str, str], block_ms: int | None) -> list[Claimed]:
        async def read() -> Any:
            return await self._redis.xreadgroup(names.GROUP, consumer, streams, count=1, block=block_ms)

        answer = await self._with_groups(read) or []
        claimed: list[Claimed] = []
        for stream, messages in answer.items() if isinstance(answer, dict) else answer:
            job_class = self._classes[stream.decode() if isinstance(stream, bytes) else stream]
            for entry_id, fields in _flat(messages):
                entry = Entry(job_class, entry_id.decode())
                job = await self._decoded(entry, fields)
                if job is not None:
                    claimed.append(Claimed(entry, job))
        return claimed

    async def _decoded(self, entry: Entry, fields: dict[bytes, bytes]) -> Job | None:
        """The job, or None after it has been buried because nobody can read it."""
        data = fields.get(b"job", b"")
        try:
            return decode(data, Job)
        except MessageError as error:
            log.error("an unreadable job", entry=entry.id, reason=error)
            await self._bury(data, str(error))
            await self.remove(entry)
            return None

    async def pending(self, limit: int = 1000) -> list[Delivered]:
        """Entries delivered and not acknowledged, oldest first, with their jobs."""

        async def look() -> list[Delivered]:
            found = []
            for job_class, stream in self._streams.items():
                for row in await self._redis.xpending_range(stream, names.GROUP, min="-", max="+", count=limit):
                    entry = Entry(job_class, row["message_id"].decode())
                    state = Pending(row["consumer"].decode(), row["time_since_delivered"] / 1000)
                    found.append(Delivered(entry, state, await self._peek(entry)))
            return found

        return await self._with_groups(look)

    async def _peek(self, entry: Entry) -> Job | None:
        rows = await self._redis.xrange(self._streams[entry.job_class], min=entry.id, max=entry.id, count=1)
        try:
            return decode(rows[0][1].get(b"job", b""), Job) if rows else None
        except MessageError:
            return None

    async def forget(self, consumer: Incarnation) -> None:
        """Remove a consumer that has nothing pending, so that names do not pile up."""

        async def drop() -> None:
            for stream in self._classes:
                if not await self._redis.xpending_range(stream, names.GROUP, min="-", max="+", count=1, consumername=consumer):
                    await self._redis.xgroup_delconsumer(stream, names.GROUP, consumer)

        await self._with_groups(drop)

    # ---------------------------------------------------------------------------------------------------------- anyone

    async def depth(self) -> int:
        """Entries nobody has claimed yet."""

        async def count() -> int:
            total = 0
            for stream in self._classes:
                length = await self._redis.xlen(stream)
                total += length - (await self._redis.xpending(stream, names.GROUP))["pending"] if length else 0
            return max(0, total)

        return await self._with_groups(count)

    async def oldest_s(self) -> float:
        """Age of the oldest entry in any stream, by Redis' own clock; 0 when empty."""
        oldest: float | None = None
        for stream in self._classes:
            rows = await mapped(self._redis.xrange(stream, count=1))
            if rows:
                stamp = int(rows[0][0].split(b"-")[0]) / 1000
                oldest = stamp if oldest is None else min(oldest, stamp)
        if oldest is None:
            return 0.0
        seconds, micros = await mapped(self._redis.time())
        return max(0.0, float(seconds) + float(micros) / 1e6 - oldest)

    async def _bury(self, data: bytes, reason: str) -> None:
        fields = {b"job": data, b"reason": reason.encode(), b"at": str(time.time()).encode()}
        await mapped(self._redis.xadd(names.dead_letters(self._fleet), fields, maxlen=DEAD_LETTERS, approximate=True))

    async def _with_groups(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        """Run it; if Redis has lost the groups, make them and run it once more."""
        try:
            return await operation()
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise QueueError(str(error)) from error
        except (RedisError, OSError, TimeoutError) as error:
            raise QueueError(f"{type(error).__name__}: {error}") from error
        for stream in self._classes:
            try:
                await self._redis.xgroup_create(stream, names.GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise QueueError(str(error)) from error
            except (RedisError, OSError, TimeoutError) as error:
                raise QueueError(f"{type(error).__name__}: {error}") from error
        return await mapped(operation())


def _flat(messages: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """redis-py nests a stream's messages once more under RESP3."""
    if messages and isinstance(messages[0], list):
        return [pair for group in messages for pair in group]
    return list(messages)
