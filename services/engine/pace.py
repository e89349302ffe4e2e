"""How fast this engine has been of late, measured on its own launches: what a gateway predicts waiting times from. Pure.

Both figures are of wall time, so that they tell what neighbours on the same device cost, too.
"""

from __future__ import annotations

from msgspec import Struct

from services.engine.plan import Plan

KEEP = 0.9
"""Weight of everything before, at each launch: about the last ten count."""
LEAST_SPREAD = 0.5
"""Variance of the batch below which a slope would be noise."""


class Pace(Struct, frozen=True):
    """`prefill_rate`: prompt tokens/s; 0 before the first prompt. A decode step of b sequences takes `step_s + b * each_s` seconds; both
    are 0 before the first one."""

    prefill_rate: float = 0.0
    step_s: float = 0.0
    each_s: float = 0.0


class Clocked:
    """Takes the time of each launch and keeps decayed sums."""

    def __init__(self) -> None:
        self.pace = Pace()
        self._tokens = self._prefill_s = 0.0
        self._n = self._b = self._bb = self._s = self._bs = 0.0

    def note(self, plan: Plan, took_s: float) -> None:
        """A launch has been collected `took_s` after the engine began with it. A launch of both phases counts as prefill."""
        prompt = sum(chunk.tokens for chunk in plan.chunks if chunk.tokens > 1 or not chunk.draws)
        if prompt:
            self._tokens = KEEP * self._tokens + prompt
            self._prefill_s = KEEP * self._prefill_s + took_s
        else:
            self._step(len(plan.chunks), took_s)
        rate = self._tokens / self._prefill_s if self._prefill_s > 0 else 0.0
        self.pace = Pace(rate, *self._line())

    def _step(self, batch: int, took_s: float) -> None:
        sums = (self._n, self._b, self._bb, self._s, self._bs)
        fresh = (1.0, batch, batch * batch, took_s, batch * took_s)
        self._n, self._b, self._bb, self._s, self._bs = (KEEP * old + new for old, new in zip(sums, fresh, strict=True))

    def _line(self) -> tuple[float, float]:
        """Least squares over the batch; while it has hardly changed, all time counts as the step's own."""
        if not self._n:
            return 0.0, 0.0
        mean, batch = self._s / self._n, self._b / self._n
        spread = self._bb / self._n - batch * batch
        each = max(0.0, (self._bs / self._n - mean * batch) / spread) if spread > LEAST_SPREAD else 0.0
        each = min(each, mean / batch)
        return mean - each * batch, each
