"""The last minutes of a gateway's answers, for the page: how many met their objectives."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from common.slo import Objectives, Served, attains

MOST = 20_000
"""Answers remembered at most."""


@dataclass(frozen=True, slots=True)
class Review:
    """A window of answers judged by objectives. Percentiles are in seconds, over complete answers; None without any."""

    window_s: float
    requests: int
    failed: int
    attained: int
    ttft_s: tuple[float, float] | None
    """P50 and P99."""
    tpot_s: tuple[float, float] | None

    @property
    def goodput_rps(self) -> float:
        return self.attained / self.window_s

    @property
    def attainment(self) -> float | None:
        return self.attained / self.requests if self.requests else None


class Recent:
    """Answers by the moment of their end. One that its client has cut short counts neither way; a shed or failed one never attains."""

    def __init__(self) -> None:
        self._answers: deque[tuple[float, Served]] = deque(maxlen=MOST)

    def note(self, served: Served, now: float) -> None:
        self._answers.append((now, served))

    def review(self, objectives: Objectives, window_s: float, now: float) -> Review:
        answers = [served for at, served in self._answers if now - at <= window_s]
        whole = [served for served in answers if served.ok]
        return Review(
            window_s=window_s,
            requests=len(answers),
            failed=len(answers) - len(whole),
            attained=sum(attains(served, objectives) for served in answers),
            ttft_s=_percentiles([served.ttft_s for served in whole]),
            tpot_s=_percentiles([served.tpot_s for served in whole if served.output_tokens > 1]),
        )


def _percentiles(values: list[float]) -> tuple[float, float] | None:
    """P50 and P99 by nearest rank."""
    if not values:
        return None
    ranked = sorted(values)
    return ranked[(len(ranked) - 1) // 2], ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]
