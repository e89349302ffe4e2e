"""Request bodies to asks: every field named, checked and bounded. Pure, but for the tokenizer.

What Baton does not support yet is refused by name; fields that clients send at their harmless default are let through.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, TypeAlias

from common.errors import BadRequest
from common.messages import Sampling
from gateway.ask import Ask
from gateway.bodies import check_model, json_object
from gateway.inputs import message_ids, prompts_ids
from gateway.prompts import Model
from gateway.values import flag, given, integer, number

MOST_STOPS = 16
MOST_STOP_CHARACTERS = 500
MOST_LOGPROBS = 20
MOST_BIASES = 1024
MOST_ANSWERS = 32
"""Of one request: prompts times choices."""
LEAST_DEADLINE_S = 0.1
LEAST_TEMPERATURE = 1e-5
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for completions."""

Kind: TypeAlias = tuple[str, type | tuple[type, ...]]
"""A JSON type in words and in Python."""
TEXT, FLAG, OBJECT, LIST = ("a string", str), ("true or false", bool), ("an object", dict), ("a list", list)
CHOICE: Kind = ("a string or an object", (str, dict))
HARMLESS: dict[str, tuple[Kind, Any]] = {
    "user": (TEXT, None),
    "store": (FLAG, False),
    "metadata": (OBJECT, None),
    "parallel_tool_calls": (FLAG, None),
    "safety_identifier": (TEXT, None),
    "prompt_cache_key": (TEXT, None),
    "response_format": (OBJECT, {"type": "text"}),
    "modalities": (LIST, ["text"]),
    "suffix": (TEXT, ""),
    "tools": (LIST, []),
    "functions": (LIST, []),
    "tool_choice": (CHOICE, "none"),
    "function_call": (CHOICE, "none"),
}
"""Fields without effect here: what they must be, and the only value that is let through. None: any."""
UNSUPPORTED = frozenset({"audio", "prediction", "reasoning_effort", "web_search_options", "verbosity", "logits_processors", "guided_json"})
SHARED = frozenset(
    {
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "ignore_eos",
        "stream",
        "stream_options",
        "timeline",
        "n",
        "priority",
        "service_tier",
        "deadline",
    }
)
CHAT = SHARED | {"messages", "max_completion_tokens", "top_logprobs"}
TIERS = {"auto": None, "default": None, "flex": "batch", "priority": "priority"}
"""OpenAI's words for classes of the queue; None: as `priority` says."""
STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats", "include_obfuscation"})
COMPLETION = SHARED | {"prompt", "echo", "best_of"}


@dataclass(frozen=True, slots=True)
class Wish:
    """A request as understood: what to ask of the desk, one ask for each prompt, and how to answer."""

    asks: list[Ask]
    chat: bool
    stream: bool
    stops: list[str]
    include_usage: bool
    timeline: bool
    """Baton's extension: the five stages in the last chunk."""
    echo: bool = False
    """The prompt's text comes before the answer's."""
    running_usage: bool = False
    """vLLM's extension: every chunk of a stream tells the usage so far."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the fleet allows, as far as it is known, and the client's key."""

    context_tokens: int
    deadline_s: float
    most_running: int = MOST_ANSWERS
    """Answers that this gateway runs at once."""
    minute_tokens: int | None = None
    """Of the key, prompts included. None: as many as it likes."""


