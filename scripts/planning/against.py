"""`./scripts/plan --against FILE`: the simulator against reality, on the very requests of a `./scripts/goodput` run.

Every trial is asked again of a simulated system of the same placement: the same lengths, due at the same times. What an idle server
took in that run beyond what the simulator says of an idle one (the gateway, the words on the sockets, whatever a launch costs in a
running worker beyond its profile) is measured first, and added. Of what was measured under load only one thing is used, and no latency:
where everything else has no core of its own, it takes time from the workers' cores, and how much is in the system's own books.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec
from msgspec import Struct

from common.messages import WORKER_ROLES
from common.slo import Objectives
from scripts.planning.crossing import Asked, Crossing, crossing
from services.planner.costs import Costs, Parallel
from services.planner.placement import Colocated, Disaggregated, Group, Placement
from services.planner.requests import Ask
from services.planner.trial import Window, run

IDLE_ANSWER = 17
"""Tokens of the answers by which `./scripts/goodput` times an idle server."""
CLOSE = 0.1
ONE = Parallel(1, 1)


class AgainstError(Exception):
    """A run that cannot be compared: one line that says why."""


class Aims(Struct, frozen=True):
    ttft: list[tuple[int, float]]
    tpot_s: float
    scales: tuple[float, float]


class Idle(Struct, frozen=True):
    ttft: list[tuple[int, float]]
    """(prompt tokens, seconds)."""
    tpot_s: float


class Measured(Struct, frozen=True):
    name: str
    kind: str
    placement: str
    flags: dict[str, str]
    unloaded: Idle


class TrialOf(Struct, frozen=True):
    target: str
    rate: float
    requests: int
    attained: int
    void: bool
    cpu_cores: dict[str, float] = {}
    """Used in the mean, by role, and by the whole machine."""


class Recorded(Struct, frozen=True):
    due_s: float
    input_tokens: int
    output_tokens: int


class GoodputRun(Struct, frozen=True):
    """What is read of `./scripts/goodput`'s file."""

    command: str
    machine: str
    objectives: Aims
    targets: list[Measured]
    trials: list[TrialOf]
    records: list[list[Recorded]]
    cores: int | None = None
    """Of the machine; None: not written down, and that others may have used the workers' is left out."""


@dataclass(frozen=True)
class Compared:
    """One system. `trials`: rate, requests, attained, attained in the simulator."""

    target: str
    where: Placement
    measured: Crossing
    simulated: float
    trials: tuple[tuple[float, int, int, int], ...]
    front_s: float
    """Added to every TTFT."""
    overhead_s: float
    """Of every launch."""
    transfer_s: float
    """Of every handoff beyond its bytes."""
    taken: float
    """Share of the workers' cores that others took, in the mean of the trials."""

    @property
    def ratio(self) -> float | None:
        return self.simulated / self.measured.rate if self.measured.rate else None

    @property
    def holds(self) -> bool:
        """Within 10 %, or inside the measured one's 95 % interval."""
        close = self.ratio is not None and abs(self.ratio - 1) <= CLOSE
        return close or self.measured.low <= self.simulated <= self.measured.high


