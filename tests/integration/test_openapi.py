"""`/openapi.json` as served: every route is in it and the reverse, and real replies are what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Mount, Route

from common.errors import Overloaded, Unavailable
from gateway.gate import Access
from gateway.keys import read_keys
from gateway.limits import Meters
from tests.integration.echo_desk import Script
from tests.integration.http_fixtures import NAME, PATIENCE_S, Served, events, serving

KEY = "alice-0123456789abcdef"
HELLO = [{"role": "user", "content": "Hello"}]
PAGE_FILES = {"/"}
"""What browsers fetch for the page (and the mounted files) is not part of the API."""


@pytest.fixture(scope="module")
def served(smollm2: Path) -> Iterator[Served]:
    keys = read_keys(KEY, None)
    assert keys is not None
    with serving(smollm2, Access(keys, Meters(keys.names, 1))) as found:
        yield found


@pytest.fixture(scope="module")
def described(served: Served) -> dict[str, Any]:
    return dict(httpx.get(f"{served.url}/openapi.json", timeout=PATIENCE_S).raise_for_status().json())


def strict(schema: Any) -> Any:
    """The schema, with everything that it does not name forbidden: a reply that says more is not described."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(part) for name, part in schema.items()}
    if "properties" in found and "additionalProperties" not in found:
        found["additionalProperties"] = False
    return found


def fetch(served: Served, method: str, path: str, body: Any = None, *, key: str | None = KEY) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    content = None if body is None else json.dumps(body).encode()
    return httpx.request(method, f"{served.url}{path}", content=content, headers=headers, timeout=PATIENCE_S)


def judge(described: dict[str, Any], path: str, method: str, answer: httpx.Response) -> None:
    """The reply has a status, a type, headers and a body that are described."""
    entry = described["paths"][path][method]["responses"]
    assert str(answer.status_code) in entry, (path, answer.status_code, answer.text)
    reply = entry[str(answer.status_code)]
    media = answer.headers["content-type"]
    named = next(name for name in reply["content"] if media.replace(" ", "").startswith(name.replace(" ", "")))
    for header, about in reply.get("headers", {}).items():
        assert header in answer.headers or not about.get("required"), header
    if media == "application/json":
        valid(described, reply["content"][named]["schema"], answer.json())


def valid(described: dict[str, Any], schema: dict[str, Any], found: Any) -> None:
    Draft202012Validator({**strict(schema), "components": strict(described["components"])}).validate(found)


def test_every_route_is_described_and_the_reverse(served: Served, described: dict[str, Any]) -> None:
    routes = set()
    for route in served.app.routes:
        if isinstance(route, Mount):
            assert route.path == "/page"
            continue
        assert isinstance(route, Route) and route.methods is not None
        if route.path not in PAGE_FILES:
            routes |= {(route.path.replace(":path}", "}"), method.lower()) for method in route.methods - {"HEAD"}}
    assert routes == {(path, method) for path, entry in described["paths"].items() for method in entry}


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ALL: dict[str, Any] = {"n": 3, "timeline": True, "max_tokens": 4}
REPLIES: list[tuple[str, str, str, Any]] = [
    ("GET", "/health", "/health", None),
    ("GET", "/ready", "/ready", None),
    ("GET", "/openapi.json", "/openapi.json", None),
    ("GET", "/metrics", "/metrics", None),
    ("GET", "/fleet", "/fleet", None),
    ("GET", "/fleet/demand", "/fleet/demand", None),
    ("GET", "/fleet", "/fleet?ttft_ms=200&tpot_ms=20&window_s=60", None),
    ("GET", "/fleet", "/fleet?ttft_ms=soon", None),
    ("GET", "/fleet", "/fleet?window_s=1e9", None),
    ("GET", "/v1/models", "/v1/models", None),
    ("GET", "/v1/models/{name}", f"/v1/models/{NAME}", None),
    ("GET", "/v1/models/{name}", "/v1/models/other", None),
    ("POST", "/tokenize", "/tokenize", {"prompt": "Hello", "return_token_strs": True}),
    ("POST", "/tokenize", "/tokenize", {"messages": HELLO}),
    ("POST", "/tokenize", "/tokenize", {}),
    ("POST", "/detokenize", "/detokenize", {"tokens": [100, 2]}),
    ("POST", "/detokenize", "/detokenize", {"tokens": [-1]}),
    ("POST", CHAT, CHAT, {"model": NAME, "messages": HELLO}),
    ("POST", CHAT, CHAT, {"model": NAME, "messages": HELLO, "logprobs": True, "top_logprobs": 2, **ALL}),
    ("POST", CHAT, CHAT, {"model": NAME}),
    ("POST", CHAT, CHAT, {"model": "other", "messages": HELLO}),
    ("POST", TEXT, TEXT, {"model": NAME, "prompt": "Hello"}),
    ("POST", TEXT, TEXT, {"model": NAME, "prompt": ["a", "b"], "logprobs": 2, **ALL}),
    ("POST", TEXT, TEXT, {"model": NAME, "prompt": "x" * (3 << 20)}),
]


