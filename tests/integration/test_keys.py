"""Keys, limits, other origins and the cap on connections, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.routing import Mount, Route

from common.errors import Unavailable
from gateway.gate import Access
from gateway.keys import read_keys
from gateway.limits import Meters
from gateway.local import local_names
from tests.integration.echo_desk import Script
from tests.integration.http_fixtures import NAME, PATIENCE_S, Served, completion, reply, request, serving

ALICE, BOB, WRONG = "alice-0123456789abcdef", "bob-0123456789abcdef", "wrong-0123456789abcdef"
OPEN = {"/", "/health", "/ready", "/openapi.json"}
RUNNING, A_MINUTE = 3, 500
PAGE = "https://chat.example.org"
END_S = 20
HEALTH = request("/health", b"", method="GET")


def access(running: int | None = RUNNING, a_minute: int | None = A_MINUTE) -> Access:
    keys = read_keys(f"alice:{ALICE},bob:{BOB}", None)
    assert keys is not None
    return Access(keys, Meters(keys.names, running, a_minute))


@pytest.fixture(scope="module")
def gates() -> Access:
    return access()


@pytest.fixture(scope="module")
def server(smollm2: Path, gates: Access) -> Iterator[Served]:
    with serving(smollm2, gates, [PAGE], most=40) as served:
        yield served


@pytest.fixture
def served(server: Served, gates: Access) -> Iterator[Served]:
    """However a test's requests end, nothing of theirs may count any more."""
    server.desk.scripts = lambda ask: Script()
    yield server
    server.hang_up()
    wait_until(lambda: gates.meters["alice"].running == gates.meters["bob"].running == 0)


def wait_until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def client(served: Served, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def post(served: Served, key: str = ALICE, path: str = "/v1/completions", **fields: Any) -> httpx.Response:
    return httpx.post(f"{served.url}{path}", json=completion([100], **fields), headers=bearer(key), timeout=PATIENCE_S)


# ------------------------------------------------------------------------------------------------------------------ keys


def test_with_its_key_openais_client_is_served(served: Served) -> None:
    for key in (ALICE, BOB):
        with client(served, key) as talking:
            assert talking.models.list().data[0].id == NAME
            assert talking.completions.create(model=NAME, prompt=[100, 101]).choices[0].text == served.model.decode([100, 101])


@pytest.mark.parametrize("headers", [{}, {"Authorization": ""}, {"Authorization": ALICE}, {"X-Api-Key": ALICE}, bearer(WRONG)])
def test_without_it_every_route_but_the_open_ones_is_closed(served: Served, headers: dict[str, str]) -> None:
    """Whatever is served later is closed, too, unless this test is told."""
    asked = len(served.desk.asks)
    tried = set()
    for route in served.app.routes:
        if isinstance(route, Mount):
            assert route.path == "/page", "files for everybody"
            continue
        assert isinstance(route, Route)
        path = route.path.replace("{name:path}", NAME)
        tried.add(path)
        for method in sorted(route.methods or ()):
            answer = httpx.request(method, f"{served.url}{path}", headers=headers, content=b"{}", timeout=PATIENCE_S)
            if path in OPEN:
                assert answer.status_code == 200, path
                continue
            assert answer.status_code == 401, path
            challenge = answer.headers["www-authenticate"]
            assert challenge == 'Bearer realm="baton"' + (', error="invalid_token"' if WRONG in str(headers) else "")
            if method != "HEAD":
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["code"] == "invalid_api_key"
                assert WRONG not in answer.text and ALICE not in answer.text
    assert OPEN | {"/metrics", "/tokenize", "/detokenize", "/v1/models", "/v1/completions", "/v1/chat/completions"} <= tried
    assert len(served.desk.asks) == asked


def test_openais_client_sees_an_authentication_error(served: Served) -> None:
    with client(served, WRONG) as talking, pytest.raises(openai.AuthenticationError) as refused:
        talking.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "Hello"}])
    assert refused.value.code == "invalid_api_key"


