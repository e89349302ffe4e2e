"""The connection to Redis: timeouts everywhere, no silent retries, foreign errors mapped."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from common.errors import QueueError, SettingError

CONNECT_S = 2.0
ANSWER_S = 5.0
"""Redis answers within this long, or it counts as away."""

_T = TypeVar("_T")


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
