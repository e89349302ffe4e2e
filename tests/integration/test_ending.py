"""Tasks end when they are told to: one cancellation is enough for what talks to Redis, and `end` repeats it for other libraries' sake."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine

import pytest
from redis.asyncio import Redis

from common.errors import QueueError
from common.fleet import Fleet
from common.messages import Choice, Introduction, Job, Sampling
from common.queue import JobQueue, connect
from common.service import end
from services.worker.claims import Claims

PATIENCE_S = 5.0
SENT_TURNS = 10
"""A command is sent in fewer turns of the event loop."""


async def cancelled_once(task: asyncio.Task[None]) -> bool:
    """Whether one cancellation ends it; it ends in any case."""
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
    await end(task)
    return task in done and task.cancelled()


def keep(redis: Redis) -> Coroutine[None, None, None]:
    return Fleet(redis, "f").keep(Introduction("gateway", "g", "", ""), None, lambda peers, identity: True)


def claims(redis: Redis) -> Coroutine[None, None, None]:
    return Claims(JobQueue(redis, "f", "fp"), "me", lambda: 1, lambda claimed: None).run()


async def test_a_swallowed_cancellation_is_said_again() -> None:
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if swallowed == 2:
                    raise
                swallowed += 1

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await asyncio.wait_for(end(task), PATIENCE_S)
    assert task.cancelled() and swallowed == 2


@pytest.mark.parametrize("turns", range(SENT_TURNS))
@pytest.mark.parametrize("forever", [keep, claims])
async def test_a_cancellation_while_a_command_is_sent_is_heeded(
    redis: Redis, forever: Callable[[Redis], Coroutine[None, None, None]], turns: int
) -> None:
    """`asyncio.wait_for`, by which redis-py sends, swallows it in some of these turns in Python 3.11."""
    await redis.ping()  # connects
    task = asyncio.create_task(forever(redis))
    for _ in range(turns):
        await asyncio.sleep(0)
    assert await cancelled_once(task)
    assert await redis.echo("own") == b"own"  # not the answer to what was cancelled


@pytest.mark.timeout(60)
async def test_claiming_ends_whenever_it_is_told_to(redis: Redis, redis_url: str) -> None:
    queue = JobQueue(redis, "f", "fp")

    async def claim() -> None:
        while True:
            with contextlib.suppress(QueueError):
                await queue.claim("me") or await queue.wait("me", 1.0)

    async with connect(redis_url) as other:
        jobs = JobQueue(other, "f", "fp")
        for number in range(200):
            claiming = asyncio.create_task(claim())
            await asyncio.sleep(0.002)
            putting = asyncio.create_task(jobs.put(Job(f"r{number}", "g", "t", [1], [Choice(0, 1)], Sampling(), 4), "interactive"))
            await asyncio.sleep(random.random() * 0.002)
            assert await cancelled_once(claiming)
            await putting
