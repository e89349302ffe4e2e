"""The search: phases alone, then both together, then the colocated baselines, then the best of each over several seeds.

It is DistServe's search with what the paper leaves out: the real scheduler, the cost of the transfer, both objectives on the same request,
and the chance that not to disaggregate is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from services.planner import candidates
from services.planner.candidates import Algorithm, Cluster
from services.planner.costs import Costs, Parallel
from services.planner.goodput import COARSE, FINE, Rated, Wanted, differ, rated, reaches
from services.planner.placement import Colocated, DecodeOnly, Disaggregated, Group, Placement, PrefillOnly, Simulated

JOINT = 6
"""Placements of both phases that are simulated."""
SEEDS = (1, 2, 3, 4)
RESOLUTION, FINAL_RESOLUTION = 1.08, 1.03
BUDGETS = (512, 1024, 256)
"""Tokens in a launch that `chunked` is tried with."""
BETTER = 1.03
"""Times the goodput of the best so far that a further placement must reach to be searched: many promise the same."""
NEAR = 0.8
"""Of the best colocated worker's goodput per device, what one of another degree must reach to be looked at."""
JOINT_SHARE = 0.85
"""Of what its phases promise alone, a placement may keep about this much with both objectives on the same request: where to start."""

Say = Callable[[str], None]
Verdict = Literal["disaggregate", "do not disaggregate", "either"]
Merit = tuple[bool, int, float]
P = TypeVar("P", bound=Simulated)


class PlanError(Exception):
    """There is nothing to choose from: one line that says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What to start. `either`: the best of both kinds differ by no more than chance; `chosen` is then the one with the higher mean."""

    verdict: Verdict
    chosen: Rated
    runner_up: Rated | None
    best_colocated: Rated | None
    best_disaggregated: Rated | None
    reaches_rate: bool
    """Whether `chosen` reaches the rate that was asked for; True if none was."""
    algorithm: Algorithm
    prefills: tuple[Rated, ...]
    """One prefill worker alone, by degree."""
    decodes: tuple[Rated, ...]
    tried: tuple[Rated, ...]
    """Whole placements, each by one seed; those that a trial ruled out are not among them."""


def plan(
    costs: Costs,
    wanted: Wanted,
    cluster: Cluster,
    longest_tokens: int,
    say: Say,
    *,
    rate: float | None = None,
    algorithm: Algorithm | None = None,
    most_stages: int | None = None,
    seeds: Sequence[int] = SEEDS,
) -> Answer:
    """The placement with the highest goodput on the cluster; with a `rate` (requests/s), the fewest devices that reach it.

    `longest_tokens`: of a request, prompt and answer; every worker must be able to hold one. `most_stages`: of a pipeline.
    `seeds`: of the trials that decide among the best. Raises PlanError.
    """
    chosen_algorithm = algorithm or candidates.algorithm_for(cluster, costs)
    degrees = [one for one in candidates.parallels(cluster, costs, longest_tokens) if one.pp <= (most_stages or one.pp)]
    if not degrees:
        raise PlanError(f"no worker on {cluster.gpus} devices can hold a request of {longest_tokens} tokens of {costs.name}")
    search = Search(costs, wanted, cluster, rate, say, seeds)
    prefills, decodes = search.phases(degrees)
    apart = search.apart(chosen_algorithm, prefills, decodes)
    together = search.together(prefills, decodes)
    finals = search.finals(apart, together)
    if not finals or not finals[0].goodput:
        raise PlanError(f"nothing on {cluster.gpus} devices meets the objectives at any rate: loosen them, or use faster devices")
    best_apart = next((one for one in finals if isinstance(one.where, Disaggregated)), None)
    best_together = next((one for one in finals if isinstance(one.where, Colocated)), None)
    return Answer(
        verdict=_verdict(best_apart, best_together, search.merit),
        chosen=finals[0],
        runner_up=finals[1] if len(finals) > 1 else None,
        best_colocated=best_together,
        best_disaggregated=best_apart,
        reaches_rate=rate is None or finals[0].goodput >= rate,
        algorithm=chosen_algorithm,
        prefills=tuple(prefills.values()),
        decodes=tuple(decodes.values()),
        tried=tuple((*apart, *together)),
    )


def _verdict(apart: Rated | None, together: Rated | None, merit: Callable[[Rated], Merit]) -> Verdict:
    if apart is None or not apart.goodput:
        return "do not disaggregate"
    if together is None or not together.goodput:
        return "disaggregate"
    if merit(apart)[:2] == merit(together)[:2] and not differ(apart, together):
        return "either"
    return "disaggregate" if merit(apart) > merit(together) else "do not disaggregate"


