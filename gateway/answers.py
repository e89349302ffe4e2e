"""From a request's body to its answer: understood, submitted, and said whole or as a stream."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from common.errors import RequestError, SettingError
from common.logs import get_logger
from gateway.ask import Desk
from gateway.bodies import Bodies
from gateway.chorus import Chorus
from gateway.gate import METER
from gateway.limits import Meter
from gateway.metrics import Metrics
from gateway.parameters import Limits, Wish, parse
from gateway.prompts import Model
from gateway.replies import Form, error_body, server_timing, timeline_body, usage_body
from gateway.speech import Broken, Piece, Speech, Usage
from gateway.sse import DONE, KEEP_ALIVE_S, EventStream, event, gone
from gateway.tab import Tab

log = get_logger(__name__)

R = TypeVar("R")
Words: TypeAlias = tuple[int, Piece]
"""A piece, and the choice it belongs to."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may cost."""

    max_body_bytes: int
    max_bodies_bytes: int
    """Of all bodies at a time, beyond a little of each (gateway/bodies.py)."""
    body_s: float
    """A body must be complete this long after its head."""
    deadline_s: float
    write_s: float
    """A stream whose client takes nothing for this long ends."""

    def __post_init__(self) -> None:
        """Raises SettingError."""
        if self.max_bodies_bytes < self.max_body_bytes:
            raise SettingError(f"max_bodies_bytes is {self.max_bodies_bytes}, less than max_body_bytes, {self.max_body_bytes}")