def parse(body: bytes, model: Model, limits: Limits, *, chat: bool) -> Wish:
    """Raises BadRequest naming the field and what it may be, or NotFound for another model."""
    fields = json_object(body)
    _known(fields, CHAT if chat else COMPLETION)
    check_model(fields, model.name)
    prompts = [message_ids(fields, model)] if chat else prompts_ids(fields, model)
    if not all(prompts):
        raise BadRequest("the prompt is empty", param="messages" if chat else "prompt")
    sampling = _sampling(fields, model, chat=chat)
    n = _choices(fields, len(prompts), min(MOST_ANSWERS, limits.most_running))
    spare = _spare(limits.minute_tokens, prompts, n)
    deadline_s = number(fields, "deadline", LEAST_DEADLINE_S, limits.deadline_s, limits.deadline_s)
    asks = [
        Ask(
            prompt=prompt,
            sampling=sampling,
            max_tokens=_max_tokens(fields, len(prompt), limits.context_tokens, spare, chat=chat),
            stop_ids=[] if flag(fields, "ignore_eos") else model.eos_ids,
            deadline_s=deadline_s,
            job_class=_priority(fields),
            n=n,
        )
        for prompt in prompts
    ]
    stream = flag(fields, "stream")
    options = _stream_options(fields, stream)
    return Wish(
        asks=asks,
        chat=chat,
        stream=stream,
        stops=_stops(fields),
        include_usage=flag(options, "include_usage", within="stream_options."),
        running_usage=flag(options, "continuous_usage_stats", within="stream_options."),
        timeline=flag(fields, "timeline"),
        echo=_echo(fields),
    )


# -------------------------------------------------------------------------------------------------------- the whole body


def _known(fields: dict[str, Any], allowed: frozenset[str]) -> None:
    for name, value in fields.items():
        if name in allowed:
            continue
        if name in HARMLESS:
            _harmless(name, value)
        elif name in UNSUPPORTED or name in CHAT | COMPLETION:
            raise BadRequest(f"{name} is not supported here", param=name, code="unsupported_parameter")
        else:
            raise BadRequest(f"{name} is not a parameter of this endpoint", param=name, code="unknown_parameter")


def _harmless(name: str, value: Any) -> None:
    (words, kind), only = HARMLESS[name]
    if not isinstance(value, kind):
        raise BadRequest(f"{name} must be {words}", param=name)
    if only is not None and value != only:
        raise BadRequest(f"{name} is not supported here with this value", param=name, code="unsupported_parameter")


# -------------------------------------------------------------------------------------------------------------- answers


def _choices(fields: dict[str, Any], prompts: int, most: int) -> int:
    """Answers wanted for each prompt, at most so many for all. OpenAI's `best_of` is n, or refused."""
    n = integer(fields, "n", 1, most, 1)
    if n * prompts > most:
        raise BadRequest(f"{prompts} prompts with {n} answers each; there may be {most} answers in all", param="n")
    if fields.get("best_of", n) != n or fields.get("best_of") is True:
        raise BadRequest("best_of is supported only if it equals n", param="best_of", code="unsupported_parameter")
    return n


def _priority(fields: dict[str, Any]) -> str:
    """The class of the queue, by OpenAI's `service_tier` or by `priority`."""
    priority = fields.get("priority", "interactive")
    if priority not in ("interactive", "batch"):
        raise BadRequest("priority must be interactive or batch", param="priority")
    tier = fields.get("service_tier", "auto")
    if not isinstance(tier, str) or tier not in TIERS:
        raise BadRequest(f"service_tier must be one of {', '.join(TIERS)}", param="service_tier")
    by_tier = TIERS[tier]
    if by_tier is not None and "priority" in fields and priority != by_tier:
        raise BadRequest(f"priority {priority} contradicts service_tier {tier}: leave one out", param="priority")
    return by_tier or str(priority)


def _echo(fields: dict[str, Any]) -> bool:
    echo = flag(fields, "echo")
    if echo and "logprobs" in fields:
        raise BadRequest("echo together with logprobs is not supported", param="echo", code="unsupported_parameter")
    return echo


# ------------------------------------------------------------------------------------------------------------- sampling


