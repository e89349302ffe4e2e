"""A worker's port for Prometheus: nobody who connects to it can use up the worker's threads and file descriptors."""

from __future__ import annotations

import contextlib
import socket
import time
import urllib.request
from collections.abc import Iterator

import pytest

from services.worker import figures
from services.worker.figures import Figures

WAIT_S = 5.0


@contextlib.contextmanager
def served() -> Iterator[Figures]:
    serving = Figures("127.0.0.1", 0, lambda: {"steps_total": 7.0}, dict)
    try:
        yield serving
    finally:
        serving.close()


@pytest.fixture
def silent() -> Iterator[list[socket.socket]]:
    """Connections of clients that wait."""
    with contextlib.ExitStack() as stack:
        kept: list[socket.socket] = []
        yield kept
        for one in kept:
            stack.enter_context(one)


def connected(serving: Figures) -> socket.socket:
    return socket.create_connection(("127.0.0.1", serving.port), WAIT_S)


def scraped(serving: Figures) -> str:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{serving.port}/metrics", timeout=WAIT_S) as answer:
        text: str = answer.read().decode()
        return text


def ended(connection: socket.socket) -> bool:
    """Whether the server ends it within WAIT_S without a word."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_figures_are_served() -> None:
    with served() as serving:
        assert "baton_worker_steps_total 7.0" in scraped(serving)


def test_a_connection_that_sends_nothing_is_ended(monkeypatch: pytest.MonkeyPatch, silent: list[socket.socket]) -> None:
    monkeypatch.setattr(figures, "CONNECTION_S", 0.2, raising=False)
    with served() as serving:
        silent.append(connected(serving))
        assert ended(silent[0])
        assert "steps_total" in scraped(serving)


def test_a_connection_that_never_comes_to_its_end_is_ended(monkeypatch: pytest.MonkeyPatch, silent: list[socket.socket]) -> None:
    """Each byte would renew the deadline of a single read."""
    monkeypatch.setattr(figures, "CONNECTION_S", 0.5, raising=False)
    with served() as serving:
        silent.append(connected(serving))
        give_up = time.monotonic() + WAIT_S
        with pytest.raises(ConnectionError):
            while time.monotonic() < give_up:
                silent[0].sendall(b"G")
                time.sleep(0.05)


def test_more_connections_than_are_served_at_once_are_closed(monkeypatch: pytest.MonkeyPatch, silent: list[socket.socket]) -> None:
    monkeypatch.setattr(figures, "CONNECTIONS", 3, raising=False)
    with served() as serving:
        silent.extend(connected(serving) for _ in range(3))
        with connected(serving) as beyond:
            assert ended(beyond)
        silent.pop().close()
        give_up = time.monotonic() + WAIT_S
        while True:  # its thread sees the end a moment later
            try:
                assert "steps_total" in scraped(serving)
                break
            except OSError:
                assert time.monotonic() < give_up
                time.sleep(0.02)


def test_the_end_of_the_figures_is_the_end_of_their_connections(silent: list[socket.socket]) -> None:
    """A worker that changes its role serves others on the same port."""
    with served() as serving:
        silent.append(connected(serving))
        scraped(serving)  # the one before has been accepted
    assert ended(silent[0])
