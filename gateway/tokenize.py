"""`/tokenize` and `/detokenize`: text or messages to ids and back, as the model sees them. The names in bodies and replies are vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from common.errors import BadRequest
from gateway.bodies import Bodies, check_model, json_object
from gateway.inputs import message_ids
from gateway.prompts import Model
from gateway.values import flag

TOKENIZE = frozenset({"model", "prompt", "messages", "add_special_tokens", "return_token_strs"})
DETOKENIZE = frozenset({"model", "tokens"})


class Tokenizer:
    """The two endpoints."""

    def __init__(self, model: Model, bodies: Bodies) -> None:
        self._model = model
        self._bodies = bodies

    async def tokenize(self, request: Request) -> Response:
        return await self._reply(request, tokenized)

    async def detokenize(self, request: Request) -> Response:
        return await self._reply(request, detokenized)

    async def _reply(self, request: Request, make: Callable[[bytes, Model], dict[str, Any]]) -> Response:
        return JSONResponse(await self._bodies.make(request, lambda body: make(body, self._model)))


def tokenized(body: bytes, model: Model) -> dict[str, Any]:
    """Raises BadRequest, or NotFound for another model. A text may be longer than the context: it is counted, as long as it could fit."""
    fields = _fields(body, model, TOKENIZE)
    if ("prompt" in fields) == ("messages" in fields):
        raise BadRequest("give either prompt or messages", param="prompt")
    special = flag(fields, "add_special_tokens") if "add_special_tokens" in fields else True
    if "messages" in fields:
        if "add_special_tokens" in fields:
            raise BadRequest("add_special_tokens goes with prompt: for messages the model's template decides", param="add_special_tokens")
        ids = message_ids(fields, model)
    elif isinstance(fields["prompt"], str):
        ids = model.encode(fields["prompt"], special=special)
    else:
        raise BadRequest("prompt must be a string", param="prompt")
    reply = {"count": len(ids), "max_model_len": model.context_tokens, "tokens": ids}
    if flag(fields, "return_token_strs"):
        reply["token_strs"] = [model.raw(token).decode("utf-8", "replace") for token in ids]
    return reply


def detokenized(body: bytes, model: Model) -> dict[str, Any]:
    """Raises BadRequest, or NotFound for another model. Of byte-level tokens special ones are shown, too, by their names."""
    fields = _fields(body, model, DETOKENIZE)
    ids = fields.get("tokens")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise BadRequest("tokens must be a list of whole numbers, the token ids", param="tokens")
    if len(ids) > model.context_tokens:
        raise BadRequest(
            f"tokens has {len(ids)} ids; the context is {model.context_tokens}", param="tokens", code="context_length_exceeded"
        )
    bad = next((token for token in ids if not 0 <= token < model.vocabulary), None)
    if bad is not None:
        raise BadRequest(f"tokens holds the id {str(bad)[:20]}; ids are 0 to {model.vocabulary - 1}", param="tokens")
    text = b"".join(map(model.raw, ids)).decode("utf-8", "replace") if model.byte_level else model.decode(ids)
    return {"prompt": text}


def _fields(body: bytes, model: Model, known: frozenset[str]) -> dict[str, Any]:
    """`model` may be left out: there is one."""
    fields = json_object(body)
    unknown = next((name for name in fields if name not in known), None)
    if unknown is not None:
        raise BadRequest(f"{unknown} is not a parameter of this endpoint", param=unknown, code="unknown_parameter")
    check_model({"model": model.name, **fields}, model.name)
    return fields
