"""`/openapi.json` is true: its schemas and the checks of requests agree, name by name and value by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from common.errors import BadRequest
from gateway.openapi import OPERATIONS, document
from gateway.parameters import CHAT, COMPLETION, HARMLESS, UNSUPPORTED, Limits, parse
from gateway.prompts import Model
from gateway.schemas import Schema, chat_body, completion_body, detokenize_body, tokenize_body
from gateway.tokenize import DETOKENIZE, TOKENIZE, detokenized, tokenized

NAME = "m"
DEADLINE_S = 600.0
HELLO = [{"role": "user", "content": "Hello"}]
SAMPLES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, -2, 10**9, 2**64, -(2**64), 0.5, -0.1, 0.001, 2.5, 1e-300),
    *("", "a", "x" * 500, "x" * 501, "text", "auto", "default", "none", "interactive", "batch", NAME, "other"),
    *(
        [],
        ["a"],
        ["a"] * 16,
        ["a"] * 17,
        ["a"] * 32,
        ["a"] * 33,
        [""],
        ["text"],
        [0],
        [1, 2],
        [-1],
        [True],
        [[1], [2]],
        [[]],
        ["a", [1]],
        [None],
    ),
    *({}, {"type": "text"}, {"a": 1}, {"5": 1}, {"5": -101}, {"5": True}, {"-5": 1}, {"5": None}, {str(n): 0 for n in range(1025)}),
    *({"include_usage": True}, {"include_usage": None}, {"include_usage": 1}, {"include_obfuscation": False}, {"other": 1}),
    *({"continuous_usage_stats": True}, {"continuous_usage_stats": 1}),
    *(
        HELLO,
        HELLO * 3,
        [{"role": "user"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    ),
    *(
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": "a", "name": "b"}],
        [{"role": "user", "content": None}],
    ),
    *([{"role": "assistant", "content": "a", "tool_calls": []}, *HELLO], [{"role": "user", "content": "a", "audio": {"id": 1}}], [5]),
]
WITH: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
    "include_usage": {"stream": True},
}
"""What else has to be said for a parameter to be taken."""


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model(smollm2, NAME)


def limits(schema: Schema) -> list[Any]:
    """Values at, just within and just beyond the limits that a schema states."""
    steps = (-1, 0, 1) if "integer" in schema.get("type", ()) else (-0.01, 0.0, 0.01)
    return [schema[name] + step for name in ("minimum", "maximum") if name in schema for step in steps]


def taken(endpoint: Any, body: dict[str, Any], model: Model) -> bool:
    """Whether the endpoint's own checks take a body; one that is only too long counts as taken."""
    try:
        endpoint(json.dumps(body).encode(), model)
    except BadRequest as error:
        return error.code == "context_length_exceeded"
    return True


def chat(body: bytes, model: Model) -> Any:
    return parse(body, model, Limits(model.context_tokens, DEADLINE_S), chat=True)


def completion(body: bytes, model: Model) -> Any:
    return parse(body, model, Limits(model.context_tokens, DEADLINE_S), chat=False)


BODIES: list[tuple[str, Any, Any, dict[str, Any]]] = [
    ("chat", chat_body, chat, {"model": NAME, "messages": HELLO}),
    ("completion", completion_body, completion, {"model": NAME, "prompt": "Hello"}),
    ("tokenize", tokenize_body, tokenized, {"prompt": "Hello"}),
    ("tokenize messages", tokenize_body, tokenized, {"messages": HELLO}),
    ("detokenize", detokenize_body, detokenized, {"tokens": [1, 2]}),
]


@pytest.mark.parametrize(("describe", "endpoint", "good"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
def test_what_is_described_is_what_is_checked(model: Model, describe: Any, endpoint: Any, good: dict[str, Any]) -> None:
    """Every parameter, with every sample and its own limits: schema and checks say the same."""
    schema = describe(model, DEADLINE_S)
    judge = Draft202012Validator(schema)
    wrong, seen = [], {True: 0, False: 0}
    for name, own in schema["properties"].items():
        extra = {key: value for key, value in WITH.get(name, {}).items() if key in schema["properties"]}
        for sample in [*SAMPLES, *limits(own), *own.get("enum", [])]:
            body = {**good, **extra, name: sample}
            if name in ("max_tokens", "max_completion_tokens") and type(sample) is int and sample > 2**63:
                continue
            if name == "model" and isinstance(sample, str) and sample != NAME:
                continue  # 404
            expected = judge.is_valid(body)
            if name == "best_of":  # it must equal n, which no schema can say
                expected = sample is None or (type(sample) is int and sample == 1)
            found = taken(endpoint, body, model)
            seen[found] += 1
            if found != expected:
                wrong.append((name, sample, "taken" if found else "refused"))
    assert not wrong
    assert min(seen.values()) > 5, "both sides were tried"


def test_every_accepted_parameter_is_described_and_the_reverse(model: Model) -> None:
    described = {row[0]: set(row[1](model, DEADLINE_S)["properties"]) for row in BODIES}
    assert described["chat"] == set(CHAT | set(HARMLESS))
    assert described["completion"] == set(COMPLETION | set(HARMLESS))
    assert (described["tokenize"], described["detokenize"]) == (set(TOKENIZE), set(DETOKENIZE))
    assert not set.union(*described.values()) & UNSUPPORTED


def test_an_unknown_parameter_is_neither_described_nor_taken(model: Model) -> None:
    for _, describe, endpoint, good in BODIES:
        body = {**good, "no_such": 1}
        assert not Draft202012Validator(describe(model, DEADLINE_S)).is_valid(body) and not taken(endpoint, body, model)


def test_defaults_are_those_of_the_checks(model: Model) -> None:
    """Saying the default changes nothing."""
    for _, describe, endpoint, good in BODIES:
        schema = describe(model, DEADLINE_S)
        stated = {name: own["default"] for name, own in schema["properties"].items() if "default" in own}
        for name, value in stated.items():
            if name == "add_special_tokens" and "messages" in good:
                continue
            body = {**good, **WITH.get(name, {}), **({} if name == "seed" else {"seed": 1} if "seed" in schema["properties"] else {})}
            without = endpoint(json.dumps(body).encode(), model)
            assert endpoint(json.dumps({**body, name: value}).encode(), model) == without, name


@pytest.mark.parametrize(("keyed", "local"), [(False, False), (False, True), (True, False)])
def test_the_document_is_whole(model: Model, keyed: bool, local: bool) -> None:
    """Schemas are schemas, references lead somewhere, each component is used, and keys are asked for exactly where they are."""
    found = document(OPERATIONS.values(), model, DEADLINE_S, keyed=keyed, local=local)
    schemas = found["components"]["schemas"]
    for schema in [*schemas.values(), *(row[1](model, DEADLINE_S) for row in BODIES)]:
        Draft202012Validator.check_schema(schema)
    text = json.dumps(found)
    used = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    streamed = {operation.streams for operation in OPERATIONS.values() if operation.streams is not None}
    assert used <= set(schemas) and set(schemas) <= used | streamed
    for operation in OPERATIONS.values():
        entry = found["paths"][operation.path.replace(":path", "")][operation.method.lower()]
        assert ("security" in entry) == ("401" in entry["responses"]) == (keyed and not operation.open)
        assert ("403" in entry["responses"]) == local
    assert ("securitySchemes" in found["components"]) == keyed
    assert len({operation.name for operation in OPERATIONS.values()}) == len(OPERATIONS)