@pytest.mark.parametrize(("method", "path", "at", "body"), REPLIES, ids=[f"{row[1]}-{number}" for number, row in enumerate(REPLIES)])
def test_replies_are_as_described(served: Served, described: dict[str, Any], method: str, path: str, at: str, body: Any) -> None:
    served.desk.scripts = lambda ask: Script()
    judge(described, path, method.lower(), fetch(served, method, at, body))


@pytest.mark.parametrize("refused", [Overloaded("full", retry_after_s=2), Unavailable("none"), KeyError("x")])
def test_refusals_are_as_described(served: Served, described: dict[str, Any], refused: Exception) -> None:
    served.desk.scripts = lambda ask: Script(refused=refused)
    judge(described, TEXT, "post", fetch(served, "POST", TEXT, {"model": NAME, "prompt": "a"}))


def test_without_a_key(served: Served, described: dict[str, Any]) -> None:
    for path, entry in described["paths"].items():
        for method, operation in entry.items():
            answer = fetch(served, method.upper(), path.replace("{name}", NAME), {} if method == "post" else None, key=None)
            assert (answer.status_code == 401) == ("security" in operation), path
            judge(described, path, method, answer)


def test_not_ready(served: Served, described: dict[str, Any]) -> None:
    served.desk.live, served.desk.away = {}, True
    try:
        answer = fetch(served, "GET", "/ready")
        assert answer.status_code == 503
        judge(described, "/ready", "get", answer)
    finally:
        served.desk.live, served.desk.away = {"prefill": 1, "decode": 1}, False


@pytest.mark.parametrize(
    ("path", "chunk", "body"),
    [
        (CHAT, "ChatCompletionChunk", {"messages": HELLO, "logprobs": True, "top_logprobs": 1}),
        (TEXT, "CompletionChunk", {"prompt": "Hello", "logprobs": 1}),
    ],
)
def test_events_are_as_described(served: Served, described: dict[str, Any], path: str, chunk: str, body: dict[str, Any]) -> None:
    for error in (None, Unavailable("none")):
        script = Script([100, 101, 102], error=error)
        served.desk.scripts = lambda ask, script=script: script
        asked = {"model": NAME, **body, **ALL, "stream": True, "stream_options": {"include_usage": True}}
        answer = fetch(served, "POST", path, asked)
        judge(described, path, "post", answer)
        *said, last = events(answer.text)
        for one in said:
            valid(described, {"$ref": f"#/components/schemas/{chunk}"}, one)
        assert len(said) >= 3
        if error is None:
            assert last == "[DONE]" and said[-1]["usage"] is not None and any("baton" in one for one in said)
        else:
            valid(described, {"$ref": "#/components/schemas/Error"}, last)
