"""A process' life, with real processes: exit status, the one line, readiness, drain, the second signal, and `--check`."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scripts.launcher.child import ROOT, die_with_parent

pytestmark = pytest.mark.system

END_S = 20.0

PROGRAM = """
import asyncio, sys, threading, time
from common.errors import BatonError, QueueError, SettingError, StartError
from common.service import run
from common.settings import GatewaySettings

async def main(settings, service):
    await WAY(settings, service)

async def serve(settings, service):
    service.ready(http_port=settings.http_port, switch_s=sys.getswitchinterval(), loop=type(asyncio.get_running_loop()).__module__)
    await service.stopping.wait()
    print("drained", flush=True)

async def slow_drain(settings, service):
    await serve(settings, service)
    await asyncio.sleep(60)

async def bad_setting(settings, service):
    raise SettingError("model is 'x'; there is no such folder")

async def cannot_start(settings, service):
    raise StartError("no room:\\n  not a page")

async def both_in_a_group(settings, service):
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(fail(QueueError("Redis is away")))
        await asyncio.sleep(60)

async def unexpected_in_a_group(settings, service):
    service.ready()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(fail(ZeroDivisionError("by hand")), name="odd")
        await asyncio.sleep(60)

async def unexpected_in_a_callback(settings, service):
    asyncio.get_running_loop().call_soon(raiser)
    await serve(settings, service)

async def unexpected_in_a_handler(settings, service):
    from common.control import ControlClient, ControlServer
    from common.messages import Withdraw
    server = ControlServer("w", "127.0.0.1", raiser)
    client = ControlClient("g", print)
    client.connect("w", server.address)
    client.send("w", Withdraw(1))
    await serve(settings, service)

async def died_in_a_thread(settings, service):
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: loop.call_soon_threadsafe(service.fail, RuntimeError("the engine died"))).start()
    await serve(settings, service)

async def unwritable(settings, service):
    service.ready()

async def fail(error):
    raise error

def raiser(*_):
    raise ZeroDivisionError("by hand")

