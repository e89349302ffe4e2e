"""The engine's thread: order of commands, deliveries and launches, failures, and its end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from common.errors import EngineError
from common.messages import Key, Sampling, Token
from services.engine.engine import Engine
from services.engine.pages import PagePool
from services.engine.plan import Began, Computed, Draw, Drawn, Failed, Outcome, Plan, Snapshot, StepOutput
from services.engine.policies import Limits
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence

DEADLINE_S = 10.0


def sequence(name: str, tokens: int = 4, most: int = 3) -> Sequence:
    return Sequence(Key(name, 0, 0, "x"), [1] * tokens, tokens, Sampling(), most)


class Device:
    """Draws 9s. `gate` holds a collect up; `faults` are raised by the next launches or collects."""

    def __init__(self) -> None:
        self.diary: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.collecting = threading.Event()
        self.launch_faults: deque[BaseException | None] = deque()
        self.collect_faults: deque[BaseException | None] = deque()

    def launch(self, plan: Plan) -> Plan:
        self.diary.append(f"launch {plan.number}")
        if self.launch_faults and (fault := self.launch_faults.popleft()) is not None:
            raise fault
        return plan

    def collect(self, ticket: Plan) -> StepOutput:
        self.collecting.set()
        assert self.gate.wait(DEADLINE_S)
        self.diary.append(f"collect {ticket.number}")
        if self.collect_faults and (fault := self.collect_faults.popleft()) is not None:
            raise fault
        return StepOutput(tuple(Draw(9) if chunk.draws else None for chunk in ticket.chunks))


class Listener:
    """Keeps every delivery; `until` waits for a word of the engine."""

    def __init__(self, diary: list[str]) -> None:
        self.diary = diary
        self.outcomes: list[Outcome] = []
        self.snapshots: list[Snapshot] = []
        self.deaths: list[BaseException] = []
        self.launching: list[tuple[Key, ...]] = []
        self.engine: Engine | None = None
        self._changed = threading.Condition()

    def hear(self, outcomes: list[Outcome], snapshot: Snapshot) -> None:
        self.diary.extend(type(outcome).__name__ for outcome in outcomes)
        assert self.engine is not None
        with self._changed:
            self.launching.append(self.engine.launching)
            self.outcomes += outcomes
            self.snapshots.append(snapshot)
            self._changed.notify_all()

    def die(self, error: BaseException) -> None:
        with self._changed:
            self.deaths.append(error)
            self._changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S)

    def ended(self, count: int) -> Callable[[], bool]:
        return lambda: sum(isinstance(o, Failed) or (isinstance(o, Drawn) and o.finish is not None) for o in self.outcomes) >= count


class Rig:
    def __init__(self, depth: int) -> None:
        self.pool = PagePool(64, 4)
        self.scheduler = Scheduler(self.pool, "chunked", Limits(64, 64), depth=depth)
        self.device = Device()
        self.listener = Listener(self.device.diary)
        self.engine = Engine(self.scheduler, self.device, self.listener.hear, name="test", on_death=self.listener.die)
        self.listener.engine = self.engine

    def submit(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.engine.post(self.scheduler.submit, one)


@contextmanager
def running(depth: int = 1) -> Iterator[Rig]:
    rig = Rig(depth)
    rig.engine.start()
    try:
        yield rig
    finally:
        rig.device.gate.set()
        assert rig.engine.stop(DEADLINE_S)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_posted_runs_to_its_end(depth: int) -> None:
    with running(depth) as rig:
        rig.submit(sequence("a"), sequence("b"))
        rig.listener.until(rig.listener.ended(2))
        drawn = [outcome.token for outcome in rig.listener.outcomes if isinstance(outcome, Drawn) and outcome.key.request_id == "a"]
        assert drawn == [Token(0, 9), Token(1, 9), Token(2, 9)]
        rig.listener.until(lambda: rig.listener.snapshots[-1].in_flight == 0)
        assert rig.engine.snapshot.pool.free == 64 and rig.engine.launching == ()
    assert rig.engine.error is None and not rig.listener.deaths


def test_began_is_delivered_before_the_launch_and_a_draw_before_the_next_one() -> None:
    with running() as rig:
        rig.submit(sequence("a", most=2))
        rig.listener.until(rig.listener.ended(1))
        diary = rig.device.diary
    assert rig.listener.launching == [(sequence("a").key,), (sequence("a").key,), ()]
    assert diary == ["Began", "launch 1", "collect 1", "Computed", "Drawn", "launch 2", "collect 2", "Drawn"]


def test_what_begins_under_suspicion_is_launched_when_its_gateway_knows() -> None:
    """A request that killed at once was never known to have been launched, and killed one worker after the other. To wait until the word
    had surely left was not enough on a machine without a core to spare."""
    with running() as rig:
        suspect = replace(sequence("b", most=2), suspect=True)
        rig.submit(suspect)
        rig.listener.until(lambda: "Began" in rig.device.diary)
        time.sleep(0.2)
        rig.engine.confirm([sequence("a").key])
        time.sleep(0.1)
        assert rig.device.diary == ["Began"]
        rig.engine.confirm([suspect.key])
        rig.listener.until(rig.listener.ended(1))
        diary = [line for line in rig.device.diary if not line.startswith(("collect", "Computed"))]
    assert diary == ["Began", "launch 1", "Drawn", "launch 2", "Drawn"]


@pytest.mark.parametrize("stop", [False, True])
def test_nobody_waits_for_ever_for_a_gateway_s_word(monkeypatch: pytest.MonkeyPatch, stop: bool) -> None:
    monkeypatch.setattr("services.engine.engine.CONFIRM_S", 60.0 if stop else 0.1)
    with running() as rig:
        rig.submit(replace(sequence("b", most=1), suspect=True))
        rig.listener.until(lambda: "Began" in rig.device.diary)
        if stop:
            assert rig.engine.stop(5.0)
        else:
            rig.listener.until(rig.listener.ended(1))


def test_a_step_costs_its_listener_one_delivery() -> None:
    with running() as rig:
        rig.submit(sequence("a", most=20))
        rig.listener.until(rig.listener.ended(1))
        assert len(rig.listener.snapshots) == 21  # one before each of the twenty launches, one at rest


def test_with_depth_2_the_next_launch_is_under_way_before_the_last_is_collected() -> None:
    with running(depth=2) as rig:
        rig.submit(sequence("a"))
        rig.listener.until(rig.listener.ended(1))
        launches = [line for line in rig.device.diary if line[0] in "lc"]
    assert launches == ["launch 1", "launch 2", "collect 1", "launch 3", "collect 2", "collect 3"]


@pytest.mark.parametrize("depth", [1, 2])
def test_while_a_launch_is_under_way_the_snapshot_and_the_keys_say_so(depth: int) -> None:
    with running(depth) as rig:
        rig.device.gate.clear()
        rig.submit(sequence("a"))
        assert rig.device.collecting.wait(DEADLINE_S)
        assert rig.engine.snapshot.in_flight == depth and rig.listener.snapshots[-1].in_flight == depth
        assert rig.engine.launching == (sequence("a").key,)


def test_commands_apply_in_order_between_steps_and_wake_a_sleeping_engine() -> None:
    with running() as rig:
        rig.device.gate.clear()
        rig.submit(sequence("a", most=20))
        assert rig.device.collecting.wait(DEADLINE_S)
        rig.submit(sequence("b"))
        rig.engine.post(rig.scheduler.cancel, sequence("b").key)
        rig.engine.post(rig.scheduler.cancel, sequence("a").key)
        rig.device.gate.set()
        rig.listener.until(lambda: rig.listener.snapshots[-1] == rig.engine.snapshot and rig.engine.snapshot.pool.free == 64)
        assert [type(outcome) for outcome in rig.listener.outcomes] == [Began, Computed, Drawn]
        rig.submit(sequence("c"))
        rig.listener.until(rig.listener.ended(1))


def test_a_command_without_an_outcome_still_delivers_what_it_changed() -> None:
    with running() as rig:
        parked = sequence("a")
        parked.parks = True
        rig.submit(parked)
        rig.listener.until(lambda: rig.listener.snapshots[-1].parked == 1 if rig.listener.snapshots else False)
        rig.engine.post(rig.scheduler.release, parked.key)
        rig.listener.until(lambda: rig.listener.snapshots[-1].pool.free == 64)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_failing_launch_takes_its_sequences_and_the_engine_goes_on(where: str, depth: int) -> None:
    with running(depth) as rig:
        faults = rig.device.launch_faults if where == "launch" else rig.device.collect_faults
        faults.append(RuntimeError("out of memory"))
        rig.submit(sequence("a"))
        rig.listener.until(rig.listener.ended(1))
        assert rig.listener.outcomes[-1] == Failed(sequence("a").key, "RuntimeError: out of memory")
        rig.submit(sequence("b"))
        rig.listener.until(rig.listener.ended(2))
        rig.listener.until(lambda: rig.engine.snapshot.pool.free == 64 and rig.engine.snapshot.in_flight == 0)
    assert rig.engine.error is None


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_device_that_fails_whatever_it_is_given_ends_the_engine(where: str) -> None:
    """It was always idle, claimed whatever came, and requests that it had failed three times were ended as poison."""
    with running() as rig:
        faults = rig.device.launch_faults if where == "launch" else rig.device.collect_faults
        faults.extend([RuntimeError("once"), None, RuntimeError("again"), RuntimeError("illegal memory access")])
        for number, name in enumerate("abc", 1):
            rig.submit(sequence(name, most=1))
            rig.listener.until(rig.listener.ended(number))
        assert rig.engine.error is None, "one that succeeds between two that fail"
        rig.submit(sequence("d", most=1))
        rig.listener.until(lambda: bool(rig.listener.deaths))
        assert rig.listener.ended(4)(), "what it was given is told first"
    assert isinstance(rig.engine.error, EngineError) and "illegal memory access" in str(rig.engine.error)


def test_a_request_that_fails_again_and_again_ends_no_engine() -> None:
    """On a quiet fleet its next attempt comes to the same worker: its own fault, and its gateway counts."""
    with running() as rig:
        for attempt in range(1, 4):
            rig.device.collect_faults.append(RuntimeError("out of memory"))
            rig.submit(Sequence(Key("a", 0, attempt, "x"), [1] * 4, 4, Sampling(), 1))
            rig.listener.until(rig.listener.ended(attempt))
        rig.submit(sequence("b", most=1))
        rig.listener.until(rig.listener.ended(4))
    assert rig.engine.error is None


def test_what_was_launched_ahead_of_the_news_of_a_failure_belongs_to_it() -> None:
    with running(depth=2) as rig:
        rig.device.gate.clear()
        rig.device.collect_faults.extend([RuntimeError("once"), RuntimeError("its echo")])
        rig.submit(sequence("a"))
        rig.listener.until(lambda: rig.listener.snapshots[-1].in_flight == 2 if rig.listener.snapshots else False)
        rig.device.gate.set()
        rig.listener.until(lambda: rig.engine.snapshot.pool.free == 64 and rig.engine.snapshot.in_flight == 0)
        rig.submit(sequence("b"))
        rig.listener.until(rig.listener.ended(2))
    assert rig.engine.error is None


def test_a_second_launch_that_fails_leaves_the_first_to_be_collected() -> None:
    with running(depth=2) as rig:
        rig.device.launch_faults.extend([None, RuntimeError("no")])
        rig.submit(sequence("a"))
        rig.listener.until(lambda: rig.listener.ended(1)() and rig.listener.snapshots[-1].pool.free == 64)
        assert "collect 1" in rig.device.diary and "collect 2" not in rig.device.diary
        assert not any(isinstance(outcome, Drawn) for outcome in rig.listener.outcomes)


@pytest.mark.parametrize("error", [KeyError("no such thing"), SystemExit(3)])
def test_the_engine_never_dies_in_silence(error: BaseException) -> None:
    rig = Rig(depth=1)

    def broken() -> None:
        raise error

    rig.engine.start()
    rig.engine.post(broken)
    rig.listener.until(lambda: bool(rig.listener.deaths))
    assert rig.listener.deaths == [error] and rig.engine.error is error
    assert rig.engine.stop(DEADLINE_S)


def test_stop_collects_what_is_under_way_and_plans_nothing_more() -> None:
    rig = Rig(depth=2)
    rig.device.gate.clear()
    rig.engine.start()
    rig.submit(sequence("a", most=20))
    assert rig.device.collecting.wait(DEADLINE_S)
    assert not rig.engine.stop(0.01), "the launch under way holds it up"
    rig.device.gate.set()
    assert rig.engine.stop(DEADLINE_S)
    assert rig.device.diary[-2:] == ["collect 2", "Drawn"] and rig.engine.snapshot.in_flight == 0


def test_stop_wakes_an_idle_engine_and_is_fine_before_start_and_twice() -> None:
    rig = Rig(depth=1)
    assert rig.engine.stop(DEADLINE_S)
    with running() as idle:
        pass
    assert idle.engine.stop(DEADLINE_S)
