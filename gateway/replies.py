"""Bodies of replies in OpenAI's formats: whole answers, chunks of streams, usage, logprobs, errors, Baton's timeline."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from common.errors import RequestError
from common.messages import Token
from gateway.ask import Timeline
from gateway.prompts import Model
from gateway.speech import Piece, Usage


def error_body(error: RequestError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def model_body(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "baton", "max_model_len": model.context_tokens}


def usage_body(usage: Usage) -> dict[str, int]:
    total = usage.prompt_tokens + usage.completion_tokens
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}


def timeline_body(timeline: Timeline) -> dict[str, Any]:
    """The five stages in milliseconds; with `other` they add up to `total`."""
    stages = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other", "ttft", "total")
    body = {f"{stage}_ms": round(1000 * getattr(timeline, f"{stage}_s"), 3) for stage in stages}
    return {"timeline": {**body, "attempts": timeline.attempts}}


@dataclass(slots=True)
class Form:
    """How one request's replies look: chat or completion, its id and time, and how far its text has come."""

    id: str
    chat: bool
    model: Model
    logprobs: int
    """Alternatives asked for; -1: no logprobs."""
    created: int = field(default_factory=lambda: int(time.time()))
    text_offset: int = 0

    def opening(self) -> dict[str, Any] | None:
        """A stream's first chunk: chat says whose words follow."""
        return (
            self._chunk({"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})
            if self.chat
            else None
        )

    def chunk(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": self._logprobs(piece.tokens), "finish_reason": piece.finish}
        if self.chat:
            choice["delta"] = {"content": piece.text} if piece.text or piece.finish is None else {}
        else:
            choice["text"] = piece.text
        return self._chunk(choice)

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk that carries usage: no choices."""
        return {**self._chunk(None), "usage": usage_body(usage)}

    def whole(self, pieces: list[Piece], usage: Usage) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        choice: dict[str, Any] = {"index": 0, "logprobs": self._logprobs(tokens), "finish_reason": pieces[-1].finish}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head(stream=False), "choices": [choice], "usage": usage_body(usage)}

    # ---------------------------------------------------------------------------------------------------------- inside

    def _head(self, *, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        return {**self._head(stream=True), "choices": [] if choice is None else [choice]}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.logprobs < 0 or not tokens:
            return None
        return self._chat_logprobs(tokens) if self.chat else self._completion_logprobs(tokens)

    def _chat_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        content = []
        for token in tokens:
            assert token.logprob is not None
            tops = [self._entry(other, value) for other, value in token.logprob.top]
            content.append({**self._entry(token.id, token.logprob.own), "top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        piece = self.model.piece(token)
        return {"token": piece, "logprob": value, "bytes": list(piece.encode())}

    def _completion_logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        pieces = [self.model.piece(token.id) for token in tokens]
        offsets = []
        for piece in pieces:
            offsets.append(self.text_offset)
            self.text_offset += len(piece)
        logprobs = [token.logprob for token in tokens if token.logprob is not None]
        return {
            "tokens": pieces,
            "token_logprobs": [logprob.own for logprob in logprobs],
            "top_logprobs": [{self.model.piece(other): value for other, value in logprob.top} for logprob in logprobs],
            "text_offset": offsets,
        }
