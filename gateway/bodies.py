"""Reading a request's body: bounded in size and in time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from common.errors import BadRequest, TooLarge

DISCARDED = 8
"""Of a body that is too large, this many times the limit is read and thrown away before the refusal: a client that is still sending
would otherwise see its connection reset and not the reason."""


class Slow(BadRequest):
    """408: the body was not complete in time."""

    status = 408


async def read_body(request: Request, most_bytes: int, deadline_s: float) -> bytes:
    """Raises TooLarge or Slow; after both the connection cannot be used any more. Raises ClientDisconnect."""
    announced = request.headers.get("content-length", "")
    size = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
    expects = request.headers.get("expect", "").lower() == "100-continue"
    if size > DISCARDED * most_bytes or (size > most_bytes and expects):
        raise TooLarge(f"the body has {announced} bytes, the limit is {most_bytes}")
    body = bytearray()
    length = 0
    try:
        async with asyncio.timeout(deadline_s):
            async for part in request.stream():
                length += len(part)
                if length > DISCARDED * most_bytes:
                    break
                if max(length, size) <= most_bytes:
                    body += part
                else:
                    body.clear()
    except TimeoutError as error:
        raise Slow(f"the body was not complete within {deadline_s:g} s") from error
    if length > most_bytes:
        raise TooLarge(f"the body is larger than the limit of {most_bytes} bytes")
    return bytes(body)
