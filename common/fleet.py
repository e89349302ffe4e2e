"""Who belongs together: the fleet's identity and its members' introductions, in Redis.

Redis only introduces peers. Who lives is known by beats: an introduction that vanishes (a Redis restarted empty) is no death, and
every member writes its own again within a beat.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, ConnectionError, TimeoutError

from common import names
from common.connection import mapped
from common.errors import MessageError, QueueError, StartError
from common.logs import get_logger
from common.messages import WORKER_ROLES, Identity, Incarnation, Introduction, Role, decode, encode

log = get_logger(__name__)

_T = TypeVar("_T")
OnPeers: TypeAlias = Callable[[dict[Incarnation, Introduction], Identity | None], bool]
"""Members and identity have changed. False: some could not be met (now), and are to be reported again."""


class Fleet:
    """The members of one fleet, as Redis knows them."""

    def __init__(self, redis: Redis, name: str) -> None:
        self._redis: Any = redis
        self._name = name
        self.away = False
        """Whether Redis did not answer `keep` the last time."""

    async def reach(self) -> None:
        """Wait until Redis answers: before a model is loaded for nothing. Raises StartError."""
        await _patiently(lambda: mapped(self._redis.exists(names.identity(self._name))))

    async def join(self, own: Identity) -> Identity:
        """Take the fleet's identity, or give it ours if it has none, waiting for Redis. Raises StartError, in words, if this worker does
        not fit."""
        key = names.identity(self._name)

        async def offer() -> Identity | None:
            await mapped(self._redis.set(key, encode(own), nx=True, ex=names.INTRODUCTION_TTL_S))
            return await self.identity()

        try:
            found = await _patiently(offer)
        except MessageError as error:
            raise StartError(f"the identity of fleet {self._name!r} cannot be read, another version wrote it: {error}") from error
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
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(names.introduction(self._name, introduction.incarnation), encode(introduction), ex=names.INTRODUCTION_TTL_S)
        pipe.sadd(names.members(self._name), introduction.incarnation)
        pipe.expire(names.members(self._name), names.INTRODUCTION_TTL_S)
        await mapped(pipe.execute())

    async def peers(self) -> dict[Incarnation, Introduction]:
        """Introductions that have not lapsed. Names without one are dropped: who still lives adds itself again within a beat."""

        async def look() -> dict[Incarnation, Introduction]:
            found = sorted(name.decode() for name in await self._redis.smembers(names.members(self._name)))
            keys = [names.introduction(self._name, name) for name in found]
            written = dict(zip(found, await self._redis.mget(keys) if keys else [], strict=True))
            gone = [name for name, data in written.items() if data is None]
            if gone:
                await self._redis.srem(names.members(self._name), *gone)
            return {name: member for name, data in written.items() if (member := _introduction(name, data)) is not None}

        return await mapped(look())

    async def wish(self, incarnation: Incarnation, role: Role) -> None:
        """Ask a worker to serve in another role from now on."""
        await mapped(self._redis.set(names.wish(self._name, incarnation), role, ex=names.WISH_TTL_S))

    async def wished(self, incarnation: Incarnation) -> Role | None:
        """What a worker has been asked to be; None: nothing, or no role of a worker."""
        data = await mapped(self._redis.get(names.wish(self._name, incarnation)))
        return next((role for role in WORKER_ROLES if data is not None and role.encode() == data), None)

    async def leave(self, incarnation: Incarnation) -> None:
        """Raises QueueError if Redis is away; the introduction then lapses by itself."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.delete(names.introduction(self._name, incarnation))
        pipe.srem(names.members(self._name), incarnation)
        await mapped(pipe.execute())

    async def keep(self, own: Introduction, identity: Identity | None, on_peers: OnPeers) -> None:
        """Stay introduced, keep the identity alive, and report members whenever something changed, or again where it is asked for. Until
        cancelled."""
        known: tuple[dict[Incarnation, Introduction], Identity | None] | None = None
        stranger: Identity | None = None
        while True:
            try:
                await self.introduce(own)
                found = await self._keep_identity(identity)
                if identity is not None and found != identity and found != stranger:
                    log.error("the fleet has got another identity: start it under a name of its own", fleet=self._name, identity=found)
                stranger = found
                seen = (await self.peers(), identity or found)
                self.away = False
            except (QueueError, MessageError) as error:
                if not self.away:
                    log.warning("Redis is away: nobody new can be met", reason=error)
                self.away = True
            else:
                if seen != known:
                    known = seen if on_peers(*seen) else None
            await asyncio.sleep(names.BEAT_S)

    async def _keep_identity(self, identity: Identity | None) -> Identity | None:
        """The fleet's identity; ours if it had none, kept alive while it is ours. Two that differ never overwrite each other."""
        key = names.identity(self._name)
        if identity is not None:
            await mapped(self._redis.set(key, encode(identity), nx=True, ex=names.INTRODUCTION_TTL_S))
        found = await self.identity()
        if found is not None and found == identity:
            await mapped(self._redis.expire(key, names.INTRODUCTION_TTL_S))
        return found


async def _patiently(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Ask until Redis answers, for `names.PATIENCE_S`; what it refuses is not asked again. Raises StartError."""
    give_up = time.monotonic() + names.PATIENCE_S
    said = False
    while True:
        try:
            return await ask()
        except QueueError as error:
            cause = error.__cause__
            away = isinstance(cause, OSError | ConnectionError | TimeoutError) and not isinstance(cause, AuthenticationError)
            if not away or time.monotonic() >= give_up:
                raise StartError(f"Redis cannot be used, look at redis_url: {error}") from error
            if not said:
                log.warning("Redis does not answer: waiting for it", reason=error, wait_s=names.PATIENCE_S)
                said = True
        await asyncio.sleep(names.BEAT_S)


def _introduction(name: str, data: bytes | None) -> Introduction | None:
    try:
        return None if data is None else decode(data, Introduction)
    except MessageError as error:
        log.warning("an unreadable introduction", peer=name, reason=error)
        return None


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
