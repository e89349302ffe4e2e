"""Clients that leave, do not read, or wait long: each is noticed in bounded time and harms nobody else."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from common.errors import Unavailable
from gateway import answers, sse
from gateway.ask import Ask
from tests.integration.echo_desk import EchoAnswer, Script
from tests.integration.http_fixtures import PATIENCE_S, WRITE_S, Served, completion, events, reply, request, serving

pytestmark = pytest.mark.system

PROMPTLY_S = 3.0
TEXT = "/v1/completions"
SLOW, FAST, SILENT = 100, 101, 102
"""First id of a prompt: which script it gets."""
SCRIPTS = {
    SLOW: Script([200], endless=True, together=100),
    FAST: Script([200], endless=True, pause_s=0.005),
    SILENT: Script([200], before_s=60),
}


def script(ask: Ask) -> Script:
    return SCRIPTS[ask.prompt[0]]


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Served]:
    with serving(smollm2) as served:
        yield served


@pytest.fixture
def served(server: Served) -> Iterator[Served]:
    server.desk.answers.clear()
    server.desk.scripts = script
    yield server
    server.hang_up()
    for answer in server.desk.answers:
        assert answer.cancelled.wait(PATIENCE_S), "every answer is let go of"


def asked(kind: int, **fields: object) -> bytes:
    return request(TEXT, completion([kind], max_tokens=1500, **fields))


def answer_of(served: Served) -> EchoAnswer:
    """The first answer, once it runs."""
    give_up = time.monotonic() + PATIENCE_S
    while not served.desk.answers:
        assert time.monotonic() < give_up
        time.sleep(0.005)
    return served.desk.answers[0]


def close(connection: socket.socket) -> None:
    connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def shut(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("leave", [close, reset, shut])
@pytest.mark.parametrize("kind", [SILENT, FAST])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(served: Served, stream: bool, kind: int, leave: Callable[[socket.socket], None]) -> None:
    """Whole or streamed, before the first token or after it."""
    before = served.outcomes().get("cancelled", 0)
    connection = served.connect()
    connection.sendall(asked(kind, stream=stream))
    answer = answer_of(served)
    if stream and kind == FAST:
        assert connection.recv(100)
    assert not answer.cancelled.is_set()
    begin = time.monotonic()
    leave(connection)
    assert answer.cancelled.wait(PROMPTLY_S), "not cancelled"
    assert time.monotonic() - begin < PROMPTLY_S and not answer.complete
    given = answer.given
    time.sleep(0.1)
    assert answer.given == given, "it runs on"
    assert served.outcomes()["cancelled"] == before + 1


def test_a_slow_reader_slows_only_itself(served: Served) -> None:
    slow = served.connect(receive_bytes=4096)
    slow.sendall(asked(SLOW, stream=True, logprobs=20))
    assert slow.recv(10)
    begin = time.monotonic()
    with httpx.stream("POST", f"{served.url}{TEXT}", json=completion([FAST], max_tokens=100, stream=True), timeout=PATIENCE_S) as fast:
        said = events("\n".join(fast.iter_lines()))
    assert said[-1] == "[DONE]" and len(said) == 101
    assert time.monotonic() - begin < WRITE_S
    assert not served.desk.answers[0].complete, "the slow one waits for its client"


def test_a_slow_reader_gets_everything(served: Served) -> None:
    connection = served.connect(receive_bytes=4096)
    connection.sendall(asked(SLOW, stream=True, logprobs=20))
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        data += connection.recv(65536)
        time.sleep(0.005)
    assert data.count(b"data: ") == 16 and b"[DONE]" in data and served.desk.answers[0].complete


def test_a_client_that_never_reads_is_given_up(served: Served) -> None:
    """More than the kernel's buffers hold, and nobody takes it."""
    connection = served.connect(receive_bytes=4096)
    connection.sendall(request(TEXT, completion([SLOW], max_tokens=2000, stream=True, logprobs=20)))
    begin = time.monotonic()
    answer = answer_of(served)
    assert answer.cancelled.wait(PATIENCE_S)
    assert 0.5 * WRITE_S < time.monotonic() - begin < WRITE_S + 5
    assert not answer.complete


