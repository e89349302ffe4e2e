"""Reading a request's body: bounded in size, in time and in memory with all others; a JSON object, and for the model served here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeVar

from starlette.requests import Request

from common.errors import BadRequest, NotFound, TooLarge, Unavailable
from gateway.values import given

DISCARDED = 8
"""Of a body that is too large, this many times the limit is read and thrown away before the refusal: a client that is still sending
would otherwise see its connection reset and not the reason."""
THREAD_BYTES = 8192
"""Bodies larger than this are parsed and tokenised on a thread, so that no stream waits for them."""
FREE_BYTES = 64 << 10
"""Of each body, so much there is always room for."""
LARGE_BYTES = 256 << 10
LARGE_AT_ONCE = 2
"""Of bodies larger than that, so many are parsed at a time: JSON becomes up to some 24 times its size."""
AGAIN_S = 5.0

R = TypeVar("R")


class Slow(BadRequest):
    """408: the body was not complete in time."""

    status = 408


class Crowded(Unavailable):
    """503: the bodies of others take all the memory that there is for them."""


class Bodies:
    """Reads the bodies of a gateway's requests, and has something made of them.

    A body may be `most_bytes` long and must be complete within `deadline_s`. All that are read or parsed at a time may hold `room_bytes`
    beyond the first `FREE_BYTES` of each: who sends large ones slowly keeps nobody from sending a small one.
    """

    def __init__(self, most_bytes: int, deadline_s: float, room_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._deadline_s = deadline_s
        self._room_bytes = room_bytes
        self._parsing = asyncio.Semaphore(LARGE_AT_ONCE)

    async def make(self, request: Request, make: Callable[[bytes], R]) -> R:
        """What `make` makes of the body; it runs on a thread if that would keep others waiting. Raises what it raises, TooLarge, Slow and
        Crowded, after which the connection cannot be used any more, and ClientDisconnect. Only a process that ends cancels it: the room
        comes back then while a thread may still hold the body."""
        share = _Share(self)
        try:
            body = await self._read(request, share)
            if len(body) <= THREAD_BYTES:
                return make(body)
            async with self._turn() if len(body) > LARGE_BYTES else nullcontext():
                return await asyncio.to_thread(make, body)
        finally:
            share.give_back()

    def take(self, count: int) -> bool:
        """Room for `count` bytes more; False if there is not as much."""
        if count > self._room_bytes:
            return False
        self._room_bytes -= count
        return True

    def give_back(self, count: int) -> None:
        self._room_bytes += count

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One of those that parse large bodies. Raises Crowded if that takes too long."""
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._parsing.acquire()
        except TimeoutError as error:
            raise _crowded() from error
        try:
            yield
        finally:
            self._parsing.release()

    async def _read(self, request: Request, share: _Share) -> bytes:
        most_bytes = self._most_bytes
        announced = request.headers.get("content-length", "")
        size = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
        expects = request.headers.get("expect", "").lower() == "100-continue"
        if size > DISCARDED * most_bytes or (size > most_bytes and expects):
            raise TooLarge(f"the body has {announced} bytes, the limit is {most_bytes}")
        body = bytearray()
        length = 0
        try:
            async with asyncio.timeout(self._deadline_s):
                async for part in request.stream():
                    length += len(part)
                    if length > DISCARDED * most_bytes:
                        break
                    if max(length, size) <= most_bytes and share.grow(length):
                        body += part
                    else:
                        body.clear()
                        share.give_back()
        except TimeoutError as error:
            raise Slow(f"the body was not complete within {self._deadline_s:g} s") from error
        if length > most_bytes:
            raise TooLarge(f"the body is larger than the limit of {most_bytes} bytes")
        if share.refused:
            raise _crowded()
        return bytes(body)


class _Share:
    """What one body takes of the room of all."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._bytes = 0
        self.refused = False

    def grow(self, length: int) -> bool:
        """False from the first time on that there is no room for a body of this length."""
        more = max(0, length - FREE_BYTES) - self._bytes
        self.refused = self.refused or not self._bodies.take(more)
        if self.refused:
            return False
        self._bytes += more
        return True

    def give_back(self) -> None:
        self._bodies.give_back(self._bytes)
        self._bytes = 0


def _crowded() -> Crowded:
    return Crowded("too many large bodies at once: try again later", retry_after_s=AGAIN_S)


def json_object(body: bytes) -> dict[str, Any]:
    """The fields that are given. Raises BadRequest."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRequest("the body is not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadRequest("the body must be a JSON object")
    return given(found)


def check_model(fields: dict[str, Any], served: str) -> None:
    """Raises BadRequest, or NotFound for another model than the served one."""
    name = fields.get("model")
    if name is None:
        raise BadRequest(f"model is missing; this server serves {served!r}", param="model")
    if not isinstance(name, str):
        raise BadRequest("model must be a string", param="model")
    if name != served:
        raise NotFound(f"the model {name!r} does not exist; this server serves {served!r}", param="model", code="model_not_found")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
