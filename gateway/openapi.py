"""What is served, described once: app.py makes its routes from these operations, and `/openapi.json` is generated from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from gateway.prompts import Model
from gateway.reply_schemas import Schema, ref, reply_schemas
from gateway.schemas import chat_body, completion_body, detokenize_body, tokenize_body

JSON = "application/json"
METRICS = "text/plain; version=0.0.4"
VERSION = "1"


@dataclass(frozen=True, slots=True)
class Query:
    """A parameter of an address."""

    name: str
    about: str
    default: float


@dataclass(frozen=True, slots=True)
class Operation:
    """One endpoint. `path` is Starlette's; `reply` names a schema, None is text of `media`."""

    name: str
    method: Literal["GET", "POST"]
    path: str
    about: str
    reply: str | None
    body: Callable[[Model, float], Schema] | None = None
    streams: str | None = None
    """The schema of an event, if it can answer as a stream."""
    media: str = JSON
    query: tuple[Query, ...] = ()
    open: bool = False
    """Needs no key."""
    errors: tuple[int, ...] = ()

    @property
    def metered(self) -> bool:
        """Counts as a request of its key."""
        return self.method == "POST"


READY = (
    "Whether a request could be served now, and what is lacking: a role, identity (no worker has ever joined), gateway (it drains), redis"
)
ANSWERS = (400, 404, 408, 413, 429, 500, 503)
CHECKS = (400, 404, 408, 413, 500, 503)
OBJECTIVES = (
    Query("ttft_ms", "Objective for the time to the first token", 500),
    Query("tpot_ms", "Objective for the mean time per output token after the first", 50),
    Query("window_s", "Of the requests that ended in the last so many seconds", 300),
)
_ALL = (
    Operation(
        "chat", "POST", "/v1/chat/completions", "Answer a conversation", "ChatCompletion", chat_body, "ChatCompletionChunk", errors=ANSWERS
    ),
    Operation(
        "completion", "POST", "/v1/completions", "Continue prompts", "Completion", completion_body, "CompletionChunk", errors=ANSWERS
    ),
    Operation("models", "GET", "/v1/models", "The served model, as a list", "Models"),
    Operation("model", "GET", "/v1/models/{name:path}", "The served model", "Model", errors=(404,)),
    Operation("tokenize", "POST", "/tokenize", "Token ids of a text or a conversation", "Tokens", tokenize_body, errors=CHECKS),
    Operation("detokenize", "POST", "/detokenize", "The text of token ids", "Text", detokenize_body, errors=CHECKS),
    Operation("fleet", "GET", "/fleet", "Workers, queue, and how the last requests were served", "Fleet", query=OBJECTIVES, errors=(400,)),
    Operation("demand", "GET", "/fleet/demand", "Lengths and times of the last requests, for the planner", "Demand"),
    Operation("metrics", "GET", "/metrics", "Figures for Prometheus", None, media=METRICS),
    Operation("health", "GET", "/health", "The process lives", "Health", open=True),
    Operation("ready", "GET", "/ready", READY, "Ready", open=True, errors=(503,)),
    Operation("openapi", "GET", "/openapi.json", "This description", "Any", open=True),
)
OPERATIONS = {operation.path: operation for operation in _ALL}
"""By path; each path has one method."""
ERRORS = {
    400: "The request must be changed as the message says",
    401: "An API key is needed, or this one is not known",
    403: "Without API keys, only requests from this host are accepted, and none from web pages of other origins",
    404: "There is no such model or path",
    408: "The body was not complete in time",
    413: "The body is too large",
    429: "The limit of this key or of the fleet is reached: try again after Retry-After seconds",
    500: "The server failed on this request",
    503: "No live worker of a role, queue away, deadline passed, or the gateway is full or shutting down; usually with Retry-After",
}


def document(served: Iterable[Operation], model: Model, deadline_s: float, *, keyed: bool, local: bool = False) -> Schema:
    """The OpenAPI 3.1 description of a gateway that serves these operations for this model. `keyed`: it asks for keys. `local`: it serves
    this host only."""
    paths = {
        one.path.replace(":path}", "}"): {one.method.lower(): _operation(one, model, deadline_s, keyed=keyed, local=local)}
        for one in served
    }
    components: Schema = {"schemas": {**reply_schemas(), "Any": {"type": "object"}}}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "An API key of this gateway"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": VERSION, "description": f"OpenAI's API over {model.name}, with prefill and decode apart"},
        "paths": paths,
        "components": components,
    }


def _operation(operation: Operation, model: Model, deadline_s: float, *, keyed: bool, local: bool) -> Schema:
    locked = keyed and not operation.open
    statuses = set(operation.errors) | ({401} if locked else set()) | ({429} if locked and operation.metered else set())
    statuses |= {403} if local else set()
    found: Schema = {
        "operationId": operation.name,
        "summary": operation.about,
        "responses": {"200": _reply(operation), **{str(status): _error(operation, status) for status in sorted(statuses)}},
    }
    if operation.body is not None:
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": operation.body(model, deadline_s)}}}
    parameters = [_query(query) for query in operation.query]
    if "{name" in operation.path:
        parameters.append({"name": "name", "in": "path", "required": True, "schema": {"type": "string"}})
    if parameters:
        found["parameters"] = parameters
    if locked:
        found["security"] = [{"key": []}]
    return found


def _reply(operation: Operation) -> Schema:
    schema = {"type": "string"} if operation.reply is None else ref(operation.reply)
    content: Schema = {operation.media: {"schema": schema}}
    reply: Schema = {"description": operation.about, "content": content}
    if operation.streams is not None:
        about = f"With stream: each event's data is a {operation.streams}; the last one is [DONE], or an Error if the answer failed"
        content["text/event-stream"] = {"schema": {"description": about}}
        reply["headers"] = {"Server-Timing": {"description": "The stages known so far, in milliseconds", "schema": {"type": "string"}}}
    return reply


def _error(operation: Operation, status: int) -> Schema:
    if operation.name == "ready" and status == 503:
        return {"description": "Something is lacking", "content": {JSON: {"schema": ref("Ready")}}}
    reply: Schema = {"description": ERRORS[status], "content": {JSON: {"schema": ref("Error")}}}
    header = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}.get(status)
    if header is not None:
        reply["headers"] = {header: {"required": status != 503, "schema": {"type": "string" if status == 401 else "integer"}}}
    return reply


def _query(query: Query) -> Schema:
    return {
        "name": query.name,
        "in": "query",
        "description": query.about,
        "schema": {"type": "number", "default": query.default, "exclusiveMinimum": 0},
    }