def _sampling(fields: dict[str, Any], model: Model, *, chat: bool) -> Sampling:
    return Sampling(
        seed=integer(fields, "seed", -(2**63), 2**64 - 1, secrets.randbits(63)) & 0xFFFFFFFFFFFFFFFF,
        temperature=_temperature(fields),
        top_p=number(fields, "top_p", 0.0, 1.0, 1.0),
        top_k=max(0, integer(fields, "top_k", -1, model.vocabulary, 0)),
        min_p=number(fields, "min_p", 0.0, 1.0, 0.0),
        presence_penalty=number(fields, "presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=number(fields, "frequency_penalty", -2.0, 2.0, 0.0),
        repetition_penalty=number(fields, "repetition_penalty", 0.01, 10.0, 1.0),
        logit_bias=_biases(fields, model),
        logprobs=_logprobs(fields, chat=chat),
    )


def _temperature(fields: dict[str, Any]) -> float:
    """Below LEAST_TEMPERATURE it is greedy: logits divided by less overflow."""
    value = number(fields, "temperature", 0.0, 2.0, 1.0)
    return value if value >= LEAST_TEMPERATURE else 0.0


def _logprobs(fields: dict[str, Any], *, chat: bool) -> int:
    """Alternatives wanted; -1: no logprobs."""
    if not chat:
        return integer(fields, "logprobs", 0, MOST_LOGPROBS, -1)
    wanted = flag(fields, "logprobs")
    if "top_logprobs" in fields and not wanted:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return integer(fields, "top_logprobs", 0, MOST_LOGPROBS, 0) if wanted else -1


def _biases(fields: dict[str, Any], model: Model) -> dict[int, float]:
    biases = fields.get("logit_bias", {})
    if not isinstance(biases, dict) or len(biases) > MOST_BIASES:
        raise BadRequest(f"logit_bias must be an object of at most {MOST_BIASES} token ids", param="logit_bias")
    found = {}
    for name, value in biases.items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else -1
        if not 0 <= token < model.vocabulary:
            raise BadRequest(f"logit_bias names {name[:20]!r}; ids are 0 to {model.vocabulary - 1}", param="logit_bias")
        if type(value) not in (int, float) or not -100 <= value <= 100:
            raise BadRequest(f"logit_bias of {token} must be a number from -100 to 100", param="logit_bias")
        found[token] = float(value)
    return found


def _stops(fields: dict[str, Any]) -> list[str]:
    stop = fields.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) for s in stops):
        raise BadRequest(f"stop must be a string or a list of at most {MOST_STOPS} strings", param="stop")
    if not all(1 <= len(s) <= MOST_STOP_CHARACTERS for s in stops):
        raise BadRequest(f"a stop string must have 1 to {MOST_STOP_CHARACTERS} characters", param="stop")
    return stops


def _spare(minute_tokens: int | None, prompts: list[list[int]], n: int) -> int | None:
    """What the key's minute has for each answer, if nothing else is asked in it."""
    if minute_tokens is None:
        return None
    return (minute_tokens - sum(map(len, prompts))) // (n * len(prompts))


def _max_tokens(fields: dict[str, Any], prompt: int, context: int, spare: int | None, *, chat: bool) -> int:
    """Output tokens: as asked, or what fits (chat) or OpenAI's 16 (completions), but no more than the key ever has to `spare`."""
    room = context - prompt
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    if room < 1:
        raise BadRequest(
            f"the prompt has {prompt} tokens, the context is {context}: nothing is left for an answer",
            param="messages" if chat else "prompt",
            code="context_length_exceeded",
        )
    if name not in fields:
        usual = room if chat else min(room, DEFAULT_COMPLETION_TOKENS)
        return usual if spare is None else max(1, min(usual, spare))
    wanted = integer(fields, name, -(2**63), 2**63, 1)
    if wanted < 1:
        raise BadRequest(f"{name} must be at least 1", param=name)
    if wanted > room:
        raise BadRequest(
            f"the prompt has {prompt} tokens and {name} is {wanted}; the context is {context}",
            param=name,
            code="context_length_exceeded",
        )
    return wanted


def _stream_options(fields: dict[str, Any], stream: bool) -> dict[str, Any]:
    options = fields.get("stream_options")
    if options is None:
        return {}
    if not isinstance(options, dict) or set(options) - STREAM_OPTIONS:
        raise BadRequest(f"stream_options must be an object of {', '.join(sorted(STREAM_OPTIONS))}", param="stream_options")
    if not stream:
        raise BadRequest("stream_options needs stream to be true", param="stream_options")
    return given(options)
