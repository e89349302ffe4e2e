"""What the bodies of all requests at a time may take of a gateway's memory."""

from __future__ import annotations

import asyncio
import threading

import pytest
from starlette.requests import Request
from starlette.types import Message

from common.errors import BadRequest
from gateway.bodies import FREE_BYTES, LARGE_AT_ONCE, LARGE_BYTES, Bodies, Crowded, Slow

MOST = 4 * FREE_BYTES


class Sender:
    """A client whose body comes part by part, as the test has it."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[Message] = asyncio.Queue()
        self.request = Request({"type": "http", "method": "POST", "headers": []}, self.parts.get)

    def send(self, count: int, *, last: bool = False) -> None:
        self.parts.put_nowait({"type": "http.request", "body": b"x" * count, "more_body": not last})


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_large_bodies_share_the_room_and_small_ones_need_none() -> None:
    bodies = Bodies(MOST, 60.0, room_bytes=MOST)
    slow, late, small = Sender(), Sender(), Sender()
    first = asyncio.create_task(bodies.make(slow.request, len))
    slow.send(MOST - 1)
    await settle()
    late.send(3 * FREE_BYTES)
    late.send(1, last=True)
    with pytest.raises(Crowded):
        await bodies.make(late.request, len)
    small.send(FREE_BYTES, last=True)
    assert await bodies.make(small.request, len) == FREE_BYTES
    slow.send(1, last=True)
    assert await first == MOST
    again = Sender()
    again.send(MOST, last=True)
    assert await bodies.make(again.request, len) == MOST, "what it took has been given back"


@pytest.mark.parametrize("end", ["leaves", "slow", "bad", "cancelled"])
async def test_room_comes_back_however_a_request_ends(end: str) -> None:
    bodies = Bodies(MOST, 0.05 if end == "slow" else 60.0, room_bytes=MOST)
    sender = Sender()

    def refuse(body: bytes) -> int:
        raise BadRequest("no")

    asked = asyncio.create_task(bodies.make(sender.request, refuse))
    sender.send(MOST, last=end == "bad")
    await settle()
    if end == "leaves":
        sender.parts.put_nowait({"type": "http.disconnect"})
    if end == "cancelled":
        asked.cancel()
    (outcome,) = await asyncio.gather(asked, return_exceptions=True)
    assert isinstance(outcome, BaseException) and (end != "slow" or isinstance(outcome, Slow))
    assert bodies.take(MOST), "all of it is there"


async def test_large_bodies_are_parsed_a_few_at_a_time_and_none_waits_for_ever() -> None:
    bodies = Bodies(2 * LARGE_BYTES, 0.3, room_bytes=100 * LARGE_BYTES)
    going_on, parsing = threading.Event(), 0

    def parse(body: bytes) -> None:
        nonlocal parsing
        parsing += 1
        assert going_on.wait(10)

    senders = [Sender() for _ in range(LARGE_AT_ONCE + 1)]
    for sender in senders:
        sender.send(LARGE_BYTES + 1, last=True)
    asked = [asyncio.create_task(bodies.make(sender.request, parse)) for sender in senders]
    with pytest.raises(Crowded):
        await asked[-1]
    assert parsing == LARGE_AT_ONCE
    going_on.set()
    await asyncio.gather(*asked[:-1])
