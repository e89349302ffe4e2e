"""Every parameter of the API, described once: JSON Schemas of the bodies that clients send. The checks themselves are in parameters.py; the
tests hold the two against each other, name by name and limit by limit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.inputs import MOST_PROMPTS
from gateway.parameters import (
    DEFAULT_COMPLETION_TOKENS,
    LEAST_DEADLINE_S,
    MOST_ANSWERS,
    MOST_BIASES,
    MOST_LOGPROBS,
    MOST_STOP_CHARACTERS,
    MOST_STOPS,
    TIERS,
)
from gateway.prompts import Model

Schema = dict[str, Any]

EMPTY: list[Any] = [None, False, 0, "", [], {}]


def chat_body(model: Model, deadline_s: float) -> Schema:
    """Of POST /v1/chat/completions."""
    own: dict[str, Schema] = {
        "max_completion_tokens": _integer("Most tokens of an answer; default: as many as fit into the context", 1),
        "max_tokens": _integer("The older name of max_completion_tokens", 1),
        "logprobs": _flag("Say the log-probability of each token"),
        "top_logprobs": _integer("With logprobs: also those of this many likeliest tokens", 0, MOST_LOGPROBS, 0),
    }
    needed = {"model": _model(model), "messages": _messages()}
    return _body(needed, {**own, **_shared(model, deadline_s)})


def completion_body(model: Model, deadline_s: float) -> Schema:
    """Of POST /v1/completions."""
    own: dict[str, Schema] = {
        "max_tokens": _integer("Most tokens of an answer", 1, None, DEFAULT_COMPLETION_TOKENS),
        "logprobs": _integer("Say the log-probability of each token and of this many likeliest ones", 0, MOST_LOGPROBS),
        "echo": _flag("Begin each answer with its prompt; not together with logprobs"),
        "best_of": _integer("Supported only if it equals n", 1, MOST_ANSWERS),
    }
    needed = {"model": _model(model), "prompt": _prompt(model)}
    return _body(needed, {**own, **_shared(model, deadline_s)})


def tokenize_body(model: Model, deadline_s: float) -> Schema:
    fields = {
        "model": {**_model(model), "description": "The served model; may be left out"},
        "prompt": {"type": "string", "description": "A text; either this or messages"},
        "messages": _messages(),
        "add_special_tokens": _flag("With prompt: add what the tokenizer puts around a text", default=True),
        "return_token_strs": _flag("Also say the text of each token"),
    }
    none: Schema = {"type": "null"}
    text = {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": none}}
    talk = {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": none, "add_special_tokens": none}}
    return {**_body({}, fields), "oneOf": [text, talk]}


def detokenize_body(model: Model, deadline_s: float) -> Schema:
    tokens = {"type": "array", "items": _id(model), "maxItems": model.context_tokens, "description": "Token ids"}
    return _body({"tokens": tokens}, {"model": {**_model(model), "description": "The served model; may be left out"}})


# ----------------------------------------------------------------------------------------------------- what both answer


def _shared(model: Model, deadline_s: float) -> dict[str, Schema]:
    return {
        "n": _integer(f"Answers to each prompt; prompts times n may be {MOST_ANSWERS}", 1, MOST_ANSWERS, 1),
        "temperature": _number("0 always takes the likeliest token", 0, 2, 1),
        "top_p": _number("Draw among the likeliest tokens that have this probability together", 0, 1, 1),
        "top_k": _integer("Draw among this many likeliest tokens; 0 or -1: all", -1, model.vocabulary, 0),
        "min_p": _number("Draw among tokens with at least this share of the likeliest one's probability", 0, 1, 0),
        "seed": _integer("The same seed draws the same tokens; default: a random one", -(2**63), 2**64 - 1),
        "stop": {
            "description": "An answer ends before any of these",
            "anyOf": [_stop(), {"type": "array", "items": _stop(), "maxItems": MOST_STOPS}],
        },
        "presence_penalty": _number("Taken from logits of tokens that were said", -2, 2, 0),
        "frequency_penalty": _number("Taken from logits of tokens for each time they were said", -2, 2, 0),
        "repetition_penalty": _number("Divides logits of tokens of the prompt and the answer", 0.01, 10, 1),
        "logit_bias": {
            "type": "object",
            "description": "Added to the logits of token ids",
            "maxProperties": MOST_BIASES,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "ignore_eos": _flag("Go on beyond the model's end of text, up to max_tokens (Baton's own)"),
        "stream": _flag("Answer as Server-Sent Events, a chunk for each step"),
        "stream_options": {
            "type": "object",
            "description": "With stream only",
            "properties": {
                "include_usage": _or_null(_flag("A last chunk with usage and no choices")),
                "continuous_usage_stats": _or_null(_flag("Usage so far in every chunk (vLLM's extension)")),
                "include_obfuscation": {},
            },
            "additionalProperties": False,
        },
        "timeline": _flag("Add the five stages of the request, in milliseconds, to the answer or its last chunk (Baton's own)"),
        "priority": {
            "type": "string",
            "enum": ["interactive", "batch"],
            "default": "interactive",
            "description": "A batch request is begun when nobody else waits; a begun prompt is read to its end (Baton's own)",
        },
        "service_tier": {
            "type": "string",
            "enum": list(TIERS),
            "default": "auto",
            "description": "flex: like priority batch; priority: before all others, if the key may; auto and default: as priority says",
        },
        "deadline": _number("Seconds after which the request is given up (Baton's own)", LEAST_DEADLINE_S, deadline_s, deadline_s),
        **_without_effect(),
    }


def _without_effect() -> dict[str, Schema]:
    """Fields that clients send and that change nothing here, with the values that are let through."""
    return {
        "user": _unused({"type": "string"}),
        "store": _only(False),
        "metadata": _unused({"type": "object"}),
        "parallel_tool_calls": _unused({"type": "boolean"}),
        "safety_identifier": _unused({"type": "string"}),
        "prompt_cache_key": _unused({"type": "string"}),
        "response_format": _only({"type": "text"}),
        "modalities": _only(["text"]),
        "suffix": _only(""),
        "tools": _only([]),
        "functions": _only([]),
        "tool_choice": _only("none"),
        "function_call": _only("none"),
    }


# -------------------------------------------------------------------------------------------------------- single schemas


def _body(needed: Mapping[str, Schema], optional: Mapping[str, Schema]) -> Schema:
    """Null is the same as absent, for every field that may be absent."""
    return {
        "type": "object",
        "properties": {**needed, **{name: _or_null(schema) for name, schema in optional.items()}},
        "required": list(needed),
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), str):
        values = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
        return {**schema, "type": [schema["type"], "null"], **values}
    if "const" in schema:
        return {**{name: value for name, value in schema.items() if name != "const"}, "enum": [schema["const"], None]}
    return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}


def _model(model: Model) -> Schema:
    return {"type": "string", "enum": [model.name], "description": "The served model"}


def _messages() -> Schema:
    part = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}, "required": ["type", "text"]}
    message = {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": part}]},
            "name": {"description": "Without effect"},
        },
        "required": ["role", "content"],
        "additionalProperties": {"enum": EMPTY},
    }
    return {"type": "array", "items": message, "minItems": 1, "description": "The conversation so far"}


def _prompt(model: Model) -> Schema:
    text = {"type": "string", "minLength": 0 if model.encode("") else 1}
    one: list[Schema] = [text, {"type": "array", "items": _id(model), "minItems": 1}]
    several = {"type": "array", "items": {"anyOf": one}, "minItems": 1, "maxItems": MOST_PROMPTS}
    return {"anyOf": [*one, several], "description": "A text or its token ids, or a list of such prompts"}


def _id(model: Model) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": model.vocabulary - 1}


def _stop() -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": MOST_STOP_CHARACTERS}


def _flag(about: str, *, default: bool = False) -> Schema:
    return {"type": "boolean", "default": default, "description": about}


def _integer(about: str, low: int, high: int | None = None, default: int | None = None) -> Schema:
    return _ranged("integer", about, low, high, default)


def _number(about: str, low: float, high: float, default: float) -> Schema:
    return _ranged("number", about, low, high, default)


def _ranged(kind: str, about: str, low: float, high: float | None, default: float | None) -> Schema:
    bounds: Schema = {"minimum": low} if high is None else {"minimum": low, "maximum": high}
    return {"type": kind, **bounds, **({} if default is None else {"default": default}), "description": about}


def _only(value: Any) -> Schema:
    return {"const": value, "description": "Not supported: only this value is let through"}


def _unused(schema: Schema) -> Schema:
    return {**schema, "description": "Without effect"}
