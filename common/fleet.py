"""Who belongs together: the fleet's identity and its members' introductions, in Redis.

Redis only introduces peers. Who lives is known by beats: an introduction that vanishes (a Redis restarted empty) is no death, and
every member writes its own again within a beat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeAlias

from redis.asyncio import Redis

from common import names
from common.errors import MessageError, QueueError, StartError
from common.logs import get_logger
from common.messages import Identity, Incarnation, Introduction, decode, encode
from common.queue import mapped

log = get_logger(__name__)

OnPeers: TypeAlias = Callable[[dict[Incarnation, Introduction], Identity | None], None]


class Fleet:
    """The members of one fleet, as Redis knows them."""

    def __init__(self, redis: Redis, name: str) -> None:
        self._redis: Any = redis
        self._name = name

    async def join(self, own: Identity) -> Identity:
        """Take the fleet's identity, or give it ours if it has none. Raises StartError, in words, if this worker does not fit."""
        key = names.identity(self._name)
        await mapped(self._redis.set(key, encode(own), nx=True, ex=names.INTRODUCTION_TTL_S))
        found = await self.identity()
        if found is None:
            raise StartError(f"the identity of fleet {self._name!r} cannot be kept in Redis")
        problem = misfit(found, own)
        if problem is not None:
            raise StartError(f"this worker cannot join fleet {self._name!r}: {problem}")
        return found

    async def identity(self) -> Identity | None:
        data = await mapped(self._redis.get(names.identity(self._name)))
        return None if data is None else decode(data, Identity)

    async def introduce(self, introduction: Introduction) -> None:
        key = names.introduction(self._name, introduction.incarnation)
        await mapped(self._redis.set(key, encode(introduction), ex=names.INTRODUCTION_TTL_S))

    async def peers(self) -> dict[Incarnation, Introduction]:
        async def look() -> dict[Incarnation, Introduction]:
            keys = [key async for key in self._redis.scan_iter(match=names.introductions(self._name), count=1000)]
            members = {}
            for data in await self._redis.mget(keys) if keys else []:
                try:
                    member = decode(data, Introduction) if data is not None else None
                except MessageError as error:
                    log.warning("an unreadable introduction", reason=error)
                    continue
                if member is not None:
                    members[member.incarnation] = member
            return members

        return await mapped(look())

    async def leave(self, incarnation: Incarnation) -> None:
        await mapped(self._redis.delete(names.introduction(self._name, incarnation)))

    async def keep(self, own: Introduction, identity: Identity | None, on_peers: OnPeers) -> None:
        """Stay introduced, keep the identity alive, and report members whenever something changed. Until cancelled."""
        known: tuple[dict[Incarnation, Introduction], Identity | None] | None = None
        away = False
        while True:
            try:
                await self.introduce(own)
                if identity is not None:
                    await mapped(self._redis.set(names.identity(self._name), encode(identity), ex=names.INTRODUCTION_TTL_S))
                seen = (await self.peers(), identity or await self.identity())
                away = False
            except (QueueError, MessageError) as error:
                if not away:
                    log.warning("Redis is away: nobody new can be met", reason=error)
                away = True
            else:
                if seen != known:
                    known = seen
                    on_peers(*seen)
            await asyncio.sleep(names.BEAT_S)


def misfit(fleet: Identity, own: Identity) -> str | None:
    """Why a worker with this identity cannot serve in the fleet, or None. A larger pool than the fleet asks for is fine."""
    if fleet.protocol != own.protocol:
        return f"it speaks protocol {own.protocol}, the fleet {fleet.protocol}"
    if fleet.fingerprint != own.fingerprint:
        return f"its model is {own.model} ({own.fingerprint}), the fleet serves {fleet.model} ({fleet.fingerprint})"
    if fleet.tokenizer != own.tokenizer:
        return "its tokenizer is another than the fleet's"
    if fleet.page_tokens != own.page_tokens:
        return f"its pages hold {own.page_tokens} tokens, the fleet's {fleet.page_tokens}"
    if fleet.max_request_pages > own.max_request_pages:
        return f"its pool serves requests of {own.max_request_pages} pages, the fleet promises {fleet.max_request_pages}"
    return None