def test_a_refused_request_leaves_its_connection_usable(served: Served) -> None:
    """Its body was not read; the next request on the connection is."""
    connection = served.connect()
    connection.sendall(request("/v1/completions", b"x" * 300_000))
    assert reply(connection)[0] == 401
    connection.sendall(request("/v1/completions", completion([100]), head=f"Authorization: Bearer {ALICE}\r\n"))
    assert reply(connection)[0] == 200


def test_refusals_are_counted_and_keys_are_not_in_the_figures(served: Served) -> None:
    before = served.outcomes().get("invalid_api_key", 0)
    post(served, WRONG)
    assert served.outcomes()["invalid_api_key"] == before + 1
    text = httpx.get(f"{served.url}/metrics", headers=bearer(ALICE)).text
    assert "baton_requests_total" in text and not any(key in text for key in (ALICE, BOB, WRONG))


# ---------------------------------------------------------------------------------------------------------------- limits


def endless(served: Served, pause_s: float = 0.01) -> None:
    served.desk.scripts = lambda ask: Script([100], endless=True, pause_s=pause_s)


def stream(served: Served, key: str = ALICE, **fields: Any) -> socket.socket:
    """A stream that has begun."""
    connection = served.connect()
    body = completion([100], **{"max_tokens": 2000, "stream": True, **fields})
    connection.sendall(request("/v1/completions", body, head=f"Authorization: Bearer {key}\r\n"))
    assert b" 200 " in connection.recv(65536)
    return connection


def test_requests_at_once_by_key(served: Served, gates: Access) -> None:
    endless(served)
    streams = [stream(served) for _ in range(RUNNING)]
    assert gates.meters["alice"].running == RUNNING
    refused = post(served)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded") and f"{RUNNING} requests at once" in error[
        "message"
    ]
    with client(served, ALICE) as talking:
        with pytest.raises(openai.RateLimitError):
            talking.completions.create(model=NAME, prompt=[100])
        assert talking.models.list().data, "reading costs nothing"
    assert post(served, BOB, max_tokens=3).status_code == 200, "another key is not held up"
    streams[0].close()
    wait_until(lambda: gates.meters["alice"].running == RUNNING - 1)
    assert post(served, max_tokens=3).status_code == 200


ENDS: list[tuple[str, Script, dict[str, Any], int]] = [
    ("whole", Script(), {}, 200),
    ("streamed", Script(), {"stream": True}, 200),
    ("several answers", Script(), {"n": 4, "stream": True}, 200),
    ("bad parameter", Script(), {"temperature": 9}, 400),
    ("refused by the desk", Script(refused=Unavailable("none")), {}, 503),
    ("failed before the first token", Script([1], error=Unavailable("none")), {"stream": True}, 503),
    ("failed in the stream", Script([100, 101], error=Unavailable("none")), {"stream": True}, 200),
    ("broken", Script([1], breaks=True), {}, 500),
    ("broken desk", Script(refused=KeyError("x")), {}, 500),
]


@pytest.mark.parametrize(("script", "fields", "status"), [row[1:] for row in ENDS], ids=[row[0] for row in ENDS])
def test_whatever_the_end_it_is_given_back_once(served: Served, gates: Access, script: Script, fields: dict[str, Any], status: int) -> None:
    """More often than may run at once; giving back twice would fail, too."""
    served.desk.scripts = lambda ask: script
    for _ in range(RUNNING + 2):
        assert post(served, **fields).status_code == status
    wait_until(lambda: gates.meters["alice"].running == 0)


@pytest.mark.parametrize("streaming", [True, False])
def test_clients_that_leave_give_back(served: Served, gates: Access, streaming: bool) -> None:
    endless(served, 0.02)
    for _ in range(3):
        if streaming:
            leaving = [stream(served) for _ in range(RUNNING)]
        else:
            leaving = [served.connect() for _ in range(RUNNING)]
            for connection in leaving:
                body = completion([100], max_tokens=2000)
                connection.sendall(request("/v1/completions", body, head=f"Authorization: Bearer {ALICE}\r\n"))
            wait_until(lambda: gates.meters["alice"].running == RUNNING)
        for connection in leaving:
            connection.close()
        wait_until(lambda: gates.meters["alice"].running == 0)