class Answers:
    """Answers requests by asking the desk."""

    def __init__(self, desk: Desk, model: Model, bounds: Bounds, bodies: Bodies, metrics: Metrics) -> None:
        self._desk = desk
        self._bodies = bodies
        self._model = model
        self._bounds = bounds
        self._metrics = metrics

    async def answer(self, request: Request, *, chat: bool) -> Response:
        """Raises RequestError for everything that is known before the first byte of the answer."""
        try:
            meter = request.scope.get(METER)
            limits = self._limits(meter)  # here, and not on the thread that may parse
            wish = await self._bodies.make(request, lambda body: parse(body, self._model, limits, chat=chat))
            tab = Tab(meter, wish.asks, time.monotonic())
            chorus = self._chorus(wish, tab)
        except RequestError as error:
            self._metrics.refused(outcome(error))
            raise
        said = _Said(chorus, self._metrics, tab)
        form = Form(("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12), chat, self._model, wish.asks[0].sampling.logprobs)
        if wish.stream:
            return await self._streamed(request, said, wish, form)
        return await self._whole(request, said, wish, form)

    def _limits(self, meter: Meter | None) -> Limits:
        identity = self._desk.identity
        context = self._model.context_tokens
        if identity is not None:
            context = min(context, identity.context_tokens, identity.max_request_pages * identity.page_tokens)
        allowed = meter.most_tokens if meter is not None else None
        return Limits(context, self._bounds.deadline_s, self._desk.most_running, allowed)

    def _chorus(self, wish: Wish, tab: Tab) -> Chorus:
        """All prompts are accepted, or none."""
        speeches: list[Speech] = []
        try:
            for ask in wish.asks:
                before = self._model.decode(ask.prompt) if wish.echo else ""
                answers = self._desk.submit(ask)
                speeches += [Speech(answer, ask, wish.stops, self._model, before=before) for answer in answers]
        except BaseException:
            Chorus(speeches, 1).cancel()
            tab.settle(0, time.monotonic())
            raise
        return Chorus(speeches, wish.asks[0].n)

    async def _whole(self, request: Request, said: _Said, wish: Wish, form: Form) -> Response:
        answers: list[list[Piece]] = [[] for _ in said.chorus.speeches]

        async def collect() -> None:
            async with aclosing(said.pieces()) as pieces:
                async for choice, piece in pieces:
                    answers[choice].append(piece)

        try:
            collecting = await _unless_gone(request, collect())
            collecting.result()
            body = form.whole(answers, said.chorus.usage)
        finally:
            said.close()
        timeline = said.chorus.timeline.settled()
        if wish.timeline:
            body["baton"] = timeline_body(timeline)
        return JSONResponse(body, headers={"Server-Timing": server_timing(timeline)})

    async def _streamed(self, request: Request, said: _Said, wish: Wish, form: Form) -> Response:
        """What fails before the first piece has its proper status, unless that piece is so long in coming that the client must be told that
        it is heard."""
        pieces = said.pieces()
        try:
            first = await _unless_gone(request, _next(pieces), timeout_s=KEEP_ALIVE_S)
            if first.done():
                first.result()
        except BaseException:
            said.close()
            raise

        def close() -> None:
            first.cancel()
            said.close()

        headers = {"Server-Timing": server_timing(said.chorus.timeline.settled())} if first.done() else {}
        return EventStream(_events(said, first, pieces, wish, form), write_s=self._bounds.write_s, close=close, headers=headers)


class _Said:
    """Answers being said: each counted once, however it ends, and cancelled with its end."""

    def __init__(self, chorus: Chorus, metrics: Metrics, tab: Tab) -> None:
        self.chorus = chorus
        self._tab = tab
        self._metrics = metrics
        self._outcome = "cancelled"
        """Of those that have not finished."""
        self._closed = False

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Raises the RequestError with which an answer failed; what is not one is logged and becomes a 500."""
        try:
            async with aclosing(self.chorus.pieces()) as pieces:
                async for said in pieces:
                    yield said
        except RequestError as error:
            self._outcome = outcome(error)
            raise
        except Exception as error:
            log.exception("an answer failed unexpectedly", error)
            self._outcome = Broken.type
            raise Broken("the server failed on this request") from error

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.chorus.cancel()
        self._tab.settle(self.chorus.computed_tokens, time.monotonic())
        for choice, speech in enumerate(self.chorus.speeches):
            prompt_tokens = speech.usage.prompt_tokens if self.chorus.leads(choice) else 0
            self._metrics.ended(speech.finish or self._outcome, speech.timeline.settled(), prompt_tokens, speech.usage.completion_tokens)


def outcome(error: RequestError) -> str:
    """How metrics call an error."""
    return error.code or error.type


async def _events(
    said: _Said, first: asyncio.Task[Words], pieces: AsyncGenerator[Words, None], wish: Wish, form: Form
) -> AsyncGenerator[str, None]:
    """The stream's events. An error after its start is an event, too, and the last one."""
    try:
        speeches = said.chorus.speeches
        for choice in range(len(speeches)):
            if (opening := form.opening(choice)) is not None:
                yield event({**opening, **_usage(wish, replace(said.chorus.usage, completion_tokens=0))})
        words: Words | None = await first
        while words is not None:
            choice, piece = words
            chunk = form.chunk(choice, piece)
            if piece.finish is not None and wish.timeline:
                chunk["baton"] = timeline_body(speeches[choice].timeline.settled())
            yield event({**chunk, **_usage(wish, said.chorus.usage)})
            words = await anext(pieces, None)
        if wish.include_usage:
            yield event(form.last(said.chorus.usage))
        yield DONE
    except RequestError as error:
        yield event(error_body(error))
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await pieces.aclose()


def _usage(wish: Wish, usage: Usage) -> dict[str, Any]:
    """What a chunk that is not the last one says of it: so far, or null, or nothing, as the client wishes."""
    if wish.running_usage:
        return {"usage": usage_body(usage)}
    return {"usage": None} if wish.include_usage else {}


async def _next(pieces: AsyncGenerator[Words, None]) -> Words:
    return await anext(pieces)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, R], *, timeout_s: float | None = None) -> asyncio.Task[R]:
    """The work, done, or still going on after the timeout. If the client leaves before, it is cancelled: raises ClientDisconnect."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(gone(request.receive))
    keep = False
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if leaving in done and working not in done:
            raise ClientDisconnect
        keep = True
        return working
    finally:
        ending = [leaving] if keep else [leaving, working]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
