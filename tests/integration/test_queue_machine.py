"""The job queue against a model of it, on a real Valkey that restarts empty: nobody is given a job twice, and none is lost by itself."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from common import names
from common.entries import Absent, Entry, Pending, Queued
from common.messages import Choice, Job, Sampling
from common.queue import JobQueue, connect
from scripts.launcher.valkey import Valkey

FULL = int(os.environ.get("BATON_TEST_EXAMPLES", "400")) if os.environ.get("BATON_TEST_FULL") else 0
pytestmark = pytest.mark.timeout(3600 if os.environ.get("BATON_TEST_FULL") else 120)
CONSUMERS = st.sampled_from(["a", "b"])
JOB_CLASSES = st.sampled_from(names.CLASSES)
CHOOSE = st.integers(0, 30)


@dataclass
class Known:
    entry: Entry
    job: Job
    consumer: str | None = None


class Queue(RuleBasedStateMachine):
    """Each rule does to the model what the queue promises, and compares."""

    server: Valkey

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.redis = connect(self.server.url)
        self.do(self.redis.flushall())
        self.queue = JobQueue(self.redis, "fleet", "print")
        self.known: list[Known] = []
        self.gone: list[Entry] = []
        self.put_so_far = 0

    def do(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @rule(job_class=JOB_CLASSES)
    def put(self, job_class: str) -> None:
        self.put_so_far += 1
        job = Job(f"r{self.put_so_far}", "g", "t", [1, 2], [Choice(0, 1)], Sampling(), 4)
        entry = self.do(self.queue.put(job, job_class))
        self.gone = [other for other in self.gone if other != entry]  # emptied in this very millisecond, a stream has the same ids
        self.known.append(Known(entry, job))

    def first(self) -> Known | None:
        """What is claimed next: the oldest of the first class that has one."""
        free = [one for one in self.known if one.consumer is None]
        return min(free, key=lambda one: names.CLASSES.index(one.entry.job_class), default=None)

    @rule(consumer=CONSUMERS)
    def claim(self, consumer: str) -> None:
        expected, claimed = self.first(), self.do(self.queue.claim(consumer))
        assert (claimed is None) == (expected is None)
        if claimed is not None and expected is not None:
            assert (claimed.entry, claimed.job) == (expected.entry, expected.job) and 0 <= claimed.waited_s < 60
            expected.consumer = consumer

    @rule(consumer=CONSUMERS)
    def wait(self, consumer: str) -> None:
        """At most one of each class."""
        for claimed in self.do(self.queue.wait(consumer, 0.001)):
            (one,) = (one for one in self.known if one.entry == claimed.entry)
            older = [other for other in self.known if other.entry.job_class == one.entry.job_class and other.consumer is None]
            assert one is older[0] and one.job == claimed.job
            one.consumer = consumer

    @precondition(lambda self: self.known or self.gone)
    @rule(choose=CHOOSE)
    def remove(self, choose: int) -> None:
        """Claimed or not, and again: it is idempotent."""
        entries = [one.entry for one in self.known] + self.gone
        entry = entries[choose % len(entries)]
        self.do(self.queue.remove(entry))
        self.known = [one for one in self.known if one.entry != entry]
        self.gone.append(entry)

    @rule(consumer=CONSUMERS)
    def forget(self, consumer: str) -> None:
        self.do(self.queue.forget(consumer))

    @rule()
    def look(self) -> None:
        states = self.do(self.queue.states([one.entry for one in self.known] + self.gone))
        for one in self.known:
            state = states[one.entry]
            assert isinstance(state, Queued) if one.consumer is None else isinstance(state, Pending) and state.consumer == one.consumer
        assert all(isinstance(states[entry], Absent) for entry in self.gone)
        assert self.do(self.queue.depth()) == sum(one.consumer is None for one in self.known)
        pending = self.do(self.queue.pending())
        assert {one.entry: one.job for one in pending} == {one.entry: one.job for one in self.known if one.consumer is not None}

    @rule()
    def restart_empty(self) -> None:
        """As a flush: it loses the groups as well."""
        self.do(self.redis.flushall())
        self.gone += [one.entry for one in self.known]
        self.known = []

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        while (claimed := self.do(self.queue.claim("last"))) is not None:
            (one,) = (one for one in self.known if one.entry == claimed.entry)
            assert one.consumer is None
            one.consumer = "last"
        assert all(one.consumer for one in self.known)
        self.do(self.redis.aclose())
        self.loop.close()


def test_the_queue_is_as_its_model(shared_valkey: Valkey) -> None:
    Queue.server = shared_valkey
    case = Queue.TestCase
    case.settings = settings(
        max_examples=FULL or 12,
        stateful_step_count=80 if FULL else 25,
        deadline=None,
        derandomize=not FULL,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    case().runTest()
