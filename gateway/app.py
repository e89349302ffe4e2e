"""The HTTP side: OpenAI's API on Starlette, over a Desk."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from common.errors import BadRequest, NotFound, Overloaded, RequestError, TooLarge
from common.logs import get_logger
from gateway.ask import Desk
from gateway.metrics import Metrics
from gateway.parameters import Limits, Wish, parse
from gateway.prompts import Model
from gateway.replies import Form, error_body, model_body, timeline_body
from gateway.speech import Piece, Speech

log = get_logger(__name__)

KEEP_ALIVE_S = 10.0
"""A silent stream says a comment this often, so that proxies keep it."""
THREAD_BYTES = 8192
"""Bodies larger than this are parsed and tokenised on a thread, so that no stream waits for them."""
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may cost."""

    max_body_bytes: int
    body_s: float
    """A body must be complete this long after its head."""
    deadline_s: float
    write_s: float
    """A stream whose client takes nothing for this long ends."""


class Api:
    """The endpoints. One per gateway process."""

    def __init__(self, desk: Desk, model: Model, bounds: Bounds, metrics: Metrics) -> None:
        self._desk = desk
        self._model = model
        self._bounds = bounds
        self._metrics = metrics

    # -------------------------------------------------------------------------------------------------- about the server

    async def root(self, request: Request) -> Response:
        return JSONResponse({"name": "baton", "model": self._model.name, "api": ["/v1/chat/completions", "/v1/completions", "/v1/models"]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """200 if a request could be served now; else 503 and what is lacking."""
        roles = self._desk.roles()
        missing = [] if roles.get("colocated") else [role for role in ("prefill", "decode") if not roles.get(role)]
        missing += [] if self._desk.identity is not None else ["identity"]
        body = {"ready": not missing, "workers": roles, "missing": missing}
        return JSONResponse(body, status_code=503 if missing else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_body(self._model)]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model.name:
            raise NotFound(f"the model {name!r} does not exist", param="model", code="model_not_found")
        return JSONResponse(model_body(self._model))

    # ----------------------------------------------------------------------------------------------------------- answers

    async def chat(self, request: Request) -> Response:
        return await self._serve(request, chat=True)

    async def completion(self, request: Request) -> Response:
        return await self._serve(request, chat=False)

    async def _serve(self, request: Request, *, chat: bool) -> Response:
        body = await self._body(request)
        wish = await self._wish(body, chat=chat)
        speech = Speech(self._desk.submit(wish.ask), wish, self._model)
        form = Form(("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12), chat, self._model, wish.ask.sampling.logprobs)
        if not wish.stream:
            return await self._whole(request, speech, wish, form)
        pieces = aiter(speech)
        first = await self._until_gone(request, self._first(speech, pieces))
        return StreamingResponse(self._stream(speech, pieces, first, wish, form), media_type="text/event-stream", headers=HEADERS)

    async def _body(self, request: Request) -> bytes:
        """Raises TooLarge, or BadRequest if it does not arrive in time."""
        most = self._bounds.max_body_bytes
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > most:
            raise TooLarge(f"the body has {announced} bytes, the limit is {most}")
        body = bytearray()
        try:
            async with asyncio.timeout(self._bounds.body_s):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise TooLarge(f"the body is larger than the limit of {most} bytes")
        except TimeoutError as error:
            raise BadRequest(f"the body was not complete within {self._bounds.body_s:g} s") from error
        return bytes(body)

    async def _wish(self, body: bytes, *, chat: bool) -> Wish:
        identity = self._desk.identity
        context = self._model.context_tokens
        if identity is not None:
            context = min(context, identity.context_tokens, identity.max_request_pages * identity.page_tokens)
        limits = Limits(context, self._bounds.deadline_s)
        if len(body) > THREAD_BYTES:
            return await asyncio.to_thread(parse, body, self._model, limits, chat=chat)
        return parse(body, self._model, limits, chat=chat)

    # ------------------------------------------------------------------------------------------------------ whole answers

    async def _whole(self, request: Request, speech: Speech, wish: Wish, form: Form) -> Response:
        async def collect() -> list[Piece]:
            return [piece async for piece in speech]

        pieces = await self._until_gone(request, self._counted(speech, collect()))
        self._ended(str(pieces[-1].finish), speech)
        body = form.whole(pieces, speech.usage)
        if wish.timeline:
            body["baton"] = timeline_body(speech.timeline)
        return JSONResponse(body)

    async def _until_gone(self, request: Request, work: Awaitable[Any]) -> Any:
        """The result of the work, unless the client leaves before; then the work is cancelled, and with it the answer."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ClientDisconnect
            return working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _counted(self, speech: Speech, work: Awaitable[Any]) -> Any:
        """Count what does not come to its end."""
        try:
            return await work
        except RequestError as error:
            self._ended(error.code or error.type, speech)
            raise
        except asyncio.CancelledError:
            speech.cancel()
            self._ended("cancelled", speech)
            raise

    # ------------------------------------------------------------------------------------------------------------ streams

    async def _first(self, speech: Speech, pieces: AsyncIterator[Piece]) -> Piece:
        """The first piece is awaited before the head is sent: what fails until then has its proper status."""
        return await self._counted(speech, anext(pieces))  # type: ignore[no-any-return]

    async def _stream(self, speech: Speech, pieces: AsyncIterator[Piece], first: Piece, wish: Wish, form: Form) -> AsyncIterator[str]:
        outcome = "cancelled"
        try:
            opening = form.opening()
            if opening is not None:
                yield _event(opening)
            piece: Piece | None = first
            while piece is not None:
                chunk = form.chunk(piece)
                if piece.finish is not None and wish.timeline:
                    chunk["baton"] = timeline_body(speech.timeline)
                if wish.include_usage:
                    chunk["usage"] = None
                yield _event(chunk)
                if piece.finish is not None:
                    outcome = str(piece.finish)
                    break
                async for word in self._awaited(pieces):
                    if isinstance(word, str):
                        yield word
                    else:
                        piece = word
            if wish.include_usage:
                yield _event(form.last(speech.usage))
            yield "data: [DONE]\n\n"
        except RequestError as error:
            outcome = error.code or error.type
            yield _event(error_body(error))
        finally:
            speech.cancel()
            self._ended(outcome, speech)

    async def _awaited(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[str | Piece]:
        """Keep-alive comments until the next piece, then the piece."""
        coming = asyncio.ensure_future(anext(pieces))  # type: ignore[arg-type]
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE_S)
                if done:
                    yield coming.result()
                    return
                yield ": keep-alive\n\n"
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)

    def _ended(self, outcome: str, speech: Speech) -> None:
        usage = speech.usage
        self._metrics.ended(outcome, speech.timeline, usage.prompt_tokens, usage.completion_tokens)


async def _gone(request: Request) -> None:
    """Returns when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


# -------------------------------------------------------------------------------------------------------------- errors


def error_response(error: RequestError) -> Response:
    headers = {"Retry-After": str(max(1, round(error.retry_after_s)))} if isinstance(error, Overloaded) else None
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: f"there is no {request.url.path} here", 405: f"{request.url.path} does not take {request.method}"}
    found = RequestError(words.get(error.status_code, error.detail), code="not_found" if error.status_code == 404 else None)
    return JSONResponse(error_body(found), status_code=error.status_code, headers=error.headers)


async def _left(request: Request, error: Exception) -> Response:
    """Nobody reads this."""
    return Response(status_code=499)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.exception("a request failed unexpectedly", error, path=request.url.path)
    found = RequestError("the server failed on this request")
    found.type = "server_error"
    return JSONResponse(error_body(found), status_code=500)


def create_app(desk: Desk, model: Model, bounds: Bounds, metrics: Metrics) -> Starlette:
    api = Api(desk, model, bounds, metrics)
    routes: list[tuple[str, Callable[[Request], Awaitable[Response]], str]] = [
        ("/", api.root, "GET"),
        ("/health", api.health, "GET"),
        ("/ready", api.ready, "GET"),
        ("/metrics", api.metrics, "GET"),
        ("/v1/models", api.models, "GET"),
        ("/v1/models/{name:path}", api.model, "GET"),
        ("/v1/chat/completions", api.chat, "POST"),
        ("/v1/completions", api.completion, "POST"),
    ]
    return Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, endpoint, method in routes],
        exception_handlers={
            RequestError: _request_error,
            HTTPException: _http_error,
            ClientDisconnect: _left,
            Exception: _unexpected,
        },
    )
