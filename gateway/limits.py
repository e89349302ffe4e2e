"""What one API key may use: requests at once and requests within a minute."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from common.errors import Overloaded

MINUTE_S = 60.0
FIRST_GUESS_S = 1.0
"""How long a request takes, until one has ended."""
SMOOTHING = 0.2
MOST_GUESS_S = 60.0


class Limited(Overloaded):
    """429: this key's own limit, not the fleet's."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = "rate_limit_exceeded"


class Meter:
    """One client's requests. Remembers a number for each request of the last minute, at most `most_a_minute`, and nothing more."""

    def __init__(self, most_running: int | None = None, most_a_minute: int | None = None) -> None:
        self.running = 0
        self._most_running = most_running
        self._taken: deque[float] | None = None if most_a_minute is None else deque(maxlen=most_a_minute)
        self._typical_s: float | None = None

    def take(self, now: float) -> None:
        """Count a request in; `give_back` must follow, once. Raises Limited, and then nothing was counted.

        For the minute's limit `retry_after_s` is exact: the oldest request that counts leaves the minute then. When one of the running
        requests will end nobody knows; said is how long it takes on average.
        """
        self._per_minute(now)
        if self._most_running is not None and self.running >= self._most_running:
            wait_s = min((self._typical_s or FIRST_GUESS_S) / self.running, MOST_GUESS_S)
            raise Limited(f"this API key may have {self._most_running} requests at once", retry_after_s=wait_s)
        self.running += 1
        if self._taken is not None:
            self._taken.append(now)

    def give_back(self, took_s: float) -> None:
        """A request has ended after this long, however."""
        assert self.running > 0
        self.running -= 1
        before = self._typical_s
        self._typical_s = took_s if before is None else before + SMOOTHING * (took_s - before)

    def _per_minute(self, now: float) -> None:
        taken = self._taken
        if taken is None or len(taken) < (taken.maxlen or 0):
            return
        wait_s = taken[0] + MINUTE_S - now
        if wait_s > 0:
            raise Limited(f"this API key may have {taken.maxlen} requests within a minute", retry_after_s=wait_s)


class Meters:
    """A meter for each name, all made at the start: what is kept does not grow with what clients send."""

    def __init__(self, names: Iterable[str], most_running: int | None = None, most_a_minute: int | None = None) -> None:
        self._meters = {name: Meter(most_running, most_a_minute) for name in names}

    def __getitem__(self, name: str) -> Meter:
        return self._meters[name]
