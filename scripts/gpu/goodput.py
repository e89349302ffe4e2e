"""Requests per second within strict and loose objectives, of systems that run beside each other on one GPU."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias, TypeVar

from scripts.gpu.effort import Effort
from scripts.load.curve import Curve
from scripts.load.judge import Yardstick
from scripts.load.results import trial_summary
from scripts.load.targets import Target
from scripts.load.texts import Writer
from scripts.load.trials import Bench, Trial
from scripts.load.workloads import Workload

Result: TypeAlias = tuple[str, Any]
_T = TypeVar("_T")

PATIENCE_S = 45.0
"""Beyond its own length, that a measurement may take."""
LATE_S = 7.5
"""Beyond the end of the search, that its last trial may take."""
SHARE = 0.9
OBJECTIVES = {"strict": (3.0, 1.5), "loose": (5.0, 5.0)}
"""TTFT and TPOT as multiples of what the idle disaggregated system takes."""
STRICT_TIME = 0.6
"""Of the search; what is left goes to the loose objectives."""
FLOOR, CEILING, RESOLUTION = 0.1, 200.0, 1.15


class Goodput:
    """Searches with one workload; what the first system took when idle is the measure of all."""

    def __init__(self, effort: Effort, workload: Workload, writer: Writer, say: Callable[[str], None]) -> None:
        self._effort = effort
        self._workload, self._writer = workload, writer
        self._say = say
        self._base: Yardstick | None = None

    def search(self, targets: Sequence[Target], seconds: float) -> Iterator[Result]:
        """Trials of these systems in turn, each judged by both objectives; searches the strict goodput first, then the loose one."""
        effort, began = self._effort, time.monotonic()
        until = began + seconds
        running = {target.name: target for target in targets}
        together = ", ".join(running)
        if not targets or seconds < 5:
            yield f"goodput, {together}", {"error": "no system, or no time left"}
            return
        bench = Bench(list(targets), self._workload, self._writer, effort.plan, self._say)
        try:
            asyncio.run(within(bench.measure_unloaded(1), PATIENCE_S))
        except Exception as error:
            yield "unloaded", failure(error)
            return
        self._base = self._base or bench.unloaded[targets[0].name]
        yield f"unloaded, {together}", {name: asdict(one) for name, one in bench.unloaded.items()}
        judges = {kind: Yardstick(self._base.ttft, self._base.tpot_s, *scales) for kind, scales in OBJECTIVES.items()}
        curves = {kind: {name: Curve(effort.first_rate, FLOOR, CEILING, RESOLUTION) for name in running} for kind in judges}
        strict_until = began + STRICT_TIME * seconds
        for turn in itertools.count():
            wanted = due(curves, time.monotonic() < strict_until)
            if wanted is None or time.monotonic() >= until:
                break
            objective, rates = wanted
            for name, rate in rates.items():
                left = until - time.monotonic()
                if left <= 0:
                    break
                try:
                    done = asyncio.run(within(bench.run(running[name], rate, judges[objective], turn), left + LATE_S))
                except Exception as error:
                    yield f"trial, {name}, {rate:.2f}/s", failure(error)
                    break
                if not done.void:
                    for kind, judge in judges.items():
                        curves[kind][name].add(rate, sum(map(judge.attains, done.records)), len(done.records))
                yield f"trial {len(bench.trials)}, {name}, {rate:.2f}/s", body(done, judges, objective)
        yield (
            f"goodput, {together}",
            {
                "objectives": {kind: asdict(judge) for kind, judge in judges.items()},
                "found": {kind: {name: summary(curve) for name, curve in ones.items()} for kind, ones in curves.items()},
                "trials": len(bench.trials),
                "seconds": round(time.monotonic() - began, 1),
            },
        )


def due(curves: dict[str, dict[str, Curve]], strict_first: bool) -> tuple[str, dict[str, float]] | None:
    """Which objective's search goes on, and the next rate of every system that it still has to find; None when nothing is left."""
    for objective in ("strict", "loose") if strict_first else ("loose", "strict"):
        rates = {name: rate for name, curve in curves[objective].items() if (rate := curve.next_rate(SHARE)) is not None}
        if rates:
            return objective, rates
    return None


def body(done: Trial, judges: dict[str, Yardstick], objective: str) -> dict[str, Any]:
    """A trial's figures. P99 of TTFT and TPOT are of the requests that were answered."""
    told = trial_summary(done, judges["strict"])
    shares = {name: round(sum(map(judge.attains, done.records)) / len(done.records), 4) for name, judge in judges.items()}
    kept = ("requests", "failed", "void", "late_p99_s", "ttft_s", "tpot_s", "between_s", "transfers_within_a_step", "stages_ms")
    figures = {name: told[name] for name in kept if name in told}
    return {"searching": objective, "attained": shares, **figures, "seconds": round(done.seconds, 1)}


def summary(curve: Curve) -> dict[str, Any]:
    return {
        **asdict(curve.goodput(SHARE)),
        "curve": [[rate, round(curve.attainment(rate), 4), curve.asked[rate]] for rate in sorted(curve.asked)],
    }


def failure(error: Exception) -> dict[str, Any]:
    return {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}


async def within(work: Awaitable[_T], seconds: float) -> _T:
    async with asyncio.timeout(seconds):
        return await work
