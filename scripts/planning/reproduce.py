"""`./scripts/plan --paper`: DistServe's motivating case and goodput ratios (OSDI 2024), simulated with its coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.slo import NAMED, Objectives
from scripts.launcher.show import Progress
from scripts.load.workloads import Shape, load
from scripts.planning.demand import drawn, of, wanted
from services.planner import paper
from services.planner.candidates import colocated_guess, decode_guess, prefill_guess
from services.planner.costs import Costs, Parallel
from services.planner.goodput import Rated, Wanted, curve, rated
from services.planner.placement import Colocated, DecodeOnly, Disaggregated, Group, PrefillOnly, Simulated

SEEDS = (1, 2, 3)
"""Of the motivating case; the ratios, which are far apart, take the first one."""
PLACEMENTS = {
    "distserve-a100-opt-13b": "prefill tp2 pp1, decode tp1 pp1",
    "distserve-a100-opt-66b": "prefill tp4 pp1, decode tp2 pp2",
}
"""What the paper's search found, by built-in machine."""
ONE = Parallel(1, 1)


@dataclass(frozen=True, slots=True)
class Ratio:
    """One of the paper's comparisons. `low` and `high`: the goodput ratios to vLLM that it reports for the workload."""

    name: str
    model: str
    workload: str
    objectives: Objectives
    baseline: Parallel
    prefill: Parallel
    decode: Parallel
    low: float
    high: float


RATIOS = (
    Ratio("13B ShareGPT", "13b", "chatbot", NAMED["opt-13b-sharegpt"], ONE, Parallel(2, 1), ONE, 2.0, 4.6),
    Ratio("66B ShareGPT", "66b", "chatbot", NAMED["opt-66b-sharegpt"], Parallel(4, 1), Parallel(4, 1), Parallel(2, 2), 2.0, 4.6),
    Ratio(
        "66B ShareGPT, artifact's objectives",
        "66b",
        "chatbot",
        NAMED["opt-66b-sharegpt-artifact"],
        Parallel(4, 1),
        Parallel(4, 1),
        Parallel(2, 2),
        2.0,
        4.6,
    ),
    Ratio("66B HumanEval", "66b", "code", NAMED["opt-66b-humaneval"], Parallel(4, 1), Parallel(4, 1), Parallel(2, 2), 5.7, 5.7),
)


def everything(say: Progress) -> dict[str, Any]:
    return {"motivating": motivating(say), "ratios": [ratio(one, say) for one in RATIOS]}


def motivating(say: Progress) -> dict[str, Any]:
    """13B, one A100 for each worker, prompts of 512 and answers of 64 tokens.

    The objectives of that figure are not among our notes. They are set to what two of its figures imply with vLLM's coefficients (the P90
    TTFT of prefill alone at 5.6 requests/s, the P90 TPOT colocated at 1.6); the other figures are then predictions.
    """
    costs = paper.costs("vllm-a100-opt-13b")
    shapes = [Shape(512, 64)]
    source = drawn(shapes, 1.0)
    loose = of(shapes, source, Objectives(1.0, 0.1), 0.9)
    prefill, colocated = PrefillOnly(Group(ONE, 1)), Colocated(Group(ONE, 1))
    objectives = Objectives(
        _p90([one.ttft_s for one in curve(costs, prefill, loose, [5.6])[0].served]),
        _p90([one.tpot_s for one in curve(costs, colocated, loose, [1.6])[0].served]),
    )
    say(f"motivating case: implied objectives {objectives.ttft_s:.3f} s and {objectives.tpot_s:.4f} s")
    found = []
    for engine in ("vllm", "distserve"):
        costs = paper.costs(f"{engine}-a100-opt-13b")
        want = of(shapes, source, objectives, 0.9)
        decode = DecodeOnly(Group(ONE, 1))
        pair = Disaggregated(Group(ONE, 2), Group(ONE, 1))
        cases: tuple[tuple[Simulated, float, float], ...] = (
            (colocated, 1.6, colocated_guess(costs, ONE, want)),
            (prefill, 5.6, prefill_guess(costs, ONE, want)),
            (decode, 10.0, decode_guess(costs, ONE, want)),
            (pair, 3.3, 2 * prefill_guess(costs, ONE, want)),
        )
        for where, theirs, guess in cases:
            one = rated(costs, where, want, guess, seeds=SEEDS)
            say(f"  {engine:9}  {one.per_device:6.2f} requests/s a GPU (paper {theirs:g})   {where}")
            found.append({"coefficients": engine, "placement": str(where), "per_gpu": round(one.per_device, 3), "paper": theirs})
    return {"objectives": [round(objectives.ttft_s, 4), round(objectives.tpot_s, 4)], "cases": found}


def ratio(one: Ratio, say: Progress) -> dict[str, Any]:
    """Goodput per GPU of the paper's placement against colocated workers, with vLLM's coefficients and with the same engine's."""
    say(f"{one.name}: TTFT ≤ {one.objectives.ttft_s:g} s, TPOT ≤ {one.objectives.tpot_s:g} s, paper {one.low:g} to {one.high:g} times vLLM")
    want = wanted(load(one.workload, 2048, 1), one.objectives, 0.9, 1.0)
    own, vllm = paper.costs(f"distserve-a100-opt-{one.model}"), paper.costs(f"vllm-a100-opt-{one.model}")
    base = Group(one.baseline, 1)
    rows = {"vllm": _one(vllm, Colocated(base), want, say, "vLLM's coefficients")}
    rows["same engine"] = _one(own, Colocated(base), want, say, "same engine")
    chunked = [_one(own, Colocated(base, "chunked", budget), want, say, "same engine") for budget in (512, 1024)]
    rows["same engine, chunked"] = max(chunked, key=lambda rate: rate.per_device)
    apart = max(_mixes(own, one, want, say), key=lambda rate: rate.per_device)
    figures = {name: round(rate.per_device, 4) for name, rate in rows.items()}
    ratios = {name: round(apart.per_device / rate.per_device, 3) if rate.goodput else None for name, rate in rows.items()}
    say(f"  {apart.where}: {apart.per_device:.3f} requests/s a GPU; times colocated: {ratios}")
    return {
        "name": one.name,
        "paper": [one.low, one.high],
        "disaggregated": str(apart.where),
        "per_gpu": round(apart.per_device, 4),
        "colocated_per_gpu": figures,
        "ratios": ratios,
    }


def _one(costs: Costs, where: Colocated, want: Wanted, say: Progress, words: str) -> Rated:
    found = rated(costs, where, want, colocated_guess(costs, where.group.parallel, want))
    say(f"  {found.per_device:6.3f} requests/s a GPU   {where}, {words}")
    return found


def _mixes(costs: Costs, one: Ratio, want: Wanted, say: Progress) -> Sequence[Rated]:
    """The paper's degrees in the mix of replicas that suits them: one of the phases once."""
    prefill, decode = prefill_guess(costs, one.prefill, want), decode_guess(costs, one.decode, want)
    found = []
    for n, m in ((1, 1), (2, 1), (1, 2)):
        where = Disaggregated(Group(one.prefill, n), Group(one.decode, m))
        found.append(rated(costs, where, want, 0.8 * min(n * prefill, m * decode)))
        say(f"  {found[-1].per_device:6.3f} requests/s a GPU   {where}")
    return found


def _p90(values: Sequence[float]) -> float:
    return sorted(values)[int(0.9 * len(values))]