sys.exit(run(main, GatewaySettings, "gateway"))
"""


class Process:
    """The program above, going one of its ways."""

    def __init__(self, way: str, *flags: str, **variables: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.replace("WAY", way), *flags],
            cwd=ROOT, env={**clean, "PYTHONPATH": str(ROOT), **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=die_with_parent,
        )  # fmt: skip

    def end(self) -> tuple[int, str, str]:
        """Status, stdout and stderr."""
        out, err = self.popen.communicate(timeout=END_S)
        return self.popen.returncode, out, err


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def go(way: str, *flags: str, **variables: str) -> Process:
        running.append(Process(way, *flags, **variables))
        return running[-1]

    yield go
    for process in running:
        process.popen.kill()
        process.popen.communicate()


@pytest.fixture
def ready_file(tmp_path: Path) -> Path:
    return tmp_path / "gateway.1"


def facts(ready_file: Path) -> dict[str, object]:
    give_up = time.monotonic() + END_S
    while not ready_file.exists():
        assert time.monotonic() < give_up
        time.sleep(0.01)
    return json.loads(ready_file.read_text())  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------- exit status


@pytest.mark.parametrize(
    ("way", "flags", "variables", "status", "words"),
    [
        ("serve", ["--http-port", "x"], {}, 2, "http_port is 'x'"),
        ("serve", [], {"BATON_HTTP_PORT": "99999"}, 2, "http_port is 99999"),
        ("serve", [], {"BATON_HTTP_PROT": "1"}, 2, "did you mean BATON_HTTP_PORT"),
        ("serve", ["--ready-fil", "x"], {}, 2, "did you mean --ready-file"),
        ("bad_setting", [], {}, 2, "model is 'x'; there is no such folder"),
        ("unwritable", ["--ready-file", "/no/such/folder/file"], {}, 2, "ready_file"),
        ("cannot_start", [], {}, 1, "no room: not a page"),
        ("both_in_a_group", [], {}, 1, "Redis is away"),
    ],
)
def test_what_was_foreseen_is_one_line_and_a_status(
    start: Callable[..., Process], way: str, flags: list[str], variables: dict[str, str], status: int, words: str
) -> None:
    code, out, err = start(way, *flags, **variables).end()
    assert (code, out) == (status, "")
    [line] = err.splitlines()
    assert line.startswith("gateway: ") and words in line


@pytest.mark.parametrize(
    ("way", "error"),
    [
        ("unexpected_in_a_group", "ZeroDivisionError: by hand"),
        ("unexpected_in_a_callback", "ZeroDivisionError: by hand"),
        ("unexpected_in_a_handler", "ZeroDivisionError: by hand"),
        ("died_in_a_thread", "RuntimeError: the engine died"),
    ],
)
def test_the_unforeseen_ends_the_process_with_its_traceback(start: Callable[..., Process], ready_file: Path, way: str, error: str) -> None:
    code, _, err = start(way, "--log-format", "json", "--ready-file", str(ready_file)).end()
    assert code == 1
    errors = [line for line in map(json.loads, err.splitlines()) if line["level"] == "error"]
    assert [line["event"] for line in errors] == ["the process cannot go on"]
    assert error in errors[0]["traceback"]
    assert not ready_file.exists()


def test_help_is_on_stdout_with_status_0(start: Callable[..., Process]) -> None:
    code, out, err = start("serve", "--help").end()
    assert (code, err) == (0, "") and "--http-port" in out and "BATON_HTTP_PORT" in out


# -------------------------------------------------------------------------------------------------------- ready and drain


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_0(start: Callable[..., Process], ready_file: Path, number: int) -> None:
    process = start("serve", "--ready-file", str(ready_file), "--http-port", "1234")
    said = facts(ready_file)
    assert (said["pid"], said["role"], said["http_port"]) == (process.popen.pid, "gateway", 1234)
    assert len(str(said["incarnation"])) == 16
    assert said["switch_s"] == pytest.approx(0.0005) and said["loop"] == "uvloop"
    process.popen.send_signal(number)
    code, out, _ = process.end()
    assert (code, out) == (0, "drained\n")
    assert os.listdir(ready_file.parent) == []


def test_the_second_signal_does_not_wait(start: Callable[..., Process], ready_file: Path) -> None:
    process = start("slow_drain", "--ready-file", str(ready_file))
    facts(ready_file)
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.stdout is not None and process.popen.stdout.readline() == "drained\n"
    process.popen.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.end()[0] == 1
    assert time.monotonic() - started < 5


def test_a_killed_predecessors_ready_file_does_not_stand_for_its_successor(start: Callable[..., Process], ready_file: Path) -> None:
    ready_file.write_text(json.dumps({"pid": os.getpid()}))
    process = start("cannot_start", "--ready-file", str(ready_file))
    assert process.end()[0] == 1
    assert not ready_file.exists()


# ---------------------------------------------------------------------------------------------------------------- --check


def check(start: Callable[..., Process], ready_file: Path, **variables: str) -> tuple[int, str]:
    code, out, err = start("serve", "--check", "--ready-file", str(ready_file), **variables).end()
    assert len((out + err).splitlines()) == 1, out + err
    return code, (out + err).strip()


@contextlib.contextmanager
def answering(status: int) -> Iterator[int]:
    """An HTTP server that answers everything with `status`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_check_knows_a_living_worker_from_a_dead_one(start: Callable[..., Process], ready_file: Path) -> None:
    assert check(start, ready_file)[0] == 1
    living = subprocess.Popen(["sleep", "60"], preexec_fn=die_with_parent)
    try:
        ready_file.write_text(json.dumps({"pid": living.pid}))
        assert check(start, ready_file) == (0, "ready")
    finally:
        living.kill()
        living.wait()
    assert check(start, ready_file)[0] == 1


@pytest.mark.parametrize("text", ["", "not JSON", "3", "[]", "{}", '{"pid": null}', '{"pid": "x"}'])
def test_check_is_one_line_whatever_the_file_holds(start: Callable[..., Process], ready_file: Path, text: str) -> None:
    ready_file.write_text(text)
    code, line = check(start, ready_file)
    assert code == 1 and line.startswith("not ready: ")


def test_check_asks_the_http_server(start: Callable[..., Process], ready_file: Path) -> None:
    with answering(200) as port:
        ready_file.write_text(json.dumps({"pid": os.getpid(), "http_host": "0.0.0.0", "http_port": port}))
        assert check(start, ready_file) == (0, "ready")
        assert check(start, ready_file, http_proxy="http://127.0.0.1:9") == (0, "ready")
    assert check(start, ready_file)[0] == 1
    with answering(503) as port:
        ready_file.write_text(json.dumps({"pid": os.getpid(), "http_host": "127.0.0.1", "http_port": port}))
        assert check(start, ready_file)[0] == 1


def test_check_does_not_wait_for_a_server_that_hangs(start: Callable[..., Process], ready_file: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as silent:
        ready_file.write_text(json.dumps({"pid": os.getpid(), "http_port": silent.server_port}))
        started = time.monotonic()
        assert check(start, ready_file)[0] == 1
        assert time.monotonic() - started < 10


def test_check_without_a_ready_file_says_so(start: Callable[..., Process]) -> None:
    code, out, err = start("serve", "--check").end()
    assert (code, out) == (1, "") and "ready_file" in err
