"""From the command line to a running worker of any role."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from redis.asyncio import Redis

from common.fleet import Fleet
from common.messages import Identity, Role
from common.queue import connect
from common.service import Service, run
from common.settings import WorkerSettings
from services.worker.lease import leased
from services.worker.room import Room, build, pin


class Running(Protocol):
    async def run(self) -> None: ...


class Kind(Protocol):
    """A worker class: its role, and how to make one on the event loop."""

    role: Any

    def __call__(self, room: Room, settings: WorkerSettings, service: Service, redis: Redis, identity: Identity) -> Running: ...


def start(kind: Kind) -> int:
    """Build the engine, join the fleet, serve until told to stop. Returns the exit status."""

    async def main(settings: WorkerSettings, service: Service) -> None:
        shares = pin(settings)
        redis = connect(settings.redis_url)
        try:
            async with leased(settings, redis, service):
                room = await asyncio.to_thread(build, settings, shares, role)
                identity = await Fleet(redis, settings.fleet).join(room.identity)
                await kind(room, settings, service, redis, identity).run()
        finally:
            await redis.aclose()

    role: Role = kind.role
    return run(main, WorkerSettings, role)