def read(path: Path) -> GoodputRun:
    """Raises AgainstError, OSError."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=GoodputRun)
    except msgspec.MsgspecError as error:
        raise AgainstError(f"{path.name} is no result of ./scripts/goodput: {error}") from error
    if len(found.objectives.ttft) != 1:
        raise AgainstError(f"{path.name}: its objectives depend on the prompt's length; give ./scripts/goodput fixed ones by --slo")
    return found


def compared(costs: Costs, found: GoodputRun, share: float) -> tuple[list[Compared], list[str]]:
    """Each system that the simulator knows, and what is left out, in words. Raises AgainstError if that is everything,
    or if a system has no valid trial."""
    aims = found.objectives
    objectives = Objectives(aims.ttft[0][1] * aims.scales[0], aims.tpot_s * aims.scales[1])
    results, left = [], []
    wheres = {target.name: placement(target) for target in found.targets}
    overheads = [
        overhead_s(costs, target, where)
        for target in found.targets
        if isinstance(where := wheres[target.name], Colocated) and target.kind == "colocated"
    ]
    for target in found.targets:
        where = wheres[target.name]
        if where is None:
            left.append(f"{target.name}: not a system of workers with one device each")
            continue
        of_a_launch = fmean(overheads) if overheads else overhead_s(costs, target, where)
        results.append(_compared(pooled(costs, target), where, target, found, objectives, share, of_a_launch))
    if not results:
        raise AgainstError("; ".join(left) or "no systems in this run")
    return results, left


def placement(target: Measured) -> Placement | None:
    """What was measured, if the simulator knows its like."""
    if target.kind == "disaggregated":
        prefill, _, decode = target.placement.partition("+")
        return Disaggregated(Group(ONE, int(prefill)), Group(ONE, int(decode)))
    workers, _, devices = target.placement.partition("×")
    if target.kind not in ("colocated", "chunked") or devices != "1":
        return None
    budget = target.flags.get("budget_tokens")
    return Colocated(Group(ONE, int(workers)), "chunked" if target.kind == "chunked" else "prefill_first", int(budget) if budget else None)


def pooled(costs: Costs, target: Measured) -> Costs:
    """With pools of the size that its workers had; not where prefills and decodes shared devices: how they did is not recorded."""
    pages = target.flags.get("pages")
    if pages is None:
        return costs
    return replace(costs, memory_bytes=costs.weight_bytes + (int(pages) + 0.5) * costs.page_tokens * costs.kv_bytes_per_token)


def slower(costs: Costs, overhead_s: float, transfer_s: float) -> Costs:
    """With so much more for each launch and each handoff."""
    launches = {tp: replace(one, overhead_s=one.overhead_s + overhead_s) for tp, one in costs.launches.items()}
    return replace(costs, launches=launches, transfer_s=costs.transfer_s + transfer_s)


def taken(trial: TrialOf, devices: int, cores: int) -> float:
    """Share of each of the workers' cores that others took in this trial: the front end, the generator, idle systems, the machine itself.
    They take it where no cores are left for them."""
    own = sum(trial.cpu_cores.get(role, 0.0) for role in WORKER_ROLES)
    others = trial.cpu_cores.get("machine", own) - own
    return min(0.9, max(0.0, others - max(0, cores - devices)) / devices)


def idle(costs: Costs, where: Placement, input_tokens: int) -> tuple[float, float]:
    """(TTFT, TPOT) of one request alone in the simulator."""
    verdict = run(costs, where, [Ask(0.0, input_tokens, IDLE_ANSWER)], Window(0, 1), 1.0, Objectives(1e9, 1e9), 1.0, whole=True)
    return verdict.served[0].ttft_s, verdict.served[0].tpot_s


def overhead_s(costs: Costs, target: Measured, where: Placement) -> float:
    """Of a launch in the running worker: what an idle server's pace is slower than the profile's."""
    return max(0.0, target.unloaded.tpot_s - median(idle(costs, where, tokens)[1] for tokens, _ in target.unloaded.ttft))


def _compared(
    costs: Costs, where: Placement, target: Measured, found: GoodputRun, objectives: Objectives, share: float, of_a_launch: float
) -> Compared:
    costs = slower(costs, of_a_launch, 0.0)
    of_a_handoff = overhead_s(costs, target, where) * (IDLE_ANSWER - 1) if isinstance(where, Disaggregated) else 0.0
    costs = slower(costs, 0.0, of_a_handoff)
    front_s = max(0.0, median(seconds - idle(costs, where, tokens)[0] for tokens, seconds in target.unloaded.ttft))
    left = Objectives(max(0.0, objectives.ttft_s - front_s), objectives.tpot_s)
    trials, shares = [], []
    for trial, records in zip(found.trials, found.records, strict=True):
        if trial.target != target.name or trial.void:
            continue
        asks = [Ask(one.due_s, one.input_tokens, one.output_tokens) for one in records]
        shares.append(0.0 if found.cores is None else taken(trial, where.devices, found.cores))
        launches = {tp: one.slowed(1 / (1 - shares[-1])) for tp, one in costs.launches.items()}
        verdict = run(replace(costs, launches=launches), where, asks, Window(0, len(asks)), 1.0, left, share, whole=True)
        trials.append((trial.rate, trial.requests, trial.attained, verdict.hits))
    if not trials:
        raise AgainstError(f"{target.name}: no trial of it is valid")
    measured = crossing([Asked(rate, hits, asked) for rate, asked, hits, _ in trials], share)
    simulated = crossing([Asked(rate, hits, asked) for rate, asked, _, hits in trials], share)
    return Compared(target.name, where, measured, simulated.rate, tuple(sorted(trials)), front_s, of_a_launch, of_a_handoff, fmean(shares))


def as_json(one: Compared) -> dict[str, Any]:
    return {
        "placement": str(one.where),
        "measured": round(one.measured.rate, 4),
        "interval95": [round(one.measured.low, 4), round(one.measured.high, 4)],
        "open_above": one.measured.open,
        "simulated": round(one.simulated, 4),
        "ratio": None if one.ratio is None else round(one.ratio, 4),
        "holds": one.holds,
        "front_ms": round(1000 * one.front_s, 3),
        "launch_overhead_ms": round(1000 * one.overhead_s, 3),
        "handoff_overhead_ms": round(1000 * one.transfer_s, 3),
        "cores_taken": round(one.taken, 4),
        "trials_rate_requests_attained_simulated": [[round(rate, 4), *counts] for rate, *counts in one.trials],
    }


def table(results: Sequence[Compared]) -> str:
    lines = [f"{'':24}{'measured':>10}{'95 % interval':>18}{'simulated':>11}{'ratio':>8}"]
    for one in results:
        interval = f"{one.measured.low:.3f} to {one.measured.high:.3f}" + ("+" if one.measured.open else "")
        ratio = "–" if one.ratio is None else f"{one.ratio:.3f}"
        lines.append(
            f"{one.target:24}{one.measured.rate:10.3f}{interval:>18}{one.simulated:11.3f}{ratio:>8}  {'holds' if one.holds else 'DIFFERS'}"
        )
    return "\n".join(lines)