def test_silence_is_filled_with_comments(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before the first token: the head is not held back for ever."""
    for module in (answers, sse):
        monkeypatch.setattr(module, "KEEP_ALIVE_S", 0.1)
    monkeypatch.setitem(SCRIPTS, SILENT, Script([200, 201], before_s=2.05, pause_s=1.05))
    with httpx.stream("POST", f"{served.url}{TEXT}", json=completion([SILENT], stream=True), timeout=PATIENCE_S) as stream:
        lines = [line for line in stream.iter_lines() if line]
    kinds = "".join("d" if line.startswith("data: ") else "c" for line in lines)
    assert all(line == ": keep-alive" for line in lines if not line.startswith("data: "))
    first, second = kinds.index("d"), kinds.index("d", kinds.index("d") + 1)
    assert 1 <= first <= 20 and 1 <= second - first - 1 <= 10, kinds


def test_an_error_after_long_silence_comes_in_the_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (answers, sse):
        monkeypatch.setattr(module, "KEEP_ALIVE_S", 0.1)
    monkeypatch.setitem(SCRIPTS, SILENT, Script([], before_s=2.0, together=100, error=Unavailable("all dead")))
    stream = httpx.post(f"{served.url}{TEXT}", json=completion([SILENT], stream=True), timeout=PATIENCE_S)
    assert stream.status_code == 200 and events(stream.text)[-1]["error"]["message"] == "all dead"


def test_many_streams_at_once_are_not_crossed(served: Served) -> None:
    served.desk.scripts = lambda ask: Script([*ask.prompt] * 20, pause_s=0.002)
    texts: dict[int, str] = {}

    def listen(number: int) -> None:
        body = completion([number], max_tokens=20, stream=True)
        text = httpx.post(f"{served.url}{TEXT}", json=body, timeout=PATIENCE_S).text
        texts[number] = "".join(one["choices"][0]["text"] for one in events(text)[:-1])

    threads = [threading.Thread(target=listen, args=(number,)) for number in range(300, 332)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert texts == {number: served.model.decode([number] * 20) for number in range(300, 332)}


def test_requests_follow_each_other_on_one_connection(served: Served) -> None:
    """Also sent before the first is answered."""
    served.desk.scripts = lambda ask: Script()
    connection = served.connect()
    connection.sendall(request(TEXT, completion([300])) + request(TEXT, completion([301])))
    texts = []
    data = b""
    while data.count(b'"usage"') < 2:
        data += connection.recv(65536)
    for part in data.split(b"\r\n\r\n")[1:]:
        texts.append(json.JSONDecoder().raw_decode(part.decode())[0]["choices"][0]["text"])
    assert texts == [served.model.decode([300]), served.model.decode([301])]


def test_a_stopping_server_lets_go_of_its_streams(smollm2: Path) -> None:
    with serving(smollm2) as served:
        served.desk.scripts = script
        connection = served.connect()
        connection.sendall(asked(FAST, stream=True))
        assert connection.recv(100)
        answer = answer_of(served)
        served.server.stop()
        assert answer.cancelled.wait(PATIENCE_S)
        connection.close()


def test_a_draining_server_lets_slow_clients_read_to_the_end(smollm2: Path) -> None:
    """Their answers are complete, and not all of it has been sent: the second that a stopped server gave them was too short."""
    with serving(smollm2) as served:
        served.desk.scripts = lambda ask: Script(endless=True, pause_s=0.02)
        connection = served.connect(receive_bytes=4096)
        connection.sendall(request(TEXT, completion([300], max_tokens=150, stream=True)))
        data = connection.recv(100)
        served.server.stop(PATIENCE_S)
        while more := connection.recv(65536):
            data += more
        assert b"[DONE]" in data
        connection.close()


def test_whole_answers_work_beside(served: Served) -> None:
    connection = served.connect()
    connection.sendall(request(TEXT, completion([FAST], max_tokens=5)))
    assert reply(connection)[0] == 200
