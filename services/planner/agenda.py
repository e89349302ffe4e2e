"""The simulator's clock: what happens when. Events at the same time happen in the order in which they were planned."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count


class Agenda:
    """`now` in seconds since the start of the trial."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def step(self) -> bool:
        """Let the next event happen. False: there is none."""
        if not self._events:
            return False
        self.now, _, what = heapq.heappop(self._events)
        what()
        return True
