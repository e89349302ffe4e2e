"""Reading a request's body: bounded in size and in time, a JSON object, and for the model that is served here."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request

from common.errors import BadRequest, NotFound, TooLarge
from gateway.values import given

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
