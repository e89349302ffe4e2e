"""Workers of the simulator: the real scheduler, policy and page pool on a device that only takes time. No torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from common.messages import Key
from services.engine.pages import PagePool
from services.engine.plan import Draw, Outcome, Plan, StepOutput
from services.engine.policies import Limits, PolicyName
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence
from services.planner.agenda import Agenda
from services.planner.costs import Costs, Parallel
from services.planner.requests import Request

MAX_BATCH = 256
"""Sequences in a decode step: the workers' default."""
DRAW = Draw(0)


class Lane:
    """One scheduler with its pool. A pipeline of pp stages has pp lanes, each with its part of the pages.

    The workers differ: they have one scheduler with `stages` and one pool, and a launch takes a share of the running sequences. The
    simulator models a pipeline as one scheduler for each micro-batch, which puts all of its running sequences into each launch.
    """

    def __init__(self, worker: Worker, pool: PagePool, policy: PolicyName, limits: Limits) -> None:
        self.worker = worker
        self.pool = pool
        self.scheduler = Scheduler(pool, policy, limits)
        self.budget_tokens = limits.budget_tokens
        self.flying = False
        self.carried: dict[Key, tuple[Request, Sequence]] = {}
        self.unbegun = 0
        self.bound = 0
        """Requests that are here or on their way."""


class Worker:
    """Equal pipeline stages that launches pass one after the other. `claim` fetches work for a lane, `tell` hears its outcomes."""

    def __init__(
        self,
        agenda: Agenda,
        costs: Costs,
        parallel: Parallel,
        claim: Callable[[Lane], None],
        tell: Callable[[Lane, list[Outcome]], None],
        policy: PolicyName = "prefill_first",
        budget_tokens: int | None = None,
    ) -> None:
        self._agenda = agenda
        self._model = costs.launches[parallel.tp]
        self._claim = claim
        self._tell = tell
        self.parallel = parallel
        self.link_free_s = 0.0
        """When its way for pages is free again."""
        saturating, chunk = costs.limits(parallel.tp)
        limits = Limits(budget_tokens or saturating, chunk, MAX_BATCH)
        share = costs.pages(parallel) // parallel.pp
        self.lanes = [Lane(self, PagePool(share, costs.page_tokens), policy, limits) for _ in range(parallel.pp)]
        self._stages = [0.0] * parallel.pp
        self._next = 0
        self.busy_s = 0.0
        """Time its first stage has been occupied."""

    @property
    def bound(self) -> int:
        return sum(lane.bound for lane in self.lanes)

    @property
    def available_pages(self) -> int:
        return sum(lane.pool.available for lane in self.lanes)

    @property
    def open(self) -> bool:
        """Whether a launch could enter now."""
        return self._stages[0] <= self._agenda.now

    def turn(self) -> None:
        """Start what can start: like the engine, commands first, then the next launch of a lane that has none in flight."""
        for _ in self.lanes:
            if not self.open:
                return
            lane = self.lanes[self._next]
            self._next = (self._next + 1) % len(self.lanes)
            if not lane.flying:
                self._start(lane)

    def _start(self, lane: Lane) -> None:
        self._claim(lane)
        plan = lane.scheduler.next()
        outcomes = lane.scheduler.take_outcomes()
        if plan is not None:
            self._launch(lane, plan)
        if outcomes:
            self._tell(lane, outcomes)

    def _launch(self, lane: Lane, plan: Plan) -> None:
        seconds = self._model.stage_s(plan, len(self._stages))
        at = self._agenda.now
        for stage, free in enumerate(self._stages):
            at = self._stages[stage] = max(at, free) + seconds
        self.busy_s += seconds
        lane.flying = True
        if len(self._stages) > 1:
            self._agenda.at(self._stages[0], self.turn)
        self._agenda.at(at, partial(self._land, lane, plan))

    def _land(self, lane: Lane, plan: Plan) -> None:
        lane.flying = False
        lane.scheduler.commit(plan, StepOutput((DRAW,) * len(plan.chunks)))
        self._tell(lane, lane.scheduler.take_outcomes())
        self.turn()
