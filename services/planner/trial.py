"""One trial: requests at one rate through one placement, judged jointly by `common.slo`. Pure, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from common.slo import Objectives, Served, attains
from services.planner.agenda import Agenda
from services.planner.apart import Apart, Written
from services.planner.costs import Costs
from services.planner.placement import Colocated, DecodeOnly, Disaggregated, PrefillOnly, Simulated
from services.planner.requests import Ask, Request
from services.planner.system import System, Together


@dataclass(frozen=True, slots=True)
class Window:
    """Which of the requests count: `skip` first ones warm the system up, the `count` after them are judged, later ones keep it warm."""

    skip: int
    count: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """`hits` of `asked` requests attained. A trial that was cut short has judged only some, in `served`, and `reached` is certain."""

    rate: float
    hits: int
    asked: int
    reached: bool
    served: tuple[Served, ...]
    preempted: int


def system_of(agenda: Agenda, costs: Costs, where: Simulated, seed: int) -> System:
    """The workers of a placement (of one of its units)."""
    match where:
        case Colocated():
            return Together(agenda, costs, where)
        case Disaggregated() | PrefillOnly():
            return Apart(agenda, costs, where, seed)
        case DecodeOnly():
            return Written(agenda, costs, where, seed)


def run(
    costs: Costs,
    where: Simulated,
    asks: Sequence[Ask],
    window: Window,
    rate: float,
    objectives: Objectives,
    share: float,
    *,
    seed: int = 0,
    whole: bool = False,
) -> Verdict:
    """`rate`: requests/s for one unit. Ends as soon as it is certain whether the share is reached, unless `whole`.

    Of PrefillOnly only the first token of each request is asked. A request that is never answered has missed.
    """
    agenda = Agenda()
    system = system_of(agenda, costs, where, seed)
    once = isinstance(where, PrefillOnly)
    requests = [Request(n, ask.at / rate, ask.input_tokens, 1 if once else ask.output_tokens) for n, ask in enumerate(asks)]
    judge = Judge(requests[window.skip : window.skip + window.count], objectives, share)
    arrivals = iter(requests)

    def arrive(request: Request) -> None:
        following = next(arrivals, None)
        if following is not None:
            agenda.at(following.due_s, partial(arrive, following))
        system.arrive(request)

    first = next(arrivals)
    agenda.at(first.due_s, partial(arrive, first))
    while agenda.step():
        judge.look(agenda.now)
        if judge.over or (judge.certain and not whole):
            break
    judge.look(agenda.now, last=True)
    return Verdict(rate, judge.hits, len(judge.requests), judge.reached, tuple(judge.served), system.preempted)


class Judge:
    """Counts who attained, in order of arrival as far as that is known, and says when the rest cannot change the verdict."""

    def __init__(self, requests: Sequence[Request], objectives: Objectives, share: float) -> None:
        self.requests = requests
        self.served: list[Served] = []
        self.hits = 0
        self._objectives = objectives
        self._needed = share * len(requests) - 1e-9
        self._due = 0
        """How many of them are due."""
        self._open: list[Request] = []
        self._look_s = 0.0
        self._late: set[int] = set()

    @property
    def over(self) -> bool:
        return len(self.served) == len(self.requests)

    @property
    def reached(self) -> bool:
        return self.hits >= self._needed

    @property
    def certain(self) -> bool:
        """Reached already, or missed by those who ended and those whose first or last token is late already."""
        return self.reached or len(self.requests) - self._missed < self._needed

    @property
    def _missed(self) -> int:
        return len(self.served) - self.hits + len(self._late)

    def look(self, now: float, *, last: bool = False) -> None:
        """Judge those who have ended. Not at every event: a fifth of the TTFT objective may pass."""
        if now < self._look_s and not last:
            return
        self._look_s = now + self._objectives.ttft_s / 5
        while self._due < len(self.requests) and self.requests[self._due].due_s <= now:
            self._open.append(self.requests[self._due])
            self._due += 1
        still = []
        for request in self._open:
            if request.done_s is not None:
                self._judge(request)
                continue
            if request.first_s is None:
                late = now - request.due_s > self._objectives.ttft_s
            else:
                late = now - request.first_s > self._objectives.tpot_s * (request.output_tokens - 1)
            if late:
                self._late.add(request.number)
            still.append(request)
        self._open = still

    def _judge(self, request: Request) -> None:
        self._late.discard(request.number)
        served = request.served()
        self.served.append(served)
        self.hits += attains(served, self._objectives)
