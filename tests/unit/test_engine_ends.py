"""A worker whose engine hangs or dies: it ends, and what it was computing is told so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from common.errors import EngineError
from common.messages import Choice, Job, Lost, Sampling
from common.queue import Entry
from services.engine.plan import Plan, StepOutput
from tests.unit.in_process import Idle, serve

JOB = Job("r", "g", "tcp://127.0.0.1:1", [1, 2, 3], [Choice(0, 1)], Sampling(), 12, deadline_s=60.0)


class Hanging(Idle):
    """What it has launched never ends."""

    def collect(self, ticket: Plan) -> StepOutput:
        threading.Event().wait()
        raise AssertionError("nobody sets it")


class Broken(Idle):
    """Nothing that it is given can be computed."""

    def __init__(self, failing: Callable[[], object]) -> None:
        self._failing = failing

    def collect(self, ticket: Plan) -> StepOutput:
        self._failing()
        raise RuntimeError("an illegal memory access was encountered")


def claim(worker: Any) -> None:
    worker.do(worker.runs.claimed(Entry("interactive", "1-0"), JOB, 0.0))


def last_words(worker: Any) -> list[Lost]:
    """Heard instead of the gateway, which is not there."""
    return [record.ending for record in worker.gateways.outbox._records.values() if isinstance(record.ending, Lost)]


def test_a_worker_whose_engine_hangs_ends_without_a_drain() -> None:
    """The others took it for dead, heard its next beat and trusted it again, every quarter of a minute, for ever; and clients waited."""
    lost: list[BaseException] = []

    def begun(worker: Any) -> None:
        def end(error: BaseException) -> None:
            lost.append(error)
            worker.service.stop()

        worker.room.ranks.lost = end
        claim(worker)

    _, service = serve(begun, runner=Hanging(), stop=lambda service: service.fail(TimeoutError("it beats on")), after_s=6.0)
    assert service.error is None
    assert isinstance(lost[0], EngineError) and "busy without a step" in str(lost[0])


def test_a_worker_that_can_compute_nothing_ends_and_says_of_what() -> None:
    again = replace(JOB, request_id="s")
    began: list[Any] = []

    def next_one() -> None:
        if began:
            worker = began.pop()
            worker._loop.call_soon_threadsafe(lambda: worker.do(worker.runs.claimed(Entry("interactive", "2-0"), again, 0.0)))

    def begun(worker: Any) -> None:
        began.append(worker)
        claim(worker)

    worker, service = serve(begun, runner=Broken(next_one), stop=lambda service: service.fail(TimeoutError("it serves on")), after_s=6.0)
    assert isinstance(service.error, EngineError), service.error
    assert {(word.key.request_id, word.reason) for word in last_words(worker)} == {("r", "failed"), ("s", "failed")}


def test_what_an_engine_was_computing_when_it_died_counts_against_it() -> None:
    """It was handed back as from any drain, and ended the next worker and the one after that."""

    def begun(worker: Any) -> None:
        def broken(plan: Plan, output: StepOutput) -> None:
            raise ValueError("no such page")

        worker.room.scheduler.commit = broken
        claim(worker)

    worker, service = serve(begun, stop=lambda service: service.fail(TimeoutError("it serves on")), after_s=6.0)
    assert isinstance(service.error, ValueError)
    (word,) = last_words(worker)
    assert word.reason == "failed" and "no such page" in word.detail
