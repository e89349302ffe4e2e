"""Jobs through Redis Streams: one stream per class, one consumer group, consumers named by incarnation.

Redis may restart empty at any moment: a missing group is made again and the operation repeated once. redis-py's silent retries are
off, because a retried XADD can enter a job twice; what fails becomes a QueueError, and the gateway decides (protocol rules 1, 4, 14).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from msgspec.structs import replace
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, RedisError, ResponseError

from common import names
from common.connection import ANSWER_S, close_idle, connect, mapped
from common.entries import (
    Absent,
    Claimed,
    Delivered,
    Entry,
    EntryState,
    Pending,
    Queued,
    job_of,
    last_delivered,
    pending_of,
    stamp,
    state_of,
)
from common.errors import MessageError, QueueError
from common.logs import get_logger
from common.messages import Incarnation, Job, decode, encode

__all__ = ["Absent", "Claimed", "Delivered", "Entry", "EntryState", "JobQueue", "Pending", "Queued", "connect", "mapped"]

log = get_logger(__name__)

LONGEST_WAIT_S = ANSWER_S / 2
"""Blocking reads end well before the socket gives up."""
MAX_JOB_BYTES = 16 << 20
DEAD_LETTERS = 1000
"""The dead-letter stream keeps about this many."""
DEAD_LETTER_BYTES = 64 << 10
DEAD_LETTER_PROMPT = 1000
"""Of a job that is larger only so many tokens of its prompt are kept."""
KEPT_S = 7 * 24 * 3600
"""What nobody serves or reads any more goes after this long: dead letters, and the streams of a model that is no longer served."""
ALONE_S = 60
"""A request that runs alone keeps others from doing so for at most this long."""

GROUPS_GONE = ("NOGROUP", "no such key")
"""How Redis says that it has been restarted empty."""

_T = TypeVar("_T")


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
        entry = await self._with_groups(lambda: self._redis.xadd(self._streams[job_class], {b"job": data}), repeat=False)
        assert isinstance(entry, bytes)
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
            delivered = {job_class: last_delivered(groups) for job_class, groups in zip(classes, answers, strict=False)}
            pairs = zip(answers[len(classes) :: 2], answers[len(classes) + 1 :: 2], strict=True)
            return {entry: state_of(entry, *pair, delivered[entry.job_class]) for entry, pair in zip(entries, pairs, strict=True)}

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
        data = encode(job)
        if len(data) > DEAD_LETTER_BYTES:
            data = encode(replace(job, prompt=job.prompt[:DEAD_LETTER_PROMPT], choices=[]))
            reason += f" (its {len(job.prompt)} prompt tokens are cut)"
        await self._bury(data, reason)

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
            claimed = await self._read(consumer, {self._streams[job_class]: ">"})
            if claimed:
                return claimed[0]
        return None

    async def wait(self, consumer: Incarnation, timeout_s: float) -> list[Claimed]:
        """The next jobs, at most one per class (COUNT counts per stream); [] after `timeout_s`, or LONGEST_WAIT_S if that is less."""
        block_ms = max(1, int(min(timeout_s, LONGEST_WAIT_S) * 1000))
        return await self._read(consumer, dict.fromkeys(self._classes, ">"), block_ms)

    async def _read(self, consumer: Incarnation, streams: dict[str, str], block_ms: int | None = None) -> list[Claimed]:
        """A read that does not wait also asks for Redis' time: what it finds may have stood there for long."""

        async def read() -> tuple[Any, float]:
            if block_ms is not None:
                return await self._redis.xreadgroup(names.GROUP, consumer, streams, count=1, block=block_ms), 0.0
            pipe = self._redis.pipeline(transaction=False)
            pipe.xreadgroup(names.GROUP, consumer, streams, count=1)
            pipe.time()
            found, (seconds, micros) = await pipe.execute()
            return found, seconds + micros / 1e6

        found, now_s = await self._with_groups(read, repeat=False)
        answer = found or []
        claimed: list[Claimed] = []
        for stream, messages in answer.items() if isinstance(answer, dict) else answer:
            job_class = self._classes[stream.decode() if isinstance(stream, bytes) else stream]
            for entry_id, fields in _flat(messages):
                entry = Entry(job_class, entry_id.decode())
                job = await self._decoded(entry, fields)
                if job is not None:
                    claimed.append(Claimed(entry, job, max(0.0, now_s - stamp(entry.id)[0] / 1000)))
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
                    found.append(Delivered(entry, pending_of(row), job_of(there)))
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

    async def keep(self) -> None:
        """The streams are in use: they stay for `KEPT_S` more."""
        pipe = self._redis.pipeline(transaction=False)
        for stream in self._classes:
            pipe.expire(stream, KEPT_S)
        await mapped(pipe.execute())

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
                milliseconds, number = last_delivered(found)
                rows = await self._redis.xrange(stream, min=f"({milliseconds}-{number}", count=1)
                oldest = min(oldest, stamp(rows[0][0])[0] / 1000) if rows else oldest
            return now - oldest

        return await self._with_groups(look)

    async def _bury(self, data: bytes, reason: str) -> None:
        fields = {b"job": data[:DEAD_LETTER_BYTES], b"reason": reason.encode(), b"at": str(time.time()).encode()}
        pipe = self._redis.pipeline(transaction=False)
        pipe.xadd(names.dead_letters(self._fleet), fields, maxlen=DEAD_LETTERS, approximate=True)
        pipe.expire(names.dead_letters(self._fleet), KEPT_S)
        await mapped(pipe.execute())

    async def _with_groups(self, operation: Callable[[], Awaitable[_T]], *, repeat: bool = True) -> _T:
        """Run it; again if Redis had lost the groups, and if the connection was broken and a repetition does no harm."""
        made = repeated = False
        while True:
            try:
                return await operation()
            except ResponseError as error:
                if made or not any(words in str(error) for words in GROUPS_GONE):  # a pipeline puts other words before them
                    raise QueueError(str(error)) from error
                made = True
                await mapped(self._make_groups())
            except ConnectionError as error:
                await close_idle(self._redis)
                if repeated or not repeat:
                    raise QueueError(f"{type(error).__name__}: {error}") from error
                repeated = True
            except (RedisError, OSError, TimeoutError) as error:
                raise QueueError(f"{type(error).__name__}: {error}") from error

    async def _make_groups(self) -> None:
        for stream in self._classes:
            try:
                await self._redis.xgroup_create(stream, names.GROUP, id="0", mkstream=True)
            except ResponseError as error:
                if not str(error).startswith("BUSYGROUP"):
                    raise


def _flat(messages: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """redis-py nests a stream's messages once more under RESP3."""
    if messages and isinstance(messages[0], list):
        return [pair for group in messages for pair in group]
    return list(messages)
