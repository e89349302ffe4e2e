"""The queue of the simulator and late binding; colocated workers. What the workers' cores do, on the agenda's time."""

from __future__ import annotations

from collections import deque

from services.engine.binding import colocated_wants
from services.engine.plan import Began, Drawn, Outcome, Preempted
from services.engine.sequence import Sequence
from services.planner.agenda import Agenda
from services.planner.costs import Costs
from services.planner.lanes import MAX_BATCH, Lane, Worker
from services.planner.placement import Colocated
from services.planner.requests import Request


class System:
    """A queue and the workers that claim from it. Requests that lost their pages come back first, as the `resume` class does."""

    def __init__(self, agenda: Agenda) -> None:
        self.agenda = agenda
        self.workers: list[Worker] = []
        """Those that claim."""
        self.preempted = 0
        self._queue: deque[Request] = deque()
        self._resumed: deque[Request] = deque()
        self._first = 0

    def arrive(self, request: Request) -> None:
        self._enqueue(self._queue, request)

    def wants(self, lane: Lane) -> int:
        """Prompt tokens the lane would claim now."""
        raise NotImplementedError

    def execution(self, request: Request) -> Sequence:
        """What a claimer submits for it."""
        raise NotImplementedError

    def claim(self, lane: Lane) -> None:
        """As the workers' `Claims`: while tokens are wanted; the last request may be larger."""
        wanted = self.wants(lane) if self._queue or self._resumed else 0
        while wanted > 0 and (self._queue or self._resumed):
            request = (self._resumed or self._queue).popleft()
            sequence = self.execution(request)
            try:
                lane.scheduler.submit(sequence)
            except ValueError:
                request.refuse(self.agenda.now)
                continue
            lane.carried[sequence.key] = (request, sequence)
            lane.unbegun += 1
            lane.bound += 1
            wanted -= len(sequence.ids)

    def drawn(self, lane: Lane, outcome: Drawn) -> None:
        """Note a first or a last token. Middle ones change nothing but a count that the sequence has, and are most of all events."""
        if outcome.finish is not None:
            request, _ = lane.carried.pop(outcome.key)
            lane.bound -= 1
            request.drew(outcome, self.agenda.now)
        elif outcome.token.index == 0:
            lane.carried[outcome.key][0].drew(outcome, self.agenda.now)

    def preempt(self, lane: Lane, outcome: Preempted) -> Request:
        """The request of an execution that lost its pages. The gateway starts a new attempt behind the tokens that the client has."""
        request, sequence = lane.carried.pop(outcome.key)
        lane.bound -= 1
        request.drawn, request.preempted = sequence.index, True
        self.preempted += 1
        return request

    def resume(self, request: Request) -> None:
        self._enqueue(self._resumed, request)

    def _enqueue(self, queue: deque[Request], request: Request) -> None:
        """Whoever wants it has it at once; those who could be asked first take turns."""
        queue.append(request)
        self._first = (self._first + 1) % len(self.workers)
        for worker in (*self.workers[self._first :], *self.workers[: self._first]):
            if not self._queue and not self._resumed:
                return
            for lane in worker.lanes:
                if lane.flying:
                    self.claim(lane)
            worker.turn()


class Together(System):
    """Colocated workers."""

    def __init__(self, agenda: Agenda, costs: Costs, where: Colocated) -> None:
        super().__init__(agenda)
        self.workers = [
            Worker(agenda, costs, where.group.parallel, self.claim, self._tell, where.policy, where.budget_tokens)
            for _ in range(where.group.replicas)
        ]

    def wants(self, lane: Lane) -> int:
        return colocated_wants(lane.scheduler.snapshot(), lane.unbegun, lane.budget_tokens, MAX_BATCH)

    def execution(self, request: Request) -> Sequence:
        return request.sequence(parks=False)

    def _tell(self, lane: Lane, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            match outcome:
                case Drawn():
                    self.drawn(lane, outcome)
                case Began():
                    lane.unbegun -= 1
                case Preempted():
                    self.resume(self.preempt(lane, outcome))