class Search:
    """The steps of `plan`, with what they share."""

    def __init__(self, costs: Costs, wanted: Wanted, cluster: Cluster, rate: float | None, say: Say, seeds: Sequence[int]) -> None:
        self._costs = costs
        self._wanted = wanted
        self._cluster = cluster
        self._rate = rate
        self._say = say
        self._seeds = seeds

    def merit(self, one: Rated) -> Merit:
        """Larger is better: reaches the rate, then on fewer devices, then the higher goodput."""
        return self._merit(one.goodput, one.where.devices)

    def _merit(self, goodput: float, devices: int) -> Merit:
        enough = self._rate is not None and goodput >= self._rate
        return enough, -devices if enough else 0, goodput

    def phases(self, degrees: Sequence[Parallel]) -> tuple[dict[Parallel, Rated], dict[Parallel, Rated]]:
        """Goodput of one worker of each phase alone, by degree.

        A decode has to leave room for a prefill, and need not be faster than all prefills could ever feed it.
        """
        prefills = {p: self._rate_one(PrefillOnly(Group(p, 1)), candidates.prefill_guess(self._costs, p, self._wanted)) for p in degrees}
        fed = self._cluster.gpus * max(one.per_device for one in prefills.values())
        decodes = {}
        smallest = min(one.devices for one in degrees)
        for parallel in [one for one in degrees if one.devices + smallest <= self._cluster.gpus] if fed else []:
            guess = candidates.decode_guess(self._costs, parallel, self._wanted)
            decodes[parallel] = self._rate_one(DecodeOnly(Group(parallel, 1)), guess, ceiling=fed)
        return prefills, decodes

    def apart(self, algorithm: Algorithm, prefills: dict[Parallel, Rated], decodes: dict[Parallel, Rated]) -> list[Rated]:
        """Simulate the most promising pairs jointly; one that misses a little above the best so far is given up after that trial."""
        phases = [{p: one.goodput for p, one in phase.items() if one.goodput} for phase in (prefills, decodes)]
        promises = list(candidates.pairs(self._cluster, algorithm, *phases))
        promises.sort(key=lambda pair: (self._merit(pair[0], pair[1].devices), -pair[1].devices), reverse=True)
        tried: list[Rated] = []
        for promise, where in promises[:JOINT]:
            best = max((one for one in tried if one.goodput), key=self.merit, default=None)
            found = self._challenge(where, JOINT_SHARE * promise, best)
            if found is not None:
                tried.append(found)
        return sorted(tried, key=self.merit, reverse=True)

    def together(self, prefills: dict[Parallel, Rated], decodes: dict[Parallel, Rated]) -> list[Rated]:
        """One worker of each degree under each policy; the two best degrees' replicas over the cluster.

        No worker of both phases does better than the same worker with one of them: what could not win is left out.
        """
        bounds = {p: min(one.per_device, decodes[p].per_device if p in decodes else one.per_device) for p, one in prefills.items()}
        best: dict[Parallel, tuple[float, Colocated]] = {}
        for parallel in sorted(bounds, key=lambda p: -bounds[p]):
            leader = max((per_device for per_device, _ in best.values()), default=0.0)
            if bounds[parallel] <= leader:
                continue
            guess = candidates.colocated_guess(self._costs, parallel, self._wanted)
            for where in (Colocated(Group(parallel, 1)), *(Colocated(Group(parallel, 1), "chunked", budget) for budget in BUDGETS)):
                # A degree in which one worker is not the best may still make the best replicas: it shall come close.
                bar = max(best[parallel][0] if parallel in best else 0.0, NEAR * leader) * parallel.devices
                if bar and not reaches(self._costs, where, self._wanted, bar):
                    self._say(f"                  less   {where}")
                    continue
                found = self._rate_one(where, bar or guess)
                if found.goodput:
                    best[parallel] = (found.per_device, where)
        tried = []
        for per_device, where in sorted(best.values(), key=lambda pair: -pair[0])[:2]:
            tried.append(self._replicated(per_device, where))
        return sorted(tried, key=self.merit, reverse=True)

    def _replicated(self, per_device: float, where: Colocated) -> Rated:
        """As many workers as the cluster holds, or as a wanted rate needs."""
        parallel = where.group.parallel
        most = self._cluster.gpus // parallel.devices
        replicas = most if self._rate is None else min(most, int(self._rate / (per_device * parallel.devices) * 0.9) + 1)
        while True:
            many = Colocated(Group(parallel, replicas), where.policy, where.budget_tokens)
            found = self._rate_one(many, per_device * many.devices)
            if self._rate is None or found.goodput >= self._rate or replicas == most:
                return found
            replicas += 1

    def finals(self, apart: Sequence[Rated], together: Sequence[Rated]) -> list[Rated]:
        """The best of either kind and the best of all others again, over all seeds and to a narrower bracket; the best one first."""
        firsts, others = [*apart[:1], *together[:1]], [*apart[1:], *together[1:]]
        chosen = [*firsts, *sorted(others, key=self.merit, reverse=True)[:1]]
        again = [self._rate_one(one.where, one.goodput, self._seeds) for one in chosen if one.goodput]
        return sorted(again, key=self.merit, reverse=True)

    def _challenge(self, where: Placement, guess: float, best: Rated | None) -> Rated | None:
        if best is not None and self._rate is None and not reaches(self._costs, where, self._wanted, BETTER * best.goodput):
            self._say(f"                  less   {where}")
            return None
        return self._rate_one(where, guess if best is None else max(guess, best.goodput))

    def _rate_one(self, where: Simulated, guess: float, seeds: Sequence[int] = SEEDS[:1], ceiling: float = float("inf")) -> Rated:
        resolution, span = (RESOLUTION, COARSE) if len(seeds) == 1 else (FINAL_RESOLUTION, FINE)
        found = rated(self._costs, where, self._wanted, guess, seeds=seeds, resolution=resolution, span=span, ceiling=ceiling)
        more = "+" if found.goodput >= ceiling else " "
        self._say(f"{found.per_device:8.3f}{more} requests/s a device   {where}")
        return found
