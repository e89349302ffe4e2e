"""The web page's files and `/fleet`, over an echo desk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.messages import WorkerBeat
from gateway.page import FILES
from tests.integration.http_fixtures import NAME, Served, serving


@pytest.fixture(scope="module")
def served(smollm2: Path) -> Iterator[Served]:
    with serving(smollm2) as found:
        yield found


def test_a_browser_gets_the_page_and_a_program_json(served: Served) -> None:
    page = httpx.get(served.url, headers={"Accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html") and "<title>Baton</title>" in page.text
    assert httpx.get(served.url).json()["model"] == NAME
    assert page.headers["vary"] == httpx.get(served.url).headers["vary"] == "Accept"


def test_everything_the_page_names_is_served_from_here(served: Served) -> None:
    """No other origin, nothing inline, nothing missing."""
    page = (FILES / "index.html").read_text()
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    for path in [one for one in named if not one.startswith("data:")]:
        assert path.startswith("/page/") and httpx.get(served.url + path).status_code == 200, path
    for script in FILES.glob("*.js"):
        for path in re.findall(r'from "([^"]+)"', script.read_text()):
            assert path.startswith("./") and (FILES / path).is_file(), f"{script.name} imports {path}"
    assert "<style" not in page and not re.search(r"<script(?![^>]*src=)", page) and " style=" not in page


def test_its_headers_let_nothing_else_in(served: Served) -> None:
    for path in ("/", "/page/app.js", "/page/style.css"):
        headers = httpx.get(served.url + path, headers={"Accept": "text/html"}).headers
        assert "default-src 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    etag = httpx.get(f"{served.url}/page/app.js").headers["etag"]
    assert httpx.get(f"{served.url}/page/app.js", headers={"If-None-Match": etag}).status_code == 304


@pytest.mark.parametrize(
    "path", ["/page/../page.py", "/page/%2e%2e/page.py", "/page/..%2fpage.py", "/page/", "/page/nothing.js", "/page//etc/passwd"]
)
def test_nothing_else_is_served(served: Served, path: str) -> None:
    assert httpx.get(served.url + path).status_code == 404


def test_the_fleet(served: Served) -> None:
    served.desk.workers = {"b" * 12: beat("decode"), "a" * 12: beat("prefill")}
    served.desk.queued = 3
    httpx.post(f"{served.url}/v1/completions", json={"model": NAME, "prompt": "one two three", "max_tokens": 3}).raise_for_status()
    fleet = httpx.get(f"{served.url}/fleet", params={"ttft_ms": 1e5, "tpot_ms": 1e5, "window_s": 60}).json()
    assert [worker["role"] for worker in fleet["workers"]] == ["decode", "prefill"]
    assert fleet["workers"][0] | {"name": ""} == {
        "name": "", "role": "decode", "free_pages": 7, "total_pages": 10, "running": 2, "waiting": 1, "draining": False,
    }  # fmt: skip
    assert fleet["queue"]["queued"] == 3 and fleet["model"] == NAME
    assert fleet["recent"]["attained"] == fleet["recent"]["requests"] >= 1 and fleet["recent"]["attainment"] == 1.0
    strict = httpx.get(f"{served.url}/fleet", params={"ttft_ms": 0.001}).json()["recent"]
    assert strict["attainment"] == 0.0


@pytest.mark.parametrize("query", ["ttft_ms=x", "tpot_ms=0", "window_s=-1", "window_s=1e9", "ttft_ms=nan", "ttft_ms=inf"])
def test_bad_objectives(served: Served, query: str) -> None:
    answer = httpx.get(f"{served.url}/fleet?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == query.partition("=")[0]


def beat(role: str) -> WorkerBeat:
    return WorkerBeat(role, 1, 1, False, 1.0, 7, 10, 2, 1)  # type: ignore[arg-type]
