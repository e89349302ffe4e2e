"""From the command line to a running worker of any role, and from one role to the next."""

from __future__ import annotations

import asyncio
from pkgutil import resolve_name
from typing import Any, Protocol

from redis.asyncio import Redis

from common.fleet import Fleet
from common.logs import get_logger
from common.messages import Identity, Role
from common.queue import connect
from common.service import Service, run
from common.settings import WorkerSettings
from services.transfer import environment
from services.worker import mps
from services.worker.lease import leased
from services.worker.room import Room, build, cleared, pin

log = get_logger(__name__)

KINDS: dict[Role, str] = {
    "prefill": "services.prefill.worker:PrefillWorker",
    "decode": "services.decode.worker:DecodeWorker",
    "colocated": "services.colocated.worker:ColocatedWorker",
}
"""Workers by role, by name: they are built on this room, and a process that keeps its role never loads another's."""


class Running(Protocol):
    async def run(self) -> None: ...


class Kind(Protocol):
    """A worker class: its role, and how to make one on the event loop."""

    role: Any

    def __call__(self, room: Room, settings: WorkerSettings, service: Service, redis: Redis, identity: Identity) -> Running: ...


def _kind(role: Role) -> Kind:
    kind: Kind = resolve_name(KINDS[role])
    return kind


def start(kind: Kind) -> int:
    """Build the engine, join the fleet, serve until told to stop, in other roles if told so. Returns the exit status."""

    async def main(settings: WorkerSettings, service: Service) -> None:
        shares = pin(settings)
        environment.follow(settings.host)
        mps.limit(settings)
        redis = connect(settings.redis_url, settings.redis_ca_file)
        try:
            fleet = Fleet(redis, settings.fleet)
            await fleet.reach()
            async with leased(settings, redis, service):
                room = await asyncio.to_thread(build, settings, shares, kind.role)
                identity = await fleet.join(room.identity)
                await kind(room, settings, service, redis, identity).run()
                while service.becoming is not None:
                    role = service.becoming
                    log.info("changing the role", before=service.role, role=role, incarnation=service.incarnation)
                    service.renew(role)
                    room = cleared(room, settings, role)
                    identity = await fleet.join(room.identity)
                    await _kind(role)(room, settings, service, redis, identity).run()
        finally:
            await redis.aclose()

    role: Role = kind.role
    return run(main, WorkerSettings, role)
