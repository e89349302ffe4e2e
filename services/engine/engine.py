"""The engine's thread: commands in, launches, outcomes out. It knows ids and never text, and opens no socket."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from common.errors import EngineError
from common.logs import get_logger
from common.messages import Key
from services.engine.pace import Clocked, Pace
from services.engine.plan import Outcome, Plan, Snapshot, StepOutput
from services.engine.scheduler import Scheduler

log = get_logger(__name__)

FAILURES = 2
"""So many launches fail in a row, none with a request of the one before: then it is the device and not what it was given. A worker that can
compute nothing is always idle, claims whatever comes, and each request that it fails three times is ended for it."""
CONFIRM_S = 2.0
"""A suspect's first launch waits at most so long for its gateway to say that it knows of it: only then a death in it is known for one."""


class Runner(Protocol):
    """Computes plans. `launch` may return before the device is done; `collect` waits for it. Either may raise: the launch has failed."""

    def launch(self, plan: Plan) -> Any: ...

    def collect(self, ticket: Any) -> StepOutput: ...


class Engine:
    """Drives scheduler and runner on a thread of its own. Both belong to that thread from `start` on: use `post`.

    `on_outcomes` and `on_death` are called on that thread. Outcomes are delivered before the launch that follows them, so that `Began` is
    known before the work is under way, and a step costs its listener one wake-up. Whatever ends the thread before `stop` is kept in
    `error` and given to `on_death`: a worker must not outlive its engine.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        on_outcomes: Callable[[list[Outcome], Snapshot], None],
        *,
        name: str,
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._on_outcomes = on_outcomes
        self._on_death = on_death
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._under_way: deque[tuple[Plan, Any]] = deque()
        self._unconfirmed: set[Key] = set()
        """Suspects whose launch waits for their gateways' word."""
        self._thread = threading.Thread(target=self._live, name=f"engine-{name}", daemon=True)
        self.snapshot = scheduler.snapshot()
        """The latest, from any thread: while a launch is under way it says so."""
        self.error: BaseException | None = None
        self._clocked = Clocked()
        self._failures = 0
        """Launches that have failed since the last one that did not; one that was launched ahead of the news of a failure belongs to it."""
        self._failed_to = 0
        """The last launch when the last failure was known."""
        self._failed_with: set[str] = set()
        """Requests of the launches that have failed since one did not: what fails with the same again may be their fault."""
        self._began_at = 0.0

    @property
    def pace(self) -> Pace:
        """How fast launches have been of late, from any thread."""
        return self._clocked.pace

    @property
    def launching(self) -> tuple[Key, ...]:
        """Executions in the launches under way."""
        keys = [chunk.sequence.key for plan, _ in tuple(self._under_way) for chunk in plan.chunks]
        return tuple(dict.fromkeys(keys))

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Callable[..., None], *arguments: Any) -> None:
        """Have a command of the scheduler applied between two steps, in the order of posting. From any thread; never blocks."""
        self._inbox.append((command, arguments))
        with self._wake:
            self._wake.notify()

    def confirm(self, keys: Iterable[Key]) -> None:
        """Their gateways know that these are launched here. From any thread."""
        with self._wake:
            self._unconfirmed.difference_update(keys)
            self._wake.notify()

    def stop(self, timeout_s: float) -> bool:
        """End after collecting what is under way. False if that takes longer: the thread will not hold the process up."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _live(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as error:
            self.error = error
            log.exception("the engine's thread has died", error)
            self._on_death(error)

    def _step(self) -> bool:
        """Apply commands, launch what can be launched; otherwise collect the oldest launch; otherwise wait. False: it is time to end."""
        while self._inbox:
            command, arguments = self._inbox.popleft()
            command(*arguments)
        plan = None if self._stopping else self._scheduler.next()
        if plan is not None:
            self._launch(plan)
            return True
        self._report()
        if self._under_way:
            self._collect()
            return True
        with self._wake:
            while not self._inbox and not self._stopping:
                self._wake.wait()
        return not self._stopping

    def _launch(self, plan: Plan) -> None:
        if not self._under_way:
            self._began_at = time.monotonic()
        self._under_way.append((plan, None))
        self._report()
        if plan.announced:
            self._await(set(plan.announced))
        try:
            self._under_way[-1] = (plan, self._runner.launch(plan))
        except Exception as error:
            self._under_way.pop()
            self._failed(plan, error)

    def _await(self, suspects: set[Key]) -> None:
        give_up = time.monotonic() + CONFIRM_S
        with self._wake:
            self._unconfirmed = suspects
            while self._unconfirmed and not self._stopping and (left_s := give_up - time.monotonic()) > 0:
                self._wake.wait(left_s)
            self._unconfirmed = set()

    def _collect(self) -> None:
        """The launch stays visible as under way until its outcome is known to the scheduler."""
        plan, ticket = self._under_way[0]
        try:
            output = self._runner.collect(ticket)
        except Exception as error:
            self._failed(plan, error)
        else:
            self._failures = 0
            self._failed_with.clear()
            now = time.monotonic()
            self._clocked.note(plan, now - self._began_at)
            self._began_at = now
            self._scheduler.commit(plan, output)
        self._under_way.popleft()

    def _failed(self, plan: Plan, error: Exception) -> None:
        """A launch that raises takes its own sequences with it, and nobody else's."""
        log.exception("a launch has failed", error, launch=plan.number, sequences=len(plan.chunks))
        self._scheduler.abort(plan, f"{type(error).__name__}: {error}")
        requests = {chunk.sequence.key.request_id for chunk in plan.chunks}
        self._failures += plan.number > self._failed_to and self._failed_with.isdisjoint(requests)
        self._failed_with |= requests
        self._failed_to = max([plan.number, *(ahead.number for ahead, _ in self._under_way)])
        if self._failures >= FAILURES:
            self._report()
            raise EngineError(f"{self._failures} launches in a row have failed, the last: {type(error).__name__}: {error}") from error

    def _report(self) -> None:
        outcomes = self._scheduler.take_outcomes()
        snapshot = self._scheduler.snapshot()
        changed = snapshot != self.snapshot
        self.snapshot = snapshot
        if outcomes or changed:
            self._on_outcomes(outcomes, snapshot)
