"""Whether a request would be served in time if it were accepted now, and if not, when it would. Pure.

Predicted from what the workers' beats say of themselves and from what waits in front of the request:

- TTFT: prompt tokens ahead of it (its own class of the queue and those before it, at all gateways, and what prefills have begun) and its
  own, over the prefill rate that the workers measure on their launches;
- room: pages that are wanted beyond those that are free, over the rate at which answers that end give theirs back;
- TPOT, if it has a limit: the step of a batch with it, by the line that the workers fit to their steps.

All are wrong now and then; what matters is that they rise with the queue, that they are measured anew all the time, and that the wait
they give is the one after which the same request would be accepted if nobody else came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.errors import Overloaded
from common.messages import WorkerBeat
from common.names import CLASSES
from gateway.ask import Ask

MOST_WAIT_S = 60.0
"""Nobody is sent away for longer: by then everything may be different."""
TURNOVER_S = 60.0
"""Until answers have ended, a pool is taken to give all of its pages back in this long."""
WINDOW_S = 10.0
"""Over which endings are averaged."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a request may be predicted to get. None: any pace."""

    ttft_s: float
    tpot_s: float | None


@dataclass(frozen=True, slots=True)
class Load:
    """What this gateway has accepted and not handed to a decode yet."""

    waiting_tokens: dict[str, int]
    """Prompt tokens that no worker has started, by class."""
    unplaced_tokens: int
    """Prompt tokens of what has no pages on a decode yet, begun ones included."""
    unplaced: int
    """Answers among them."""


@dataclass(slots=True)
class Rate:
    """Something a second, averaged over about WINDOW_S."""

    total: float = 0.0
    at: float | None = None
    since: float | None = None

    def add(self, amount: float, now: float) -> None:
        self.since = now if self.since is None else self.since
        self.total = self._now(now) + amount
        self.at = now

    def value(self, now: float) -> float:
        """Unbiased from the first one on: what the window has not seen yet is not counted as nothing."""
        if self.since is None:
            return 0.0
        seen = WINDOW_S * (1 - math.exp(-max(1.0, now - self.since) / WINDOW_S))
        return self._now(now) / seen

    def _now(self, now: float) -> float:
        return 0.0 if self.at is None else self.total * math.exp(-(now - self.at) / WINDOW_S)


@dataclass(eq=False)
class Forecast:
    bounds: Bounds
    _pages: Rate = field(default_factory=Rate)
    _answers: Rate = field(default_factory=Rate)

    def ended(self, pages: int, now: float) -> None:
        """An answer is over and gives this many pages back."""
        self._pages.add(pages, now)
        self._answers.add(1, now)

    @staticmethod
    def ttft_s(job_class: str, prompt_tokens: int, load: Load, workers: Iterable[WorkerBeat]) -> tuple[float, float]:
        """Seconds until a request accepted now is begun, and from there to its first token; 0 where no worker has measured itself."""
        readers = [beat for beat in workers if beat.role != "decode" and not beat.draining]
        rate = sum(beat.prefill_rate for beat in readers)
        ahead = CLASSES[: CLASSES.index(job_class) + 1]
        own = sum(load.waiting_tokens.get(name, 0) for name in ahead)
        # Every worker tells the same of the other gateways, the latest word is the largest while a queue grows.
        elsewhere = max((sum(beat.elsewhere_tokens[: len(ahead)]) for beat in readers), default=0)
        begun = sum(beat.backlog_tokens for beat in readers)
        return ((own + elsewhere + begun) / rate, prompt_tokens / rate) if rate > 0 else (0.0, 0.0)

    def check(self, ask: Ask, load: Load, workers: Iterable[WorkerBeat], now: float, page_tokens: int) -> None:
        """Raises Overloaded for a request that would come too late. One before which nothing waits is never refused for its first token,
        however long that takes; missing pages, or the pace if it has a limit, can still refuse it."""
        beats = list(workers)
        tokens = len(ask.prompt)
        ahead_s, own_s = self.ttft_s(ask.job_class, tokens, load, beats)
        predicted_s, allowed_s = ahead_s + own_s, min(self.bounds.ttft_s, ask.deadline_s)
        late = f"the first token is predicted in {predicted_s:.2f} s, {allowed_s:g} s are allowed"
        self._refuse(min(predicted_s - allowed_s, ahead_s), late)
        writers = [beat for beat in beats if beat.role != "prefill" and not beat.draining]
        room_s = self._room_s(load.unplaced_tokens + tokens, writers, now, page_tokens)
        self._refuse(
            room_s - self.bounds.ttft_s, f"free pages for it are predicted in {room_s:.2f} s, {self.bounds.ttft_s:g} s are allowed"
        )
        if self.bounds.tpot_s is not None:
            over = self._over(ask.n + load.unplaced, writers, self.bounds.tpot_s)
            rate = self._answers.value(now)
            slow = f"its tokens are predicted to come more slowly than the {self.bounds.tpot_s:g} s each that are allowed"
            self._refuse((over / rate if rate > 0 else MOST_WAIT_S) if over > 0 else 0.0, slow)

    def _room_s(self, tokens: int, writers: list[WorkerBeat], now: float, page_tokens: int) -> float:
        """Until the decodes have pages for all that is on its way to them."""
        lacking = -(-tokens // page_tokens) - sum(beat.free_pages for beat in writers)
        least = sum(beat.total_pages for beat in writers) / TURNOVER_S
        return lacking / max(self._pages.value(now), least) if lacking > 0 and least > 0 else 0.0

    @staticmethod
    def _over(more: int, writers: list[WorkerBeat], tpot_s: float) -> float:
        """By how many answers too many the decodes would have, shared evenly, for a step of `tpot_s`. One answer is always possible."""
        paced = [beat for beat in writers if beat.step_s > 0]
        if not paced:
            return 0.0
        room = sum(max(1.0, (tpot_s - beat.step_s) / beat.each_s) if beat.each_s > 0 else math.inf for beat in paced)
        if any(beat.each_s == 0 and beat.step_s > tpot_s for beat in paced):
            room = len(paced)
        return sum(beat.running + beat.waiting for beat in paced) + more - room

    @staticmethod
    def _refuse(wait_s: float, why: str) -> None:
        if wait_s > 0:
            raise Overloaded(f"{why}: try again after Retry-After seconds", retry_after_s=min(MOST_WAIT_S, wait_s))
