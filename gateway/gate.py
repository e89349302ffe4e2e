"""The gate before an endpoint: whose key is shown, and whether that client may have one more request."""

from __future__ import annotations

import time
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import RequestError
from gateway.keys import Keys
from gateway.limits import Meters
from gateway.metrics import Metrics

METER = "baton.meter"
"""In the scope of a metered request: its client's meter."""


@dataclass(frozen=True, slots=True)
class Access:
    """The keys of this gateway, and what each may use."""

    keys: Keys
    meters: Meters


class Gate:
    """Raises Unauthorized or Limited before the endpoint sees the request. `metered`: the request counts as one of its key.

    Pure ASGI: it returns when the answer is over or its client gone, so what was taken is given back exactly then, however it ends.
    """

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics, *, metered: bool) -> None:
        self._app = app
        self._access = access
        self._metrics = metrics
        self._metered = metered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        try:
            name = self._access.keys.name(Headers(scope=scope).get("authorization"))
            meter = self._access.meters[name] if self._metered else None
            if meter is not None:
                meter.take(began)
                scope[METER] = meter
        except RequestError as error:
            self._metrics.refused(error.code or error.type)
            raise
        try:
            await self._app(scope, receive, send)
        finally:
            if meter is not None:
                meter.give_back(time.monotonic() - began)
