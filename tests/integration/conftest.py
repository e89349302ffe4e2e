"""A real Valkey for the integration tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from common.queue import connect
from scripts.launcher.valkey import Valkey


@pytest.fixture(scope="session")
def shared_valkey() -> Iterator[Valkey]:
    server = Valkey()
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def redis_url(shared_valkey: Valkey) -> str:
    """A real server, shared by all tests and empty at the start of each."""
    async with connect(shared_valkey.url) as redis:
        await redis.flushall()
    return shared_valkey.url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with connect(redis_url) as redis:
        yield redis


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """A server of the test's own, to be killed and restarted empty."""
    server = Valkey()
    server.start()
    yield server
    server.stop()
