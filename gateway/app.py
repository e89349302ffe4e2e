"""The HTTP side: OpenAI's API on Starlette, over a Desk."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.errors import NotFound, RequestError, TooLarge
from common.logs import get_logger
from gateway.answers import Answers, Bounds
from gateway.ask import Desk, lacking
from gateway.bodies import Bodies, Crowded, Slow
from gateway.gate import Access, Gate
from gateway.keys import Unauthorized
from gateway.local import Local
from gateway.metrics import Metrics
from gateway.openapi import METRICS, OPERATIONS, Operation, document
from gateway.page import Page
from gateway.prompts import Model
from gateway.replies import ALIVE, error_body, model_body
from gateway.reply_schemas import Schema
from gateway.speech import Broken
from gateway.tokenize import Tokenizer

__all__ = ["Bounds", "create_app"]

log = get_logger(__name__)

EXPOSED = ("Retry-After", "Server-Timing", "WWW-Authenticate")
"""Headers that a web page of another origin may read."""

Endpoint = Callable[[Request], Awaitable[Response]]


class Api:
    """The endpoints, by the names of their operations. One per gateway process."""

    def __init__(self, desk: Desk, model: Model, bounds: Bounds, metrics: Metrics) -> None:
        self._desk = desk
        self._model = model
        self._metrics = metrics
        bodies = Bodies(bounds.max_body_bytes, bounds.body_s, bounds.max_bodies_bytes)
        self._answers = Answers(desk, model, bounds, bodies, metrics)
        tokenizer = Tokenizer(model, bodies)
        self.description: Schema = {}
        self.endpoints: dict[str, Endpoint] = {
            "chat": self.chat,
            "completion": self.completion,
            "models": self.models,
            "model": self.model,
            "tokenize": tokenizer.tokenize,
            "detokenize": tokenizer.detokenize,
            "metrics": self.metrics,
            "demand": self.demand,
            "health": self.health,
            "ready": self.ready,
            "openapi": self.openapi,
        }

    async def health(self, request: Request) -> Response:
        """The process lives."""
        return JSONResponse(ALIVE)

    async def ready(self, request: Request) -> Response:
        """200 if a request could be served now; else 503 and what is lacking."""
        missing = lacking(self._desk)
        body = {"ready": not missing, "workers": self._desk.roles(), "missing": missing}
        return JSONResponse(body, status_code=503 if missing else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=METRICS)

    async def demand(self, request: Request) -> Response:
        return JSONResponse(self._metrics.demand.body(time.monotonic()), headers={"Cache-Control": "no-store"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model_body(self._model)]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model.name:
            raise NotFound(f"the model {name!r} does not exist", param="model", code="model_not_found")
        return JSONResponse(model_body(self._model))

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self.description)

    async def chat(self, request: Request) -> Response:
        return await self._answers.answer(request, chat=True)

    async def completion(self, request: Request) -> Response:
        return await self._answers.answer(request, chat=False)


# -------------------------------------------------------------------------------------------------------------- errors


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = error.challenge
    if isinstance(error, TooLarge | Slow | Crowded):
        headers["Connection"] = "close"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


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
    return JSONResponse(error_body(Broken("the server failed on this request")), status_code=Broken.status)


def create_app(
    desk: Desk,
    model: Model,
    bounds: Bounds,
    metrics: Metrics,
    access: Access | None = None,
    origins: Sequence[str] = (),
    names: Collection[str] | None = None,
) -> Starlette:
    """`access`: None serves everybody. `origins`: whose web pages may call the API; none by default, "*" stands for all. `names`: of this
    host, if only it is to be served (gateway/local.py); None: whatever reaches the port."""
    api = Api(desk, model, bounds, metrics)
    page = Page(desk, metrics.recent, model.name)
    endpoints = {**api.endpoints, "fleet": page.fleet}
    api.description = document(OPERATIONS.values(), model, bounds.deadline_s, keyed=access is not None, local=names is not None)

    def route(operation: Operation) -> Route:
        gate = [] if access is None or operation.open else [Middleware(Gate, access, metrics, metered=operation.metered)]
        return Route(operation.path, endpoints[operation.name], methods=[operation.method], name=operation.name, middleware=gate)

    return Starlette(
        routes=[*map(route, OPERATIONS.values()), *page.files()],
        middleware=[
            *([Middleware(Local, names, origins)] if names is not None else []),
            *([cross_origin(origins)] if origins else []),
        ],
        exception_handlers={
            RequestError: _request_error,
            HTTPException: _http_error,
            ClientDisconnect: _left,
            Exception: _unexpected,
        },
    )


def cross_origin(origins: Sequence[str]) -> Middleware:
    """Browsers may send keys and JSON from these origins; a preflight needs no key. No cookies: there are none."""
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
    )
