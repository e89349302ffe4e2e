"""Runs trials: one target, one rate, some requests; and what an idle server takes."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from scripts.load import arrivals
from scripts.load.client import Record, trial
from scripts.load.curve import Curve
from scripts.load.judge import Yardstick
from scripts.load.targets import Target
from scripts.load.texts import Question, Writer
from scripts.load.workloads import Workload

LATE_S = 0.05
LATE_SHARE = 0.1
"""A trial is void if 1 % of its requests left later than this, or than this share of the tightest TTFT objective if that is more."""
UNLOADED_OUTPUT = 17
VOIDS = 3
LOOSEST = 5.0
REST_S = 0.25
RESTING_CORES = 0.4
RESTLESS_S = 5.0
"""Before a target is asked, all of them together have used no more cores than this for so long; but nobody waits longer than the last."""

Say = Callable[[str], None]


@dataclass
class Trial:
    """`cpu`: cores used in the mean, by part: this target's, the generator's, other targets' (idle ones) and the machine's."""

    target: str
    rate: float
    records: list[Record]
    void: bool
    cpu: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def late_p99_s(self) -> float:
        late = sorted(record.late_s for record in self.records)
        return late[min(len(late) - 1, int(0.99 * len(late)))]


@dataclass(frozen=True)
class Plan:
    """How much to measure: each trial asks for `seconds` worth of requests, within the two bounds."""

    seconds: float
    least: int
    most: int
    cv: float
    seed: int
    shares: tuple[float, ...] = (0.9,)
    restless_s: float = RESTLESS_S
    """Longest wait for the machine's cores to rest before a target is asked."""

    def count(self, rate: float) -> int:
        return max(self.least, min(self.most, round(rate * self.seconds)))


