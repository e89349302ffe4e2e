"""`./scripts/overload`: goodput at its peak, under many times that rate, and right after.

One prefill, one decode, one gateway. Objectives are multiples of what a request takes when nobody else asks, unless they are given: what is
asked of the system is then the same on any machine. The rate climbs until less than 90 % of the requests meet them: the best goodput on the
way is the peak. Then `--times` as many requests arrive as at that peak, and in the end a few less than it again. Requests are sent when
they are due, whatever became of the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.slo import Objectives, attains
from scripts.launcher.__main__ import wait_served
from scripts.launcher.cluster import Cluster, ClusterError, Shape
from scripts.launcher.model import ModelError, obtain
from scripts.launcher.show import Progress
from scripts.load import arrivals
from scripts.load.client import Record, Server, look, trial
from scripts.load.results import quantile
from scripts.load.texts import Writer
from scripts.load.workloads import Shape as Lengths
from scripts.load.workloads import Workload

CLIMB = 1.5
ENOUGH = 0.9
CALM = 0.8
"""Of the peak's rate: what arrives after the flood."""
TTFT_SHARE, TPOT_SHARE = 0.6, 0.8
"""Of the objectives: what the gateway accepts a request for. The rest is for what it cannot know."""
PATIENCE_S = 30.0
TTFT_SCALE, TPOT_SCALE = 5.0, 3.0
"""Objectives, in what an idle system takes."""
IDLE_REQUESTS = 7
USED = 0.3
"""Of the time of the prefill: what the climb begins with."""
LEAST_REQUESTS = 30
"""In a step of the climb: fewer say nothing about 90 %."""


@dataclass(frozen=True)
class Phase:
    """`rate`: offered, `good`: attained, both in requests/s."""

    rate: float
    good: float
    share: float
    records: list[Record]


class Flood:
    """Phases against one server, each with text that was not asked before."""

    def __init__(self, server: Server, writer: Writer, objectives: Objectives, say: Progress) -> None:
        self._server = server
        self._writer = writer
        self._objectives = objectives
        self._say = say
        self._asked = 0

    async def phase(self, rate: float, seconds: float) -> Phase:
        count = max(2, round(rate * seconds))
        due = arrivals.gamma(count, rate, 1.0, self._asked)
        questions = [self._writer.question(self._asked + n) for n in range(count)]
        self._asked += count
        records = await trial(self._server, questions, due, PATIENCE_S)
        good = sum(self.attained(record) for record in records)
        self._say(f"{rate:6.2f}/s: {good} of {count} attain, {sum(record.status == 429 for record in records)} refused")
        return Phase(rate, rate * good / count, good / count, records)

    def attained(self, record: Record) -> bool:
        return attains(record.served, self._objectives)

    async def climb(self, rate: float, seconds: float, most: int) -> Phase:
        """The phase with the best goodput; ends behind the first one that serves too few in time."""
        phases: list[Phase] = []
        while len(phases) < most and (not phases or phases[-1].share >= ENOUGH):
            higher = rate * CLIMB ** len(phases)
            phases.append(await self.phase(higher, max(seconds, LEAST_REQUESTS / higher)))
        return max(phases, key=lambda phase: phase.good)

    async def idle(self) -> Objectives:
        """What one request after the other takes, in the middle. The first is not counted."""
        records = []
        for number in range(IDLE_REQUESTS + 1):
            records += await trial(self._server, [self._writer.question(self._asked + number)], [0.0], PATIENCE_S)
        self._asked += len(records)
        served = [record.served for record in records[1:] if record.error is None]
        if len(served) < IDLE_REQUESTS:
            raise ClusterError(f"{IDLE_REQUESTS - len(served)} of {IDLE_REQUESTS} requests failed with nobody else there")
        return Objectives(statistics.median(one.ttft_s for one in served), statistics.median(one.tpot_s for one in served))


def recovered_s(flood: Flood, records: Sequence[Record]) -> float | None:
    """When, after the flood, the last request was due that did not attain; None if the last three did not either."""
    bad = [record.due_s for record in records if not flood.attained(record)]
    if any(not flood.attained(record) for record in records[-3:]):
        return None
    return max(bad, default=0.0)


