"""The web page at `/`, its files, and `/fleet`, from which it draws the live fleet."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from common.errors import BadRequest
from common.slo import Objectives
from gateway.ask import Desk, lacking
from gateway.recent import Recent, Review

FILES = Path(__file__).parent / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LONGEST_WINDOW_S = 3600.0
LONGEST_OBJECTIVE_MS = 1e6


class Page:
    """Endpoints for people."""

    def __init__(self, desk: Desk, recent: Recent, model: str) -> None:
        self._desk = desk
        self._recent = recent
        self._model = model

    def files(self) -> list[BaseRoute]:
        """What is open to everybody."""
        return [Route("/", self.root, methods=["GET"]), Mount("/page", _Files(directory=FILES))]

    async def root(self, request: Request) -> Response:
        """The page for a browser, a few words of JSON for everything else."""
        if "text/html" in request.headers.get("accept", ""):
            return FileResponse(FILES / "index.html", headers={**HEADERS, "Vary": "Accept"})
        about = {"name": "baton", "model": self._model, "api": ["/v1/chat/completions", "/v1/completions", "/v1/models", "/openapi.json"]}
        return JSONResponse(about, headers={"Vary": "Accept"})

    async def fleet(self, request: Request) -> Response:
        """Workers, queue, and how many of the last answers met `ttft_ms` and `tpot_ms` (400 if these are no numbers)."""
        ttft_ms, tpot_ms = _number(request, "ttft_ms", 500, LONGEST_OBJECTIVE_MS), _number(request, "tpot_ms", 50, LONGEST_OBJECTIVE_MS)
        objectives = Objectives(ttft_ms / 1000, tpot_ms / 1000)
        window_s = _number(request, "window_s", 300, LONGEST_WINDOW_S)
        review = self._recent.review(objectives, window_s, time.monotonic())
        return JSONResponse(fleet_body(self._desk, self._model, review), headers={"Cache-Control": "no-store"})


def fleet_body(desk: Desk, model: str, review: Review) -> dict[str, Any]:
    workers = [
        {
            "name": name,
            "role": beat.role,
            "free_pages": beat.free_pages,
            "total_pages": beat.total_pages,
            "running": beat.running,
            "waiting": beat.waiting,
            "draining": beat.draining,
        }
        for name, beat in sorted(desk.workers.items(), key=lambda item: (item[1].role, item[0]))
    ]
    return {
        "model": model,
        "missing": lacking(desk),
        "queue": {"queued": desk.queued, "running": desk.running},
        "recoveries": desk.recoveries,
        "workers": workers,
        "recent": {
            "window_s": review.window_s,
            "requests": review.requests,
            "failed": review.failed,
            "attained": review.attained,
            "attainment": review.attainment,
            "goodput_rps": review.goodput_rps,
            "ttft_ms": _ms(review.ttft_s),
            "tpot_ms": _ms(review.tpot_s),
        },
    }


def _ms(pair: tuple[float, float] | None) -> dict[str, float] | None:
    return None if pair is None else {"p50": round(1000 * pair[0], 2), "p99": round(1000 * pair[1], 2)}


def _number(request: Request, name: str, default: float, most: float) -> float:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        raise BadRequest(f"{name} must be a number above 0, at most {most:g}", param=name)
    return value


class _Files(StaticFiles):
    """The page's files with its security headers; a browser asks whether they have changed."""

    def file_response(self, *arguments: Any, **more: Any) -> Response:
        response = super().file_response(*arguments, **more)
        response.headers.update(HEADERS)
        return response