class Bench:
    """Trials of several targets with one workload; counts what it has asked, so that no text comes twice."""

    def __init__(self, targets: Sequence[Target], workload: Workload, writer: Writer, plan: Plan, say: Say) -> None:
        self.targets = targets
        self.trials: list[Trial] = []
        self.unloaded: dict[str, Yardstick] = {}
        self._workload = workload
        self._writer = writer
        self._plan = plan
        self._say = say
        self._asked = 0
        """Rounds through all shapes that have been asked."""

    # -------------------------------------------------------------------------------------------------------- unloaded

    async def measure_unloaded(self, repeats: int) -> None:
        """TTFT by prompt length and TPOT of each idle target, one request at a time, the targets in turn; medians."""
        questions = self.questions(self._plan.least, 0)
        ordered = sorted(range(len(questions)), key=lambda n: questions[n].input_tokens)
        picked = sorted({ordered[round(q * (len(ordered) - 1))] for q in (0.05, 0.35, 0.65, 0.95)}, key=ordered.index)
        seen: dict[str, dict[int, list[Record]]] = {target.name: {n: [] for n in picked} for target in self.targets}
        for repeat in range(-1, repeats):  # the first round warms up
            fresh = self.questions(self._plan.least, 0)
            for target in self.targets:
                await self._rest()
                for n in picked if repeat >= 0 else picked[-1:]:
                    one = Question(fresh[n].text, fresh[n].input_tokens, UNLOADED_OUTPUT)
                    (record,) = await trial(target.server, [one], [0.0], 120.0)
                    if record.error is not None:
                        raise RuntimeError(f"{target.name} fails when idle: {record.error}")
                    if repeat >= 0:
                        seen[target.name][n].append(record)
        for name, by_question in seen.items():
            knots: dict[int, float] = {}
            for records in by_question.values():
                middle = round(statistics.median(record.input_tokens for record in records))
                knots[middle] = statistics.median(record.served.ttft_s for record in records)
            pace = statistics.median(record.served.tpot_s for records in by_question.values() for record in records)
            self.unloaded[name] = Yardstick(tuple(sorted(knots.items())), pace)
            times = ", ".join(f"{1000 * s:.0f} ms at {tokens}" for tokens, s in sorted(knots.items()))
            self._say(f"{name} unloaded: TTFT {times}; TPOT {1000 * pace:.1f} ms")

    # ---------------------------------------------------------------------------------------------------------- search

    async def search(self, curves: dict[str, Curve], yardstick: Yardstick, until: float) -> None:
        """Every target's goodput, a trial of each in turn, the order rotated, until all have it or the clock says `until`."""
        voids = {target.name: 0 for target in self.targets}
        for turn in range(10_000):
            wanted = [(target, rate) for target in self.targets if (rate := self._wanted(curves[target.name])) is not None]
            wanted = [pair for pair in wanted if voids[pair[0].name] < VOIDS]
            if not wanted:
                return
            shift = turn % len(wanted)
            for target, rate in wanted[shift:] + wanted[:shift]:
                if time.monotonic() > until:
                    self._say("time is up: the search ends here")
                    return
                done = await self.run(target, rate, yardstick, turn)
                if done.void:
                    voids[target.name] += 1
                else:
                    hits = sum(yardstick.attains(record) for record in done.records)
                    curves[target.name].add(rate, hits, len(done.records))

    def _wanted(self, curve: Curve) -> float | None:
        return next((rate for share in self._plan.shares if (rate := curve.next_rate(share)) is not None), None)

    async def run(self, target: Target, rate: float, yardstick: Yardstick, turn: int) -> Trial:
        """One trial. The n-th trial of every target asks for the same lengths at the same times, with other text."""
        count = self._plan.count(rate)
        questions = self.questions(count, turn * self._plan.most)
        if self._workload.timed:
            times = [shape.at_s or 0.0 for shape in self._workload.shapes]
            due = arrivals.replay(times, count, rate, self._plan.seed + turn)
        else:
            due = arrivals.gamma(count, rate, self._plan.cv, self._plan.seed + turn)
        patience = 5.0 + 1.5 * yardstick.patience_s([(q.input_tokens, q.output_tokens) for q in questions], LOOSEST)
        await self._rest()
        before, began = self._cpu(), time.monotonic()
        records = await trial(target.server, questions, due, min(patience, 300.0))
        seconds = time.monotonic() - began
        after = self._cpu()
        done = Trial(target.name, rate, records, False, _shares(target.name, before, after, seconds), seconds)
        tightest = min(yardstick.objectives(question.input_tokens).ttft_s for question in questions)
        done.void = done.late_p99_s > max(LATE_S, LATE_SHARE * tightest)
        self.trials.append(done)
        hits, failed = sum(map(yardstick.attains, records)), sum(record.error is not None for record in records)
        told = "VOID, the generator was late" if done.void else f"{hits}/{count} attain"
        self._say(
            f"{target.name:22} {rate:6.2f}/s  {told}; {failed} failed; late {1000 * done.late_p99_s:.0f} ms; "
            f"cores {', '.join(f'{part} {share:.2f}' for part, share in done.cpu.items())}"
        )
        return done

    async def _rest(self) -> None:
        """Threads of some servers (OpenMP's) spin for a second after their last request, on cores that the next target computes on."""
        give_up = time.monotonic() + self._plan.restless_s
        before = self._cpu()[""]["machine"]
        while time.monotonic() < give_up:
            await asyncio.sleep(REST_S)
            now = self._cpu()[""]["machine"]
            if now - before <= RESTING_CORES * REST_S:
                return
            before = now

    def questions(self, count: int, offset: int) -> list[Question]:
        """Shapes offset … offset + count, with text that was not asked before."""
        shapes = len(self._workload.shapes)
        first = self._asked * shapes + offset
        self._asked += (offset + count) // shapes + 1
        return [self._writer.question(first + n) for n in range(count)]

    def _cpu(self) -> dict[str, dict[str, float]]:
        own = os.times()
        machine = psutil.cpu_times()
        spent = {target.name: target.cpu_s() for target in self.targets}
        busy = machine.user + machine.nice + machine.system + machine.irq + machine.softirq
        return {**spent, "": {"generator": own.user + own.system, "machine": busy}}


def _shares(name: str, before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], seconds: float) -> dict[str, float]:
    """Mean cores between two readings: the target's parts, the generator, all other targets, the machine."""

    def spent(owner: str, part: str) -> float:
        return (after[owner].get(part, 0.0) - before[owner].get(part, 0.0)) / seconds

    shares = {part: spent(name, part) for part in after[name]}
    others = sum(spent(owner, part) for owner in after if owner not in (name, "") for part in after[owner])
    return {
        k: round(v, 3)
        for k, v in {**shares, "generator": spent("", "generator"), "others": others, "machine": spent("", "machine")}.items()
    }
