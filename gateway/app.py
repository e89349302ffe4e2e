"""The HTTP side: OpenAI's API on Starlette, over a Desk."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from common.errors import NotFound, Overloaded, RequestError, TooLarge
from common.logs import get_logger
from gateway.answers import Answers, Bounds
from gateway.ask import Desk
from gateway.bodies import Slow
from gateway.metrics import Metrics
from gateway.prompts import Model
from gateway.replies import error_body, model_body
from gateway.speech import Broken

__all__ = ["Bounds", "create_app"]

log = get_logger(__name__)


class Api:
    """The endpoints. One per gateway process."""

    def __init__(self, desk: Desk, model: Model, bounds: Bounds, metrics: Metrics) -> None:
        self._desk = desk
        self._model = model
        self._metrics = metrics
        self._answers = Answers(desk, model, bounds, metrics)

    async def root(self, request: Request) -> Response:
        return JSONResponse({"name": "baton", "model": self._model.name, "api": ["/v1/chat/completions", "/v1/completions", "/v1/models"]})

    async def health(self, request: Request) -> Response:
        """The process lives."""
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

    async def chat(self, request: Request) -> Response:
        return await self._answers.answer(request, chat=True)

    async def completion(self, request: Request) -> Response:
        return await self._answers.answer(request, chat=False)


# -------------------------------------------------------------------------------------------------------------- errors


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {}
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, TooLarge | Slow):
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
