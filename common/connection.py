"""The connection to Redis: timeouts everywhere, no silent retries, cancellations heeded, foreign errors mapped."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from common.errors import QueueError, SettingError

CONNECT_S = 2.0
ANSWER_S = 5.0
"""Redis answers within this long, or it counts as away."""

_T = TypeVar("_T")


def connect(url: str, ca_file: str | None = None) -> Redis:
    """A client for the queue and the fleet. `ca_file`: who must have signed a TLS server's certificate.

    Raises SettingError on a URL that is none (without showing it: it may hold a password), and on certificates that cannot be read.
    """
    certificates: dict[str, Any] = {} if ca_file is None else {"ssl_ca_certs": _readable(ca_file, url)}
    try:
        client = Redis.from_url(
            url,
            socket_connect_timeout=CONNECT_S,
            socket_timeout=ANSWER_S,
            retry=Retry(NoBackoff(), 0),
            retry_on_timeout=False,
            health_check_interval=0,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),  # enabled, it hands out connections that are closed
            decode_responses=False,
            **certificates,
        )
    except ValueError:
        raise SettingError("redis_url is no Redis URL; it must be like redis://:password@host:6379/0") from None
    pool = client.connection_pool
    pool.connection_class = type("Heeding", (Heeding, pool.connection_class), {})  # the URL has chosen TCP, TLS or a Unix socket
    return client


def _readable(ca_file: str, url: str) -> str:
    if not url.startswith("rediss:"):
        raise SettingError("redis_ca_file is set, and redis_url is not like rediss://…: without TLS nothing is checked")
    try:
        ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise SettingError(f"redis_ca_file is {ca_file!r}; it cannot be read: {error.strerror or error}") from error
    return ca_file


class Heeding(AbstractConnection):
    """A connection that heeds every cancellation.

    redis-py sends by `asyncio.wait_for`, and in Python 3.11 that swallows a cancellation that comes while the sending ends
    (python/cpython#86296): its task would go on for ever.
    """

    __slots__ = ()

    async def send_packed_command(self, command: bytes | str | Iterable[bytes], check_health: bool = True) -> None:
        task = asyncio.current_task()
        assert task is not None
        told = task.cancelling()
        try:
            await super().send_packed_command(command, check_health)
        finally:
            if task.cancelling() > told:
                await self.disconnect(nowait=True)  # or the next command would read the answer to this one
                raise asyncio.CancelledError


async def close_idle(redis: Redis) -> None:
    """Connections that may have died with an earlier Redis: the next operation opens a new one. However closing goes, they are gone."""
    with contextlib.suppress(RedisError, OSError, TimeoutError):
        await redis.connection_pool.disconnect(inuse_connections=False)


async def mapped(operation: Awaitable[_T]) -> _T:
    """Redis' errors become ours."""
    try:
        return await operation
    except (RedisError, OSError, TimeoutError) as error:
        raise QueueError(f"{type(error).__name__}: {error}") from error
