"""Bad input over raw sockets: the right 4xx in OpenAI's format, and the next request works."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.server import MOST_HEADERS
from tests.integration.echo_desk import Script
from tests.integration.http_fixtures import BODY_S, HEAD_S, MOST_BYTES, NAME, PATIENCE_S, Served, completion, reply, request, serving

GOOD = completion([100, 101, 102], max_tokens=10)
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Served]:
    with serving(smollm2) as served:
        yield served


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    server.desk.scripts = lambda ask: Script()
    yield server
    server.hang_up()


def assert_works(served: Served, connection: socket.socket) -> None:
    """On the same connection and on a new one."""
    served.desk.scripts = lambda ask: Script()
    for where in (connection, served.connect()):
        where.sendall(request(TEXT, GOOD))
        status, _, body = reply(where)
        assert status == 200 and json.loads(body)["choices"][0]["text"] == served.model.decode([100, 101, 102])
        where.close()


def fields(**more: Any) -> bytes:
    return json.dumps({**GOOD, **more}).encode()


def message(**more: Any) -> bytes:
    return json.dumps({"model": NAME, "messages": [{"role": "user", "content": "Hello"}], **more}).encode()


BAD: list[tuple[str, str, bytes, int, str | None, str | None]] = [
    # what, path, body, status, param, code
    ("nothing", TEXT, b"", 400, None, None),
    ("not JSON", TEXT, b"{model:", 400, None, None),
    ("a form", TEXT, b"model=x&prompt=y", 400, None, None),
    ("a list", TEXT, b"[1]", 400, None, None),
    ("nested for ever", TEXT, b'{"model": ' + b"[" * 500_000, 400, None, None),
    ("invalid UTF-8", TEXT, b'{"model": "smollm2", "prompt": "\xc3\x28"}', 400, None, None),
    ("half a surrogate in the prompt", TEXT, fields(prompt="\ud800"), 400, "prompt", None),
    ("half a surrogate in a message", CHAT, message(messages=[{"role": "user", "content": "\udfff"}]), 400, "messages", None),
    ("half a surrogate as a field", TEXT, fields(**{"\ud800": 1}), 400, "\\ud800", "unknown_parameter"),
    ("half a surrogate as the model", TEXT, fields(model="\ud800"), 404, "model", "model_not_found"),
    ("a field of 100,000 letters", TEXT, fields(**{"x" * 100_000: 1}), 400, "x" * 500 + "…", "unknown_parameter"),
    ("an unknown field", TEXT, fields(no_such=1), 400, "no_such", "unknown_parameter"),
    ("an unknown model", TEXT, fields(model="gpt-9"), 404, "model", "model_not_found"),
    ("no model", TEXT, fields(model=None), 400, "model", None),
    ("an empty prompt", TEXT, fields(prompt=""), 400, "prompt", None),
    ("no prompt", TEXT, fields(prompt=None), 400, "prompt", None),
    ("no messages", CHAT, message(messages=[]), 400, "messages", None),
    ("a message of the wrong type", CHAT, message(messages=[5]), 400, "messages[0]", None),
    ("wrong type", TEXT, fields(max_tokens="five"), 400, "max_tokens", None),
    ("negative", TEXT, fields(max_tokens=-5), 400, "max_tokens", None),
    ("huge", TEXT, fields(max_tokens=10**400), 400, "max_tokens", None),
    ("more digits than Python reads", TEXT, b'{"model": "smollm2", "prompt": "x", "seed": ' + b"1" * 5000 + b"}", 400, None, None),
    ("1e400", TEXT, b'{"model": "smollm2", "prompt": "x", "temperature": 1e400}', 400, "temperature", None),
    ("NaN", TEXT, b'{"model": "smollm2", "prompt": "x", "temperature": NaN}', 400, None, None),
    ("an id beyond the vocabulary", TEXT, fields(prompt=[49152]), 400, "prompt", None),
    ("too many prompts", TEXT, fields(prompt=["a"] * 33), 400, "prompt", None),
    ("too many answers", CHAT, message(n=33), 400, "n", None),
    ("best of many", TEXT, fields(best_of=3), 400, "best_of", "unsupported_parameter"),
    ("a deadline beyond the server's", TEXT, fields(deadline=1e9), 400, "deadline", None),
    ("tools", CHAT, message(tools=[{"type": "function"}]), 400, "tools", "unsupported_parameter"),
    ("beyond the context", TEXT, fields(max_tokens=2048), 400, "max_tokens", "context_length_exceeded"),
    ("a prompt of 100,000 ids", TEXT, fields(prompt=[100] * 100_000), 400, "prompt", "context_length_exceeded"),
    ("a prompt of 100,000 words", TEXT, fields(prompt="word " * 100_000), 400, "prompt", "context_length_exceeded"),
    (
        "messages of 100,000 words",
        CHAT,
        message(messages=[{"role": "user", "content": "a b " * 50_000}]),
        400,
        "messages",
        "context_length_exceeded",
    ),
    ("a large body", TEXT, fields(prompt="x" * (MOST_BYTES + 1)), 413, None, None),
    ("10 MB", TEXT, fields(prompt="x" * 10_000_000), 413, None, None),
    ("no such path", "/v1/nothing", b"{}", 404, None, "not_found"),
    ("wrong method", "/v1/models", b"{}", 405, None, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input(served: Served, path: str, body: bytes, status: int, param: str | None, code: str | None) -> None:
    connection = served.connect()
    asked = len(served.desk.asks)
    connection.sendall(request(path, body))
    found, headers, text = reply(connection)
    error = json.loads(text)["error"]
    assert (found, error["param"], error["code"]) == (status, param, code), error
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"] == "invalid_request_error"
    assert headers["content-type"] == "application/json" and len(text) < 2000
    assert len(served.desk.asks) == asked
    if status == 413:
        assert headers["connection"] == "close" and connection.recv(1) == b""
        connection = served.connect()
    assert_works(served, connection)


def test_a_huge_announcement_is_refused_unread(served: Served) -> None:
    connection = served.connect()
    connection.sendall(request(TEXT, b"{", length=10**15))
    status, headers, _ = reply(connection)
    assert status == 413 and headers["connection"] == "close"
    assert_works(served, served.connect())


def test_a_polite_client_is_refused_before_it_sends(served: Served) -> None:
    connection = served.connect()
    connection.sendall(request(TEXT, b"", length=MOST_BYTES + 1, head="Expect: 100-continue\r\n"))
    assert reply(connection)[0] == 413
    assert_works(served, served.connect())


def test_a_large_body_in_chunks(served: Served) -> None:
    """Nothing announces its length."""

    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 65536

    answer = httpx.post(f"{served.url}{TEXT}", content=parts(), timeout=PATIENCE_S)
    assert answer.status_code == 413 and "limit" in answer.json()["error"]["message"]
    assert_works(served, served.connect())


def test_openais_client_sees_413_and_405(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        with pytest.raises(openai.APIStatusError) as large:
            client.completions.create(model=NAME, prompt="x" * 10_000_000)
        assert large.value.status_code == 413
        with pytest.raises(openai.APIStatusError) as wrong:
            client.delete("/models", cast_to=httpx.Response)
        assert wrong.value.status_code == 405
        assert client.completions.create(model=NAME, prompt=[100], max_tokens=5).choices[0].text


def test_any_content_type_is_taken(served: Served) -> None:
    answer = httpx.post(f"{served.url}{TEXT}", content=json.dumps(GOOD), headers={"Content-Type": "text/plain"}, timeout=PATIENCE_S)
    assert answer.status_code == 200


@pytest.mark.parametrize("nonsense", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"hello\r\n\r\n", b"\x00" * 100])
def test_what_is_not_http(served: Served, nonsense: bytes) -> None:
    connection = served.connect()
    connection.sendall(nonsense)
    status, _, body = reply(connection)
    assert status == 400 and json.loads(body)["error"]["type"] == "invalid_request_error"
    assert_works(served, served.connect())


def test_an_endless_head(served: Served) -> None:
    connection = served.connect()
    begin = time.monotonic()
    connection.sendall(b"GET /health HTTP/1.1\r\n" + (b"X-Filler: " + b"x" * 1000 + b"\r\n") * 66)
    status, headers, _ = reply(connection)
    assert status == 431 and headers["connection"] == "close" and time.monotonic() - begin < HEAD_S / 2
    assert_works(served, served.connect())


def test_a_head_of_very_many_headers(served: Served) -> None:
    """Each costs the parser more than its bytes."""
    connection = served.connect()
    connection.sendall(b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * MOST_HEADERS + b"\r\n")
    assert reply(connection)[0] == 200
    connection.sendall(b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * (MOST_HEADERS + 1) + b"\r\n")
    status, headers, _ = reply(connection)
    assert status == 431 and headers["connection"] == "close"
    assert_works(served, served.connect())


def test_bodies_of_others_may_fill_the_room_for_large_ones_only(served: Served) -> None:
    large = json.dumps({**GOOD, "prompt": "x" * (MOST_BYTES - 1000)})
    for _ in range(20):
        stalled = served.connect()
        stalled.sendall(request(TEXT, b"x" * (MOST_BYTES - 1), length=MOST_BYTES))
        answer = httpx.post(f"{served.url}{TEXT}", content=large, timeout=PATIENCE_S)
        if answer.status_code == 503:
            break
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5" and answer.headers["connection"] == "close"
    assert_works(served, served.connect())
    served.hang_up()
    give_up = time.monotonic() + PATIENCE_S
    while httpx.post(f"{served.url}{TEXT}", content=large, timeout=PATIENCE_S).status_code != 400:
        assert time.monotonic() < give_up, "it is longer than the context, once it is read"


FILLERS = {"lines": (b"X-Filler: " + b"x" * 1000 + b"\r\n") * 200, "one line": b"X-Filler: " + b"x" * 400_000}


@pytest.mark.parametrize("filler", FILLERS.values(), ids=FILLERS)
def test_endless_trailers(served: Served, filler: bytes) -> None:
    connection = served.connect()
    begin = time.monotonic()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
    with suppress(ConnectionError):
        connection.sendall(filler)
    status, headers, _ = reply(connection)
    assert status == 431 and headers["connection"] == "close" and time.monotonic() - begin < BODY_S / 2
    assert_works(served, served.connect())


@pytest.mark.parametrize("filler", FILLERS.values(), ids=FILLERS)
def test_an_endless_head_behind_a_request_that_runs(served: Served, filler: bytes) -> None:
    """Nothing can be said amid an answer: the connection ends."""
    connection = streaming(served)
    begin = time.monotonic()
    with suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\n" + filler)
    assert_ends(connection)
    assert time.monotonic() - begin < HEAD_S / 2
    assert served.desk.answers[-1].cancelled.wait(PATIENCE_S)
    assert_works(served, served.connect())


def test_half_a_head_behind_a_request_that_runs_is_not_awaited_for_ever(served: Served) -> None:
    connection = streaming(served)
    begin = time.monotonic()
    connection.sendall(b"GET /health HTTP/1.1\r\nX-Half")
    assert_ends(connection)
    assert 0.5 * HEAD_S < time.monotonic() - begin < HEAD_S + 5


def test_requests_behind_one_that_runs_are_served_in_turn(served: Served) -> None:
    """However long that takes: a head that cannot be read yet, because of a body before it, is not late."""
    served.desk.scripts = lambda ask: Script(before_s=1.5 * HEAD_S)
    connection = served.connect()
    connection.sendall(request(TEXT, GOOD))
    time.sleep(0.2)
    connection.sendall(request("/v1/nothing", b"x" * 100_000) + b"GET /hea")
    assert reply(connection)[0] == 200
    connection.sendall(b"lth HTTP/1.1\r\nHost: x\r\n\r\n")
    rest = b""
    while b'{"status":"ok"}' not in rest:
        more = connection.recv(65536)
        assert more, rest
        rest += more


def test_a_flood_behind_a_request_that_runs(served: Served) -> None:
    """A request of thirty bytes takes a hundred times that once it is parsed."""
    connection = streaming(served)
    begin = time.monotonic()
    connection.sendall(request("/health", b"", method="GET") * 500)
    assert_ends(connection)
    assert time.monotonic() - begin < HEAD_S


def test_tiny_chunks_are_no_head(served: Served) -> None:
    """The framing of a body counts for nothing, however much of it there is."""
    text = fields(prompt=" " * 20_000 + "x", max_tokens=1)
    connection = served.connect()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    connection.sendall(b"".join(b"1\r\n%c\r\n" % one for one in text) + b"0\r\n\r\n")
    assert reply(connection)[0] in (200, 400)
    assert_works(served, connection)


def streaming(served: Served) -> socket.socket:
    """A connection on which an answer has begun that takes long."""
    served.desk.scripts = lambda ask: Script([100], endless=True, pause_s=0.01)
    connection = served.connect()
    connection.sendall(request(TEXT, {**GOOD, "max_tokens": 2000, "stream": True}))
    assert b" 200 " in connection.recv(65536)
    return connection


def assert_ends(connection: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while connection.recv(65536):
            pass


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHost:", b"\r\n"])
def test_a_connection_that_never_asks_is_closed(served: Served, sent: bytes) -> None:
    connection = served.connect()
    begin = time.monotonic()
    connection.sendall(sent)
    assert connection.recv(1) == b""
    assert 0.5 * HEAD_S < time.monotonic() - begin < HEAD_S + 5
    assert_works(served, served.connect())


def test_a_head_begun_on_a_used_connection_is_not_awaited_for_ever(served: Served) -> None:
    connection = served.connect()
    connection.sendall(request("/health", b"", method="GET"))
    assert reply(connection)[0] == 200
    time.sleep(1.5 * HEAD_S)
    begin = time.monotonic()
    connection.sendall(b"GET /hea")
    assert connection.recv(1) == b""
    assert 0.5 * HEAD_S < time.monotonic() - begin < HEAD_S + 5


def test_a_body_that_does_not_come_is_given_up(served: Served) -> None:
    connection = served.connect()
    begin = time.monotonic()
    connection.sendall(request(TEXT, b'{"model"', length=1000))
    status, headers, body = reply(connection)
    assert status == 408 and headers["connection"] == "close" and "complete" in json.loads(body)["error"]["message"]
    assert BODY_S * 0.5 < time.monotonic() - begin < BODY_S + 5
    assert_works(served, served.connect())


def test_a_client_that_leaves_in_mid_body(served: Served) -> None:
    connection = served.connect()
    connection.sendall(request(TEXT, b'{"model"', length=1000))
    connection.close()
    assert_works(served, served.connect())


def test_many_half_open_connections_do_no_harm(served: Served) -> None:
    half = [served.connect() for _ in range(100)]
    for connection in half:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
    assert_works(served, served.connect())
    for connection in half:
        assert connection.recv(1) == b""


def test_a_body_for_a_path_that_does_not_read_it(served: Served) -> None:
    """Its rest is not taken for the next head."""
    connection = served.connect()
    connection.sendall(request("/v1/nothing", b"", length=500_000))
    assert reply(connection)[0] == 404
    for _ in range(5):
        connection.sendall(b"x" * 100_000)
    assert_works(served, connection)


def test_a_long_prompt_does_not_stall_others(served: Served) -> None:
    """While a text of half a megabyte is tokenised (refused only then), a stream goes on. A stall of the machine spoils a try, a blocked
    loop each of them."""
    gaps = [longest_gap(served) for _ in range(5)]
    assert sorted(gaps)[2] < 0.25, gaps


def longest_gap(served: Served) -> float:
    """Of a stream, while a long prompt is tokenised."""
    served.desk.scripts = lambda ask: Script([100], endless=True, pause_s=0.01)
    moments = []
    with httpx.stream("POST", f"{served.url}{TEXT}", json={**GOOD, "max_tokens": 2000, "stream": True}, timeout=PATIENCE_S) as stream:
        lines = stream.iter_lines()
        next(lines)
        long = served.connect()
        long.sendall(request(TEXT, fields(prompt="ab, " * 40_000)))
        long.settimeout(0.0)
        answered = b""
        while not answered:
            next(lines)
            moments.append(time.monotonic())
            with suppress(BlockingIOError):
                answered = long.recv(65536)
    long.settimeout(PATIENCE_S)
    while not answered.endswith(b"}"):  # its body may come by itself
        more = long.recv(65536)
        assert more, answered
        answered += more
    assert b" 400 " in answered and b"context_length_exceeded" in answered
    long.close()
    assert len(moments) > 5
    return max(b - a for a, b in pairwise(moments))
