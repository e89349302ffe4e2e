"""Prefill and decode on workers of their own, in the simulator: offer, grant, pages on their way, commit. And decode alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from common.messages import Key, Token
from services.engine.binding import less_loaded, prefill_wants, stays
from services.engine.plan import Began, Computed, Drawn, Granted, Handoff, Outcome, Preempted
from services.engine.sequence import Sequence
from services.planner.agenda import Agenda
from services.planner.costs import Costs
from services.planner.lanes import Lane, Worker
from services.planner.placement import DecodeOnly, Disaggregated, Group, PrefillOnly
from services.planner.requests import Request
from services.planner.system import System


class Decodes:
    """The decode workers and what is offered to them."""

    def __init__(
        self,
        agenda: Agenda,
        costs: Costs,
        group: Group,
        rng: random.Random,
        tell: Callable[[Lane, list[Outcome]], None],
    ) -> None:
        self.workers = [Worker(agenda, costs, group.parallel, lambda lane: None, tell, "chunked") for _ in range(group.replicas)]
        self._rng = rng
        self._numbers: Iterator[int] = iter(range(1 << 62))

    def offer(self, request: Request) -> tuple[Handoff, Lane, Sequence]:
        """Stand in line at the less loaded of two. Raises ValueError if it can never fit. The worker still has to take its turn."""
        worker = less_loaded(self.workers, lambda one: (one.bound, -one.available_pages), self._rng)
        lane = min(worker.lanes, key=lambda one: one.bound)
        sequence = request.sequence(parks=False)
        handoff = ("", next(self._numbers))
        lane.scheduler.reserve(handoff, sequence)
        lane.bound += 1
        lane.carried[sequence.key] = (request, sequence)
        return handoff, lane, sequence


@dataclass(eq=False, slots=True)
class Going:
    """A sequence on its way from a prefill's lane to a decode's."""

    key: Key
    source: Lane
    there: Key
    """Its execution on the target."""
    target: Lane
    index: int
    """Of the token that the prefill draws."""
    pages: int
    """To send in all."""
    granted: bool = False
    final: int = 0
    """Pages whose KV is complete."""
    pushed: int = 0
    sent_s: float = 0.0


class Apart(System):
    """Prefill and decode workers. Without decodes every request must end with its first token."""

    def __init__(self, agenda: Agenda, costs: Costs, where: Disaggregated | PrefillOnly, seed: int) -> None:
        super().__init__(agenda)
        self._costs = costs
        self._going: dict[Handoff, Going] = {}
        self._handoff_of: dict[Key, Handoff] = {}
        self.transfer_busy_s = 0.0
        self._across, self._short_tokens = False, 0
        self.decodes: Decodes | None = None
        group = where.group if isinstance(where, PrefillOnly) else where.prefill
        self.workers = [Worker(agenda, costs, group.parallel, self.claim, self._prefilled, "decode_first") for _ in range(group.replicas)]
        if isinstance(where, Disaggregated):
            self._across, self._short_tokens = where.across_nodes, where.short_tokens
            self.decodes = Decodes(agenda, costs, where.decode, random.Random(seed), self._decoded)

    def wants(self, lane: Lane) -> int:
        return prefill_wants(lane.scheduler.snapshot(), lane.unbegun, lane.budget_tokens)

    def execution(self, request: Request) -> Sequence:
        return request.sequence(parks=not self._stays(request))

    def _stays(self, request: Request) -> bool:
        return stays(request.output_tokens - request.drawn, 1, self._short_tokens)

    def _prefilled(self, lane: Lane, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            match outcome:
                case Began():
                    lane.unbegun -= 1
                    self._began(lane, outcome)
                case Computed():
                    handoff = self._handoff_of.get(outcome.key)
                    if handoff is not None:
                        self._final(handoff, outcome.tokens // self._costs.page_tokens)
                case Drawn():
                    self.drawn(lane, outcome)
                    handoff = self._handoff_of.get(outcome.key)
                    if handoff is not None:
                        self._final(handoff, self._going[handoff].pages)
                case Preempted():
                    self._withdraw(outcome.key)
                    self.resume(self.preempt(lane, outcome))
                case _:
                    raise AssertionError(f"on a prefill: {outcome}")

    def _withdraw(self, key: Key) -> None:
        """It has lost its pages here before they were all sent: the decode lets go of what it had granted."""
        handoff = self._handoff_of.pop(key, None)
        if handoff is None:
            return
        going = self._going.pop(handoff)
        target = going.target
        target.scheduler.lapse(handoff)
        target.scheduler.landed(handoff)
        del target.carried[going.there]
        target.bound -= 1

    def _began(self, lane: Lane, outcome: Began) -> None:
        """Offer at once, so that the grant is there before the first page is final; short answers stay."""
        request, sequence = lane.carried[outcome.key]
        if not sequence.parks or request.drawn + 1 >= request.output_tokens:
            return
        assert self.decodes is not None, "a request of many tokens, and prefills only"
        try:
            handoff, target, offered = self.decodes.offer(request)
        except ValueError:  # the gateway refuses what the smallest pool cannot hold before it is claimed; here it is found late
            lane.scheduler.cancel(outcome.key)
            lane.carried.pop(outcome.key)
            lane.bound -= 1
            request.refuse(self.agenda.now)
            return
        pages = -(-len(sequence.ids) // self._costs.page_tokens)
        self._going[handoff] = Going(outcome.key, lane, offered.key, target, request.drawn, pages)
        self._handoff_of[outcome.key] = handoff
        target.worker.turn()

    def _final(self, handoff: Handoff, pages: int) -> None:
        self._going[handoff].final = pages
        self._push(handoff)

    def _push(self, handoff: Handoff) -> None:
        """Pages go as soon as they are final and granted, one handoff at a time at either end."""
        going = self._going[handoff]
        count = going.final - going.pushed
        if not going.granted or not count:
            return
        source, target = going.source.worker, going.target.worker
        seconds = self._costs.transferred_s(count, self._across)
        if not self._across:  # each device has its own way out; the devices of a node share one between nodes
            seconds /= min(source.parallel.devices, target.parallel.devices)
        begin = max(self.agenda.now, source.link_free_s, target.link_free_s)
        source.link_free_s = target.link_free_s = going.sent_s = begin + seconds
        self.transfer_busy_s += seconds
        going.pushed = going.final
        if going.pushed == going.pages:
            self.agenda.at(going.sent_s + self._costs.transfer_s, partial(self._commit, handoff))

    def _commit(self, handoff: Handoff) -> None:
        going = self._going.pop(handoff)
        del self._handoff_of[going.key]
        going.target.scheduler.admit(handoff, Token(going.index, 0))
        going.source.scheduler.release(going.key)
        del going.source.carried[going.key]
        going.source.bound -= 1
        going.target.worker.turn()
        going.source.worker.turn()

    def _decoded(self, lane: Lane, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            match outcome:
                case Drawn():
                    self.drawn(lane, outcome)
                case Granted() if outcome.handoff in self._going:
                    self._going[outcome.handoff].granted = True
                    self._push(outcome.handoff)
                case Granted():
                    pass  # withdrawn meanwhile
                case Preempted():
                    self.resume(self.preempt(lane, outcome))


class Written(System):
    """Decodes alone: a request's prompt is computed, and its first token drawn, the moment it arrives."""

    def __init__(self, agenda: Agenda, costs: Costs, where: DecodeOnly, seed: int) -> None:
        super().__init__(agenda)
        self.decodes = Decodes(agenda, costs, where.group, random.Random(seed), self._decoded)
        self._offered: dict[Handoff, Request] = {}

    def arrive(self, request: Request) -> None:
        now = self.agenda.now
        request.first_s = now
        if request.output_tokens == 1:
            request.drawn, request.done_s = 1, now
            return
        self.resume(request)

    def resume(self, request: Request) -> None:
        try:
            handoff, lane, _ = self.decodes.offer(request)
        except ValueError:
            request.refuse(self.agenda.now)
            return
        self._offered[handoff] = request
        lane.worker.turn()

    def _decoded(self, lane: Lane, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            match outcome:
                case Drawn():
                    self.drawn(lane, outcome)
                case Granted():
                    request = self._offered.pop(outcome.handoff)
                    lane.scheduler.admit(outcome.handoff, Token(request.drawn, 0))
                    self.agenda.at(self.agenda.now, lane.worker.turn)
                case Preempted():
                    self.resume(self.preempt(lane, outcome))