async def play(flood: Flood, objectives: Objectives, rate: float, chosen: argparse.Namespace) -> dict[str, Any]:
    await flood.phase(1.0, 3.0)
    peak = await flood.climb(rate, chosen.climb, chosen.steps)
    loud = await flood.phase(chosen.times * peak.good, chosen.seconds)
    calm = await flood.phase(CALM * peak.good, chosen.after)
    refused = [record for record in loud.records if record.status == 429]
    took = [record.done_s - record.sent_s for record in refused]
    late = [record.sent_s - record.due_s for record in loud.records]
    return {
        "objectives_s": [round(objectives.ttft_s, 3), round(objectives.tpot_s, 4)],
        "peak": {"offered": round(peak.rate, 2), "good": round(peak.good, 2), "share": round(peak.share, 3)},
        "flood": {
            "offered": round(loud.rate, 2),
            "seconds": chosen.seconds,
            "good": round(loud.good, 2),
            "of_peak": round(loud.good / peak.good, 3) if peak.good else 0.0,
            "accepted_that_attain": round(sum(map(flood.attained, loud.records)) / max(1, len(loud.records) - len(refused)), 3),
            "by_status": dict(Counter(str(record.status) for record in loud.records)),
            "why": dict(Counter(why(record) for record in refused)),
            "refused_after_ms": {"p50": ms(quantile(took, 0.5)), "p99": ms(quantile(took, 0.99)), "most": ms(max(took, default=0.0))},
            "generator_late_ms_p99": ms(quantile(late, 0.99)),
        },
        "after": {"offered": round(calm.rate, 2), "share": round(calm.share, 3), "normal_after_s": recovered_s(flood, calm.records)},
    }


def why(record: Record) -> str:
    """The gateway's reason, out of its error."""
    return (record.error or "").partition('"message":"')[2].partition('"')[0]


def ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)


def system(model: Path, chosen: argparse.Namespace, objectives: Objectives | None) -> Shape:
    """The gateway accepts what it predicts to attain, with something to spare; without objectives, anything."""
    acceptable = {}
    if objectives is not None:
        acceptable = {"max_ttft_s": str(TTFT_SHARE * objectives.ttft_s), "max_tpot_s": str(TPOT_SHARE * objectives.tpot_s)}
    flags = {"max_request_tokens": "2048", "pages": str(chosen.pages), "prefix_reuse": "false"}
    return Shape(model=model, worker_flags=flags, role_flags={"gateway": acceptable})


@contextmanager
def serving(shape: Shape, say: Progress) -> Iterator[Server]:
    with Cluster(shape, say) as cluster:
        cluster.start()
        wait_served(cluster.urls[0])
        yield asyncio.run(look(cluster.urls[0]))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./scripts/overload", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--times", type=float, default=10.0, help="the flood's rate, in peaks")
    parser.add_argument("--seconds", type=float, default=120.0, help="of the flood")
    parser.add_argument("--after", type=float, default=20.0, help="seconds that are watched after it")
    parser.add_argument("--rate", type=float, help=f"first rate of the climb, requests/s; by default the prefill is busy {USED:.0%}%")
    parser.add_argument("--climb", type=float, default=20.0, help="seconds at each rate of the climb, at least")
    parser.add_argument("--steps", type=int, default=10, help="most rates of the climb")
    parser.add_argument("--ttft", type=float, help=f"objective, seconds; by default {TTFT_SCALE:g} times what an idle system takes")
    parser.add_argument("--tpot", type=float, help=f"objective, seconds; by default {TPOT_SCALE:g} times")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--pages", type=int, default=640, help="of KV for each worker")
    chosen = parser.parse_args()
    if min(value for value in vars(chosen).values() if value is not None) <= 0:
        parser.error("every number must be above 0")
    return chosen


def main() -> int:
    chosen = options()
    say = Progress()
    try:
        model = obtain(None, say)
        workload = Workload("overload", (Lengths(chosen.prompt_tokens, chosen.output_tokens),), "arena_hard_prompts.jsonl.gz")
        writer = Writer(model, workload, 1)
        with serving(system(model, chosen, None), say) as server:
            idle = asyncio.run(Flood(server, writer, Objectives(1.0, 1.0), say).idle())
        say(f"idle: first token after {idle.ttft_s:.3f} s, then one every {1000 * idle.tpot_s:.1f} ms")
        objectives = Objectives(chosen.ttft or TTFT_SCALE * idle.ttft_s, chosen.tpot or TPOT_SCALE * idle.tpot_s)
        with serving(system(model, chosen, objectives), say) as server:
            flood = Flood(server, writer, objectives, say)
            result = asyncio.run(play(flood, objectives, chosen.rate or USED / idle.ttft_s, chosen))
    except (ModelError, ClusterError) as error:
        print(f"./scripts/overload: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
