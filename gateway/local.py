"""Without keys only this host is served. A browser on it is on this host, too, and runs what pages of anywhere tell it: those are refused.

A page of another origin cannot read an answer, but it can ask (a form, `no-cors`), and each asking costs the fleet. A name that its owner
turns towards 127.0.0.1 once the page is loaded (DNS rebinding) makes even reading same-origin: so the name counts, not the address.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import RequestError
from gateway.replies import error_body

NAMES = ("localhost", "127.0.0.1", "[::1]")
"""How this host calls itself in an address."""


class Forbidden(RequestError):
    """403: not for pages of elsewhere."""

    status = 403

    def __init__(self, message: str) -> None:
        super().__init__(message, code="forbidden")


class Local:
    """Answers what names this host and comes from no page, from one of this gateway, or from one of `origins`. Refuses everything else."""

    def __init__(self, app: ASGIApp, names: Collection[str], origins: Collection[str]) -> None:
        self._app = app
        self._names = names
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                check_local(headers.get("host"), headers.get("origin"), self._names, self._origins)
            except Forbidden as error:
                await JSONResponse(error_body(error), status_code=error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def local_names(http_host: str) -> frozenset[str]:
    """Names of this host as they stand in `Host`, that of the setting among them."""
    return frozenset({*NAMES, f"[{http_host}]" if ":" in http_host else http_host.lower()})


def check_local(host: str | None, origin: str | None, names: Collection[str], origins: Collection[str]) -> None:
    """By the headers `Host` and `Origin`. Raises Forbidden. Every browser sends a `Host`; what has none is no browser."""
    if host is not None and _name(host) not in names:
        raise Forbidden(
            f"without API keys this gateway answers to {', '.join(sorted(names))} only, not to {host!r}: "
            "set api_keys, or allow_anonymous to anyone"
        )
    if origin is None or origin in origins or "*" in origins or (host is not None and _is_own(origin, host)):
        return
    raise Forbidden(f"without API keys this gateway takes nothing from pages of {origin!r}: name them in cors_origins, or set api_keys")


def _name(host: str) -> str:
    """Without the port, which a colon outside of brackets begins."""
    name, colon, port = host.rpartition(":")
    return (name if colon and "]" not in port else host).lower()


def _is_own(origin: str, host: str) -> bool:
    """Whether a page of this origin came from the same name and port as it asks now, be it through something that speaks TLS."""
    return origin in (f"http://{host}", f"https://{host}")
