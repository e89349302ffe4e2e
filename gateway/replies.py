"""Bodies of replies in OpenAI's formats: whole answers, chunks of streams, usage, logprobs, errors, Baton's timeline."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from common.errors import RequestError
from gateway.ask import Timeline
from gateway.prompts import Model
from gateway.speech import Piece, Spoken, Usage

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not know."""
MOST_ECHOED = 500
"""Characters of a client's own words that an error repeats."""
ALIVE = {"status": "ok"}
"""What `/health` says."""


def error_body(error: RequestError) -> dict[str, Any]:
    return {"error": {"message": _sayable(error.message), "type": error.type, "param": _sayable(error.param), "code": error.code}}


def _sayable(words: str | None) -> str | None:
    """Short, and without lone surrogates, which UTF-8 cannot carry: messages and params repeat what clients send."""
    if words is None:
        return None
    short = words if len(words) <= MOST_ECHOED else words[:MOST_ECHOED] + "…"
    return short.encode("utf-8", "backslashreplace").decode()


def model_body(model: Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "baton", "max_model_len": model.context_tokens}


def server_timing(timeline: Timeline) -> str:
    """The stages known so far, for the header of that name (W3C Server Timing): milliseconds."""
    stages = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "ttft", "total")
    known = [(stage, 1000 * getattr(timeline, f"{stage}_s")) for stage in stages]
    return ", ".join(f"{stage};dur={value:.3f}" for stage, value in known if value > 0)


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def timeline_body(timeline: Timeline) -> dict[str, Any]:
    """The five stages in milliseconds; with `other` they add up to `total`."""
    stages = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other", "ttft", "total")
    body = {f"{stage}_ms": round(1000 * getattr(timeline, f"{stage}_s"), 3) for stage in stages}
    return {"timeline": {**body, "attempts": timeline.attempts}}


@dataclass(frozen=True, slots=True)
class Form:
    """How one request's replies look: chat or completion, its id and time."""

    id: str
    chat: bool
    model: Model
    logprobs: int
    """Alternatives asked for; -1: no logprobs."""
    created: int = field(default_factory=lambda: int(time.time()))

    def opening(self, index: int) -> dict[str, Any] | None:
        """A choice's first chunk: chat says whose words follow."""
        if not self.chat:
            return None
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(piece.tokens), "finish_reason": piece.finish}
        if self.chat:
            choice["delta"] = {"content": piece.text} if piece.text or piece.finish is None else {}
        else:
            choice["text"] = piece.text
        return self._chunk(choice)

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk that carries usage: no choices."""
        return {**self._chunk(None), "usage": usage_body(usage)}

    def whole(self, answers: list[list[Piece]], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(index, pieces) for index, pieces in enumerate(answers)]
        return {**self._head(stream=False), "choices": choices, "usage": usage_body(usage)}

    # ---------------------------------------------------------------------------------------------------------- inside

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        said = [spoken for piece in pieces for spoken in piece.tokens]
        choice: dict[str, Any] = {"index": index, "logprobs": self._logprobs(said), "finish_reason": pieces[-1].finish}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice

    def _head(self, *, stream: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if stream else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model.name}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        return {**self._head(stream=True), "choices": [] if choice is None else [choice]}

    def _logprobs(self, said: list[Spoken]) -> dict[str, Any] | None:
        if self.logprobs < 0 or not said:
            return None
        return self._chat_logprobs(said) if self.chat else self._completion_logprobs(said)

    def _chat_logprobs(self, said: list[Spoken]) -> dict[str, Any]:
        content = []
        for spoken in said:
            own, top = _logprob(spoken)
            tops = [self._entry(other, value) for other, value in top[: self.logprobs]]
            content.append({**self._entry(spoken.token.id, own), "top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        raw = self.model.raw(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(value), "bytes": list(raw)}

    def _completion_logprobs(self, said: list[Spoken]) -> dict[str, Any]:
        """OpenAI's older format: alternatives by their names, the drawn token always among them."""
        alternatives = []
        for spoken in said:
            own, top = _logprob(spoken)
            named = {self._name(other): _finite(value) for other, value in top[: self.logprobs]}
            alternatives.append({**named, self._name(spoken.token.id): _finite(own)})
        return {
            "tokens": [self._name(spoken.token.id) for spoken in said],
            "token_logprobs": [_finite(_logprob(spoken)[0]) for spoken in said],
            "top_logprobs": alternatives,
            "text_offset": [spoken.offset for spoken in said],
        }

    def _name(self, token: int) -> str:
        """The token's text; bytes that are no characters as OpenAI writes them: bytes:\\xe2\\x82."""
        raw = self.model.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _logprob(spoken: Spoken) -> tuple[float, list[tuple[int, float]]]:
    logprob = spoken.token.logprob
    assert logprob is not None, "the worker was asked for logprobs"
    return logprob.own, logprob.top


def _finite(value: float) -> float:
    """NaN and minus infinity are not JSON."""
    return value if value > LEAST_LOGPROB else LEAST_LOGPROB
