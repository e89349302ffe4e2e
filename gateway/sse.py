"""Server-sent events: a response that says something now and then, notices a client that left, and gives up one that does not read."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

KEEP_ALIVE_S = 10.0
"""A silent stream says a comment this often, so that proxies keep it."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Content-Type": "text/event-stream; charset=utf-8"}
ENDS = {end: f"\\u{ord(end):04x}" for end in "\u0085\u2028\u2029"}
"""Unicode's ends of lines, which JSON lets stand and at which many clients cut a line; the others it escapes itself."""
DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    for end, escaped in ENDS.items():
        data = data.replace(end, escaped)
    return f"data: {data}\n\n"


async def gone(receive: Receive) -> None:
    """Returns when the client has disconnected. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events until they end, the client leaves, or it takes nothing for `write_s`; then calls `close`, always and once."""

    def __init__(
        self, events: AsyncGenerator[str, None], *, write_s: float, close: Callable[[], None], headers: Mapping[str, str] = HEADERS
    ) -> None:
        super().__init__(headers={**HEADERS, **headers})
        del self.headers["content-length"]
        self._events = events
        self._write_s = write_s
        self._close = close
        self._last = time.monotonic()
        """When the client was last sent something, or took it."""
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.ensure_future(work) for work in (self._say(send), gone(receive), self._watch(send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._close()
            await self._events.aclose()
        if tasks[0].done() and not tasks[0].cancelled():
            tasks[0].result()

    async def _say(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for words in self._events:
            await self._send(send, {"type": "http.response.body", "body": words.encode(), "more_body": True})
        await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, message: Message) -> None:
        self._sending, self._last = True, time.monotonic()
        await send(message)
        self._sending, self._last = False, time.monotonic()

    async def _watch(self, send: Send) -> None:
        """Comments into silence; returns when a send has been stuck for `write_s`."""
        while True:
            patience = self._write_s if self._sending else KEEP_ALIVE_S
            left = self._last + patience - time.monotonic()
            if left > 0:
                await asyncio.sleep(min(left, KEEP_ALIVE_S, self._write_s))
            elif self._sending:
                return
            else:
                await self._send(send, {"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
