"""Timing in rounds: every case once a round, so that what disturbs the machine for a while falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """`run` returns when the work is done, on a device too. `before` is not timed. `repeats`: runs in a row, each timed."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] | None = None
    repeats: int = 1

    def seconds(self) -> list[float]:
        return [self._once() for _ in range(self.repeats)]

    def _once(self) -> float:
        if self.before is not None:
            self.before()
        began = time.perf_counter()
        self.run()
        return time.perf_counter() - began


class Sample(Protocol):
    """What takes part in the rounds: a case, or something that times itself. No seconds: nothing could be measured this time."""

    @property
    def name(self) -> str: ...

    def seconds(self) -> list[float]: ...


@dataclass(frozen=True)
class Times:
    """Seconds."""

    median: float
    least: float
    count: int


def measure(samples: Sequence[Sample], rounds: int, say: Say) -> dict[str, Times]:
    """By the samples' names; a first round warms up and is not counted. What gave no seconds at all is left out."""
    if len({sample.name for sample in samples}) != len(samples):
        raise ValueError("two cases have one name")
    found: dict[str, list[float]] = {sample.name: [] for sample in samples}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}: {len(samples)} cases" if number else f"warming up {len(samples)} cases")
        for sample in samples:
            taken = sample.seconds()
            if number:
                found[sample.name] += taken
    return {name: Times(statistics.median(taken), min(taken), len(taken)) for name, taken in found.items() if taken}
