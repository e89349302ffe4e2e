"""`/tokenize` and `/detokenize` over real HTTP: the ids that the model gets, and their text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.http_fixtures import MOST_BYTES, NAME, PATIENCE_S, Served, request, serving
from tests.integration.http_fixtures import reply as raw_reply

TEXTS = ["Hello, world", " two  spaces\n\n", "日本 🦜 ẞ", "<|im_start|>user", "\u0000\x7f", ""]
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def served(smollm2: Path) -> Iterator[Served]:
    with serving(smollm2) as found:
        yield found


def ask(served: Served, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = httpx.post(f"{served.url}{path}", content=content, timeout=PATIENCE_S)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_becomes_ids_and_they_become_the_text(served: Served, text: str) -> None:
    status, tokens = ask(served, "/tokenize", {"model": NAME, "prompt": text, "return_token_strs": True})
    assert status == 200 and tokens["tokens"] == served.model.encode(text)
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == served.model.context_tokens
    assert len(tokens["token_strs"]) == tokens["count"]
    assert ask(served, "/detokenize", {"tokens": tokens["tokens"]}) == (200, {"prompt": text})


def test_messages_become_what_chat_sends_to_the_model(served: Served) -> None:
    status, tokens = ask(served, "/tokenize", {"messages": TALK})
    httpx.post(f"{served.url}/v1/chat/completions", json={"model": NAME, "messages": TALK}, timeout=PATIENCE_S).raise_for_status()
    assert status == 200 and tokens["tokens"] == served.desk.asks[-1].prompt and "token_strs" not in tokens
    _, text = ask(served, "/detokenize", {"tokens": tokens["tokens"]})
    assert text["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n") and text["prompt"].endswith("<|im_start|>assistant\n")


def test_a_text_beyond_the_context_is_counted(served: Served) -> None:
    """How much too long it is, is what one wants to know."""
    status, tokens = ask(served, "/tokenize", {"prompt": "word " * 9000})
    assert status == 200 and tokens["count"] > tokens["max_model_len"]


BAD: list[tuple[str, str, Any, int, str | None, str | None]] = [
    ("not JSON", "/tokenize", b"{", 400, None, None),
    ("a list", "/detokenize", b"[1]", 400, None, None),
    ("neither", "/tokenize", {}, 400, "prompt", None),
    ("both", "/tokenize", {"prompt": "a", "messages": TALK}, 400, "prompt", None),
    ("ids to ids", "/tokenize", {"prompt": [1]}, 400, "prompt", None),
    ("half a surrogate", "/tokenize", b'{"prompt": "\\ud800"}', 400, "prompt", None),
    ("a bad message", "/tokenize", {"messages": [5]}, 400, "messages[0]", None),
    ("special with messages", "/tokenize", {"messages": TALK, "add_special_tokens": False}, 400, "add_special_tokens", None),
    ("a flag that is none", "/tokenize", {"prompt": "a", "return_token_strs": 1}, 400, "return_token_strs", None),
    ("far too long", "/tokenize", {"prompt": "x " * 500_000}, 400, "prompt", "context_length_exceeded"),
    ("too large", "/tokenize", {"prompt": "x" * (MOST_BYTES + 1)}, 413, None, None),
    ("no ids", "/detokenize", {}, 400, "tokens", None),
    ("a truth as id", "/detokenize", {"tokens": [True]}, 400, "tokens", None),
    ("an id below", "/detokenize", {"tokens": [-1]}, 400, "tokens", None),
    ("an id beyond", "/detokenize", {"tokens": [5, 49152]}, 400, "tokens", None),
    ("too many ids", "/detokenize", {"tokens": [5] * 100_000}, 400, "tokens", "context_length_exceeded"),
    ("another model", "/tokenize", {"model": "gpt-9", "prompt": "a"}, 404, "model", "model_not_found"),
    ("a model that is no name", "/detokenize", {"model": 5, "tokens": [1]}, 400, "model", None),
    ("an unknown field", "/detokenize", {"tokens": [1], "no_such": 1}, 400, "no_such", "unknown_parameter"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(served: Served, path: str, body: Any, status: int, param: str | None, code: str | None) -> None:
    found, answer = ask(served, path, body)
    error = answer["error"]
    assert (found, error["param"], error["code"]) == (status, param, code), error
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"] == "invalid_request_error"


def test_a_body_that_does_not_come_is_given_up(served: Served) -> None:
    connection = served.connect()
    connection.sendall(request("/tokenize", b"{", length=100))
    assert raw_reply(connection)[0] == 408
    served.hang_up()
