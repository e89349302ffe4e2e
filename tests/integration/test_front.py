"""The front of compose, for real: Caddy with the Caddyfile, a gateway behind it. Skipped where there is no Caddy (Debian has a package)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from tests.integration.echo_desk import Script
from tests.integration.http_fixtures import MOST_BYTES, PATIENCE_S, Served, completion, serving

pytestmark = [pytest.mark.system, pytest.mark.skipif(shutil.which("caddy") is None, reason="needs Caddy")]

CADDYFILE = Path(__file__).parents[2] / "compose" / "Caddyfile"
TEXT = "/v1/completions"


@contextmanager
def front(folder: Path, gateway_port: int) -> Iterator[str]:
    """Caddy before the gateway on this host; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = folder / "Caddyfile"
    file.write_text(CADDYFILE.read_text().replace("name gateway", "name localhost"))
    words = {"SITE": f":{port}", "GATEWAY_PORT": str(gateway_port), "HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        caddy = subprocess.Popen(
            ["caddy", "run", "--config", str(file), "--adapter", "caddyfile"], env={**os.environ, **words}, stdout=log, stderr=log
        )
    try:
        url = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            with suppress(httpx.TransportError):
                httpx.get(f"{url}/health", timeout=PATIENCE_S)
                break
            assert caddy.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield url
    finally:
        caddy.kill()
        caddy.wait()


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Served]:
    with serving(smollm2) as served:
        yield served


@pytest.fixture(scope="module")
def url(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with front(tmp_path_factory.mktemp("caddy"), server.port) as address:
        yield address


def test_a_stream_comes_token_by_token(server: Served, url: str) -> None:
    server.desk.scripts = lambda ask: Script(endless=True, pause_s=0.3)
    at: list[float] = []
    with httpx.stream("POST", f"{url}{TEXT}", json=completion([100], max_tokens=10, stream=True), timeout=PATIENCE_S) as stream:
        at += [time.monotonic() for line in stream.iter_lines() if line.startswith("data:")]
    assert len(at) >= 10 and at[-1] - at[0] > 0.5, "nothing is held back until the end"


@pytest.mark.parametrize("case", ["amid a stream", "before a stream", "before a whole answer"])
def test_a_client_that_leaves_is_heard_of(server: Served, url: str, case: str) -> None:
    """Otherwise its answer would be computed to its end, for nobody."""
    server.desk.scripts = lambda ask: Script(endless=True, pause_s=0.05, before_s=60.0 if case == "before a stream" else 0.0)
    asked = completion([100], max_tokens=1500, stream=case != "before a whole answer")
    with suppress(httpx.ReadTimeout), httpx.stream("POST", f"{url}{TEXT}", json=asked, timeout=1.0) as stream:
        next(stream.iter_lines())
    assert server.desk.answers[-1].cancelled.wait(PATIENCE_S) and not server.desk.answers[-1].complete


def test_a_gateway_s_refusals_are_passed_on(server: Served, url: str) -> None:
    answer = httpx.post(f"{url}{TEXT}", content=b"x" * (MOST_BYTES + 1), timeout=PATIENCE_S)
    assert answer.status_code == 413 and "limit" in answer.json()["error"]["message"]


def test_without_a_gateway_it_says_so_as_one_would(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with front(tmp_path, unused.getsockname()[1]) as address:
            answer = httpx.post(f"{address}{TEXT}", json=completion([100]), timeout=PATIENCE_S)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["type"] == "service_unavailable_error"