def test_clients_that_leave_in_mid_body_or_never_send_it_give_back(served: Served, gates: Access) -> None:
    for leave in (True, False):
        halves = [served.connect() for _ in range(RUNNING)]
        for half in halves:
            half.sendall(request("/v1/completions", b"{", length=100, head=f"Authorization: Bearer {ALICE}\r\n"))
        wait_until(lambda: gates.meters["alice"].running == RUNNING)
        assert post(served).status_code == 429
        if leave:
            for half in halves:
                half.close()
        wait_until(lambda: gates.meters["alice"].running == 0)


def test_a_client_that_does_not_read_gives_back(served: Served, gates: Access) -> None:
    served.desk.scripts = lambda ask: Script([100], endless=True)
    connection = served.connect(receive_bytes=4096)
    body = completion([100], max_tokens=2000, stream=True, n=8)
    connection.sendall(request("/v1/completions", body, head=f"Authorization: Bearer {ALICE}\r\n"))
    wait_until(lambda: gates.meters["alice"].running == 1)
    wait_until(lambda: gates.meters["alice"].running == 0)


def test_requests_within_a_minute(smollm2: Path) -> None:
    with serving(smollm2, access(None, 4)) as served:
        assert [post(served).status_code for _ in range(3)] == [200] * 3
        assert post(served, path="/tokenize").status_code == 400, "a wrong request counts like a right one"
        refused = post(served)
        assert refused.status_code == 429 and 50 <= int(refused.headers["retry-after"]) <= 60
        assert post(served, BOB).status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(f"{served.url}{path}", headers=bearer(ALICE)).status_code == 200
        assert served.outcomes()["rate_limit_exceeded"] == 1


# --------------------------------------------------------------------------------------------------------- other origins


def preflight(served: Served, origin: str) -> httpx.Response:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}
    return httpx.options(f"{served.url}/v1/chat/completions", headers={"Origin": origin, **asks})


def test_a_page_of_a_named_origin_may_call(served: Served) -> None:
    allowed = preflight(served, PAGE)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in allowed.headers["access-control-allow-headers"] and "POST" in allowed.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in allowed.headers
    refused = preflight(served, "https://evil.example.org")
    assert refused.status_code == 400 and "access-control-allow-origin" not in refused.headers
    for key, status in ((ALICE, 200), (WRONG, 401)):
        body = completion([100], stream=status == 200)
        answer = httpx.post(f"{served.url}/v1/completions", json=body, headers={**bearer(key), "Origin": PAGE})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
        assert "Server-Timing" in answer.headers["access-control-expose-headers"]
        other = httpx.post(f"{served.url}/v1/completions", json=body, headers={**bearer(key), "Origin": "https://evil.example.org"})
        assert "access-control-allow-origin" not in other.headers


def test_by_default_no_page_of_another_origin_may(smollm2: Path) -> None:
    with serving(smollm2) as served:
        assert preflight(served, PAGE).status_code == 405
        answer = httpx.post(f"{served.url}/v1/completions", json=completion([100]), headers={"Origin": PAGE})
        assert answer.status_code == 200 and not [name for name in answer.headers if name.startswith("access-control")]
    with serving(smollm2, None, ["*"]) as served:
        assert preflight(served, "https://any.example.org").headers["access-control-allow-origin"] == "*"


