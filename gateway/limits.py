"""What one API key may use: requests at once, requests and tokens within a minute, and whether it may go before others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from common.errors import BadRequest, Overloaded

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


@dataclass(frozen=True, slots=True)
class Allowance:
    """What stands beside a key. None: what holds for every key."""

    running: int | None = None
    requests: int | None = None
    tokens: int | None = None
    priority: bool = False
    """May ask for `service_tier: priority`."""


class Meter:
    """One client's requests. Remembers a number for each request of the last minute, at most `most_a_minute`, one for each second of
    it, and nothing more."""

    def __init__(
        self,
        most_running: int | None = None,
        most_a_minute: int | None = None,
        most_tokens: int | None = None,
        *,
        priority: bool = False,
    ) -> None:
        self.running = 0
        self.priority = priority
        self._most_running = most_running
        self.most_tokens = most_tokens
        """Within a minute."""
        self._taken: deque[float] | None = None if most_a_minute is None else deque(maxlen=most_a_minute)
        self._seconds: deque[tuple[int, int]] = deque()
        """(second, tokens taken in it), ascending."""
        self._tokens = 0
        """Of all these seconds."""
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

    def take_tokens(self, tokens: int, now: float) -> None:
        """Count tokens in: prompts, and all that the answers may have. Raises Limited, and then nothing was counted, with a `retry_after_s`
        after which there is room for certain; or BadRequest for more than a minute ever has."""
        most = self.most_tokens
        if most is None:
            return
        if tokens > most:
            raise BadRequest(f"prompt and max_tokens are {tokens} tokens, this API key may have {most} within a minute", param="max_tokens")
        self._forget(now)
        lacking = self._tokens + tokens - most
        if lacking <= 0:
            self._note(int(now), tokens)
            return
        gone = accumulate(taken for _, taken in self._seconds)
        last = next(second for (second, _), sum_ in zip(self._seconds, gone, strict=True) if sum_ >= lacking)
        raise Limited(f"this API key may have {most} tokens within a minute", retry_after_s=last + 1 + MINUTE_S - now)

    def return_tokens(self, tokens: int, taken_at: float, now: float) -> None:
        """Of those that were taken then, these have not been used."""
        if self.most_tokens is not None:
            self._forget(now)
            self._note(int(taken_at), -tokens)

    def _note(self, second: int, tokens: int) -> None:
        for place, (at, taken) in enumerate(self._seconds):
            if at == second:
                self._seconds[place] = (at, taken + tokens)
                self._tokens += tokens
                return
        if tokens > 0:
            self._seconds.append((second, tokens))
            self._tokens += tokens

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0][0] + 1 + MINUTE_S <= now:
            self._tokens -= self._seconds.popleft()[1]

    def _per_minute(self, now: float) -> None:
        taken = self._taken
        if taken is None or len(taken) < (taken.maxlen or 0):
            return
        wait_s = taken[0] + MINUTE_S - now
        if wait_s > 0:
            raise Limited(f"this API key may have {taken.maxlen} requests within a minute", retry_after_s=wait_s)


class Meters:
    """A meter for each name, all made at the start: what is kept does not grow with what clients send. `own`: what stands beside a key
    counts instead of what holds for all."""

    def __init__(
        self,
        names: Iterable[str],
        most_running: int | None = None,
        most_a_minute: int | None = None,
        most_tokens: int | None = None,
        own: Mapping[str, Allowance] | None = None,
    ) -> None:
        self._meters: dict[str, Meter] = {}
        for name in names:
            mine = (own or {}).get(name, Allowance())
            running = most_running if mine.running is None else mine.running
            requests = most_a_minute if mine.requests is None else mine.requests
            tokens = most_tokens if mine.tokens is None else mine.tokens
            self._meters[name] = Meter(running, requests, tokens, priority=mine.priority)

    def __getitem__(self, name: str) -> Meter:
        return self._meters[name]
