"""What one request may use, taken from its client's allowance before it is accepted, and what it did not use given back at its end."""

from __future__ import annotations

from common.errors import BadRequest
from gateway.ask import Ask
from gateway.limits import Meter


class Tab:
    """`meter`: the client's; None where nobody is asked for a key, and everything is allowed."""

    def __init__(self, meter: Meter | None, asks: list[Ask], now: float) -> None:
        """Takes what the request may use at most. Raises Limited and BadRequest; nothing is taken then."""
        self._meter = meter
        self._taken = sum(len(ask.prompt) + ask.n * ask.max_tokens for ask in asks)
        self._at = now
        if meter is None:
            return
        if not meter.priority and any(ask.job_class == "priority" for ask in asks):
            raise BadRequest("this API key may not ask for service_tier priority", param="service_tier")
        meter.take_tokens(self._taken, now)

    def settle(self, used: int, now: float) -> None:
        """The request is over: so many tokens were computed for it. Once."""
        if self._meter is not None:
            self._meter.return_tokens(max(0, self._taken - used), self._at, now)
