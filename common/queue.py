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
from redis.maint_notifications import MaintNotificationsConfig

from common import names
from common.errors import MessageError, QueueError, SettingError
from common.logs import get_logger
from common.messages import Incarnation, Job, decode, encode

log = get_logger(__name__)

CONNECT_S = 2.0
ANSWER_S = 5.0
"""Redis answers within this long, or it counts as away."""
LONGEST_WAIT_S = ANSWER_S / 2
"""Blocking reads end well before."""
MAX_JOB_BYTES = 16 << 20
DEAD_LETTERS = 1000
"""The dead-letter stream keeps about this many."""
ALONE_S = 60
"""A request that runs alone keeps others from doing so for at most this long."""

GROUPS_GONE = ("NOGROUP", "no such key")
"""How Redis says that it has been restarted empty."""

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
    """In the stream, delivered to nobody yet."""


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
    """A client for the queue and the fleet. Raises SettingError on a URL that is none (without showing it: it may hold a password)."""
    try:
        return Redis.from_url(
            url,
            socket_connect_timeout=CONNECT_S,
            socket_timeout=ANSWER_S,
            retry=Retry(NoBackoff(), 0),
            retry_on_timeout=False,
            health_check_interval=0,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),  # enabled, it hands out connections that are closed
            decode_responses=False,
        )
    except ValueError:
        raise SettingError("redis_url is no Redis URL; it must be like redis://:password@host:6379/0") from None


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
        """Where these entries stand, in one round trip.

        One that was delivered, is nobody's and yet in the stream (its acknowledgement came without its deletion, or its consumer
        was deleted) will never be delivered again, and counts as absent.
        """
        classes = sorted({entry.job_class for entry in entries})

        async def look() -> dict[Entry, EntryState]:
            pipe = self._redis.pipeline(transaction=False)
            for job_class in classes:
                pipe.xinfo_groups(self._streams[job_class])
            for entry in entries:
                stream = self._streams[entry.job_class]
                pipe.xrange(stream, min=entry.id, max=entry.id, count=1)
                pipe.xpending_range(stream, names.GROUP, min=entry.id, max=entry.id, count=1)
            answers = await pipe.execute()
            delivered = {job_class: _delivered(groups) for job_class, groups in zip(classes, answers, strict=False)}
            pairs = zip(answers[len(classes) :: 2], answers[len(classes) + 1 :: 2], strict=True)
            return {entry: _state(entry, *pair, delivered[entry.job_class]) for entry, pair in zip(entries, pairs, strict=True)}

        return await self._with_groups(look) if entries else {}

    async def remove(self, *entries: Entry) -> None:
        """Acknowledge and delete; idempotent."""

        async def drop() -> None:
            pipe = self._redis.pipeline(transaction=True)
            for entry in entries:
                stream = self._streams[entry.job_class]
                pipe.xack(stream, names.GROUP, entry.id)
                pipe.xdel(stream, entry.id)
            await pipe.execute()

        if entries:
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
        """The next jobs, at most one per class (COUNT counts per stream); [] after `timeout_s`, or LONGEST_WAIT_S if that is less."""
        block_ms = max(1, int(min(timeout_s, LONGEST_WAIT_S) * 1000))
        return await self._read(consumer, dict.fromkeys(self._classes, ">"), block_ms)

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
            try:
                await self._bury(data, str(error))
                await self.remove(entry)
            except QueueError as away:  # it stays pending; what else was read must not be lost for it
                log.warning("an unreadable job was not buried", entry=entry.id, reason=away)
            return None

    async def pending(self, limit: int = 1000) -> list[Delivered]:
        """Entries delivered and not acknowledged, the oldest `limit` of each class, with their jobs."""

        async def look() -> list[Delivered]:
            found = []
            for job_class, stream in self._streams.items():
                rows = await self._redis.xpending_range(stream, names.GROUP, min="-", max="+", count=limit)
                pipe = self._redis.pipeline(transaction=False)
                for row in rows:
                    pipe.xrange(stream, min=row["message_id"], max=row["message_id"], count=1)
                for row, there in zip(rows, await pipe.execute() if rows else [], strict=True):
                    entry = Entry(job_class, row["message_id"].decode())
                    found.append(Delivered(entry, _pending(row), _job(there)))
            return found

        return await self._with_groups(look)

    async def forget(self, consumer: Incarnation) -> None:
        """Remove a consumer that has nothing pending, so that names do not pile up."""

        async def drop() -> None:
            for stream in self._classes:
                if not await self._redis.xpending_range(stream, names.GROUP, min="-", max="+", count=1, consumername=consumer):
                    await self._redis.xgroup_delconsumer(stream, names.GROUP, consumer)

        await self._with_groups(drop)

    async def forget_idle(self, idle_s: float) -> int:
        """Forget every consumer that has nothing pending and has asked for nothing this long; says how many."""

        async def look() -> set[str]:
            found: dict[str, bool] = {}
            for stream in self._classes:
                for row in await self._redis.xinfo_consumers(stream, names.GROUP):
                    idle = row["pending"] == 0 and row["idle"] >= idle_s * 1000
                    found[row["name"].decode()] = found.get(row["name"].decode(), True) and idle
            return {name for name, idle in found.items() if idle}

        consumers = await self._with_groups(look)
        for consumer in consumers:
            await self.forget(consumer)
        return len(consumers)

    # ---------------------------------------------------------------------------------------------------------- anyone

    async def depth(self) -> int:
        """Entries nobody has claimed yet."""

        async def count() -> int:
            pipe = self._redis.pipeline(transaction=False)
            for stream in self._classes:
                pipe.xlen(stream)
                pipe.xpending(stream, names.GROUP)
            answers = await pipe.execute()
            return sum(max(0, length - pending["pending"]) for length, pending in zip(answers[::2], answers[1::2], strict=True))

        return await self._with_groups(count)

    async def oldest_s(self) -> float:
        """Age of the oldest entry that nobody has claimed yet, by Redis' own clock; 0 if there is none."""

        async def look() -> float:
            pipe = self._redis.pipeline(transaction=False)
            pipe.time()
            for stream in self._classes:
                pipe.xinfo_groups(stream)
            (seconds, micros), *groups = await pipe.execute()
            oldest = now = float(seconds) + float(micros) / 1e6
            for stream, found in zip(self._classes, groups, strict=True):
                milliseconds, number = _delivered(found)
                rows = await self._redis.xrange(stream, min=f"({milliseconds}-{number}", count=1)
                oldest = min(oldest, _stamp(rows[0][0])[0] / 1000) if rows else oldest
            return now - oldest

        return await self._with_groups(look)

    async def _bury(self, data: bytes, reason: str) -> None:
        fields = {b"job": data, b"reason": reason.encode(), b"at": str(time.time()).encode()}
        await mapped(self._redis.xadd(names.dead_letters(self._fleet), fields, maxlen=DEAD_LETTERS, approximate=True))

    async def _with_groups(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        """Run it; if Redis has lost the groups, make them and run it once more."""
        try:
            return await operation()
        except ResponseError as error:
            if not any(words in str(error) for words in GROUPS_GONE):  # within a pipeline other words stand before them
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


def _stamp(entry_id: bytes | str) -> tuple[int, int]:
    """An entry's id as (milliseconds, number), which compares as Redis does."""
    milliseconds, _, number = (entry_id.decode() if isinstance(entry_id, bytes) else entry_id).partition("-")
    return int(milliseconds), int(number)


def _delivered(groups: list[Any]) -> tuple[int, int]:
    """The last entry that was delivered to anybody, out of XINFO GROUPS."""
    ours = [group["last-delivered-id"] for group in groups if group["name"] == names.GROUP.encode()]
    if not ours:
        raise ResponseError("NOGROUP")
    return _stamp(ours[0])


def _state(entry: Entry, there: list[Any], pending: list[Any], delivered: tuple[int, int]) -> EntryState:
    if pending:
        return _pending(pending[0])
    return Queued() if there and _stamp(entry.id) > delivered else Absent()


def _pending(row: Any) -> Pending:
    return Pending(row["consumer"].decode(), row["time_since_delivered"] / 1000)


def _job(there: list[Any]) -> Job | None:
    try:
        return decode(there[0][1].get(b"job", b""), Job) if there else None
    except MessageError:
        return None


def _flat(messages: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """redis-py nests a stream's messages once more under RESP3."""
    if messages and isinstance(messages[0], list):
        return [pair for group in messages for pair in group]
    return list(messages)