def test_without_keys_pages_of_elsewhere_cannot_ask(smollm2: Path) -> None:
    """Whatever they ask, and by whatever name; programs and the gateway's own page go on as ever."""
    with serving(smollm2, None, [PAGE], names=local_names("127.0.0.1")) as served:
        own = {"Origin": served.url}
        assert httpx.get(served.url, headers={"Accept": "text/html"}).status_code == 200
        assert httpx.get(f"{served.url}/fleet").status_code == httpx.get(f"{served.url}/page/app.js").status_code == 200
        for headers, status in [({}, 200), (own, 200), ({"Origin": PAGE}, 200), ({"Origin": "https://evil.example.org"}, 403)]:
            asked = len(served.desk.asks)
            body = json.dumps(completion([100]))
            answer = httpx.post(f"{served.url}/v1/completions", content=body, headers={"Content-Type": "text/plain", **headers})
            assert (answer.status_code, len(served.desk.asks) - asked) == (status, int(status == 200))
        assert answer.json()["error"]["code"] == "forbidden" and "cors_origins" in answer.json()["error"]["message"]
        rebound = {"Host": f"evil.example.org:{served.port}", "Origin": f"http://evil.example.org:{served.port}"}
        for path in ("/", "/fleet", "/metrics", "/page/app.js", "/v1/models", "/health"):
            assert httpx.get(f"{served.url}{path}", headers=rebound).status_code == 403
        assert preflight(served, PAGE).headers["access-control-allow-origin"] == PAGE
        assert preflight(served, "https://evil.example.org").status_code == 403
        described = httpx.get(f"{served.url}/openapi.json").json()["paths"]
        assert all("403" in operation["responses"] for entry in described.values() for operation in entry.values())


# ----------------------------------------------------------------------------------------------------------- connections


def test_connections_beyond_the_cap_are_told_so(served: Served) -> None:
    held = []
    for _ in range(40):
        held.append(served.connect())
        held[-1].sendall(request("/health", b"", method="GET"))
        assert reply(held[-1])[0] == 200
    over = served.connect()
    over.sendall(request("/v1/models", b"", method="GET"))
    status, headers, body = reply(over)
    assert status == 503 and headers["connection"] == "close" and int(headers["retry-after"]) > 0
    assert json.loads(body)["error"]["type"] == "service_unavailable_error" and over.recv(1) == b""
    silent = served.connect()
    begin = time.monotonic()
    assert silent.recv(1) == b"" and time.monotonic() - begin < 5
    probe = served.connect()
    probe.sendall(request("/health", b"", method="GET"))
    assert reply(probe)[0] == 200, "a full gateway is not a dead one"
    held[0].sendall(request("/v1/models", b"", method="GET", head=f"Authorization: Bearer {ALICE}\r\n"))
    assert reply(held[0])[0] == 200, "those who are in are served"
    for connection in held:
        connection.close()
    wait_until(lambda: httpx.get(f"{served.url}/v1/models", headers=bearer(ALICE)).status_code == 200)


def test_health_is_no_way_around_the_cap(smollm2: Path) -> None:
    """Neither for what stands behind it, nor for as long as one likes."""
    with serving(smollm2, most=1) as served:

        def stays() -> bool:
            served.hang_up()
            held = served.connect()
            held.sendall(HEALTH)
            return reply(held)[1].get("connection") != "close"

        wait_until(stays)
        asked = len(served.desk.asks)
        over = served.connect()
        over.sendall(HEALTH + request("/v1/completions", completion([100])))
        status, headers, body = reply(over)
        assert (status, headers["connection"], json.loads(body)) == (200, "close", {"status": "ok"})
        begin = time.monotonic()
        with suppress(ConnectionResetError):
            while over.recv(65536):
                pass
        assert time.monotonic() - begin < 5 and len(served.desk.asks) == asked


def test_a_flood_of_connections_is_cut(served: Served) -> None:
    """Far beyond the cap nothing is said any more; when the flood is over the gateway serves as before."""
    flood = [served.connect() for _ in range(300)]
    dead = 0
    for connection in reversed(flood):
        try:
            dead += connection.recv(1) == b""
        except ConnectionResetError:
            dead += 1
    assert dead == 300
    assert post(served).status_code == 200


def test_the_async_client_with_200_streams_at_once(smollm2: Path) -> None:
    async def talk(served: Served) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=ALICE, max_retries=0, timeout=PATIENCE_S) as talking:

            async def one(number: int) -> str:
                parts = await talking.completions.create(model=NAME, prompt=[100 + number] * 8, stream=True)
                return "".join([part.choices[0].text async for part in parts])

            return await asyncio.gather(*(one(number) for number in range(200)))

    with serving(smollm2, access(200, None)) as served:
        served.desk.scripts = lambda ask: Script(pause_s=0.05)
        texts = asyncio.run(talk(served))
        assert texts == [served.model.decode([100 + number] * 8) for number in range(200)]


