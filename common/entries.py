"""Entries of the job streams: where one stands, read out of Redis' answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from msgspec.structs import replace
from redis.exceptions import ResponseError

from common import names
from common.errors import MessageError
from common.messages import Incarnation, Job, decode


@dataclass(frozen=True, slots=True)
class Entry:
    """A job's place in the queue."""

    job_class: str
    id: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """`waited_s`: how long the job has stood in the stream, by Redis' own clock."""

    entry: Entry
    job: Job
    waited_s: float = 0.0

    @property
    def aged(self) -> Job:
        """The job with what is left of its deadline, and its age, now that it has been claimed."""
        return replace(self.job, deadline_s=self.job.deadline_s - self.waited_s, age_s=self.job.age_s + self.waited_s)


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


def stamp(entry_id: bytes | str) -> tuple[int, int]:
    """An entry's id as (milliseconds, number), which compares as Redis does."""
    milliseconds, _, number = (entry_id.decode() if isinstance(entry_id, bytes) else entry_id).partition("-")
    return int(milliseconds), int(number)


def last_delivered(groups: list[Any]) -> tuple[int, int]:
    """The last entry that was delivered to anybody, out of XINFO GROUPS."""
    ours = [group["last-delivered-id"] for group in groups if group["name"] == names.GROUP.encode()]
    if not ours:
        raise ResponseError("NOGROUP")
    return stamp(ours[0])


def state_of(entry: Entry, there: list[Any], pending: list[Any], delivered: tuple[int, int]) -> EntryState:
    if pending:
        return pending_of(pending[0])
    return Queued() if there and stamp(entry.id) > delivered else Absent()


def pending_of(row: Any) -> Pending:
    return Pending(row["consumer"].decode(), row["time_since_delivered"] / 1000)


def job_of(there: list[Any]) -> Job | None:
    """The job of an XRANGE answer, None if it is gone or unreadable."""
    try:
        return decode(there[0][1].get(b"job", b""), Job) if there else None
    except MessageError:
        return None