# --------------------------------------------------------------------------------------------------- the process' settings


@pytest.mark.parametrize(
    ("flags", "variables", "words"),
    [
        (["--http-host", "0.0.0.0"], {}, "http_host is '0.0.0.0' and there are no API keys"),
        (["--http-host", "0.0.0.0", "--allow-anonymous", "sure"], {}, "allow_anonymous is 'sure'; it must be one of loopback, anyone"),
        ([], {"BATON_API_KEYS": "alice:short"}, "less than 16 characters"),
        (["--api-keys-file", "/no/such/file"], {}, "api_keys_file is '/no/such/file'; it cannot be read"),
        (["--key-running", "3"], {}, "key_running is set, but there are no keys"),
        (["--cors-origins", "chat.example.org"], {}, "cors_origins holds 'chat.example.org'"),
    ],
)
def test_a_bad_setting_is_one_line(smollm2: Path, flags: list[str], variables: dict[str, str], words: str) -> None:
    command = [sys.executable, "-m", "gateway", "--model", str(smollm2), "--http-port", "0", *flags]
    ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=END_S)
    assert (ended.returncode, ended.stdout) == (2, "")
    [line] = ended.stderr.splitlines()
    assert line.startswith("gateway: ") and words in line and "alice:short" not in line


# ------------------------------------------------------------------------------------------- what one key may use besides


def test_tokens_that_a_client_does_not_take_count(smollm2: Path) -> None:
    """They have been computed: a key's limit cannot be had for nothing by leaving them unread."""
    keys = read_keys(f"alice:{ALICE} tokens=40", None)
    assert keys is not None
    with serving(smollm2, Access(keys, Meters(keys.names, own=keys.allowances))) as served:
        served.desk.scripts = lambda ask: Script([100], endless=True, pause_s=0.01, ahead=30)
        stream(served, max_tokens=39).close()
        assert served.desk.answers[-1].cancelled.wait(PATIENCE_S)
        assert post(served, max_tokens=30).status_code == 429


def test_what_nobody_has_named_fits_into_the_key_s_minute(smollm2: Path) -> None:
    """A chat without `max_tokens` would otherwise ask for the whole context, and be refused for ever."""
    keys = read_keys(f"alice:{ALICE} tokens=100", None)
    assert keys is not None
    with serving(smollm2, Access(keys, Meters(keys.names, own=keys.allowances))) as served:
        body = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}]}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=bearer(ALICE), timeout=PATIENCE_S)
        assert answer.status_code == 200
        [asked] = served.desk.asks
        assert len(asked.prompt) + asked.max_tokens == 100


def test_tokens_and_priority_are_the_key_s(smollm2: Path) -> None:
    listed = f"alice:{ALICE} tokens=40 priority,bob:{BOB}"
    keys = read_keys(listed, None)
    assert keys is not None
    with serving(smollm2, Access(keys, Meters(keys.names, own=keys.allowances))) as served:
        served.desk.scripts = lambda ask: Script([100])
        assert post(served, service_tier="priority", max_tokens=30).status_code == 200
        assert served.desk.asks[-1].job_class == "priority"
        assert post(served, max_tokens=30).status_code == 200, "what was not used has been given back"
        assert post(served, max_tokens=30).status_code == 200
        refused = post(served, max_tokens=40)
        assert refused.status_code == 400 and "40 within a minute" in refused.json()["error"]["message"]
        refused = post(served, max_tokens=38)
        assert refused.status_code == 429 and 55 < int(refused.headers["Retry-After"]) <= 61
        assert (refused.json()["error"]["code"], served.outcomes()["rate_limit_exceeded"]) == ("rate_limit_exceeded", 1)
        assert post(served, BOB, max_tokens=2000).status_code == 200
        refused = post(served, BOB, service_tier="priority")
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "service_tier"
