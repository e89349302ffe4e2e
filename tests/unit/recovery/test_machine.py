"""Hypothesis looks for the shortest trouble that does harm."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from common.messages import Sampling
from common.names import CLASSES
from gateway.ask import Ask
from tests.unit.recovery.decodes import Decode
from tests.unit.recovery.gateways import Gateway
from tests.unit.recovery.prefills import Colocated, Prefill
from tests.unit.recovery.worker import Worker
from tests.unit.recovery.world import World

FULL = int(os.environ.get("BATON_TEST_EXAMPLES", "1500")) if os.environ.get("BATON_TEST_FULL") else 0
pytestmark = pytest.mark.timeout(3600 if os.environ.get("BATON_TEST_FULL") else 120)
CHANCES = st.sampled_from((0.0, 0.0, 0.1, 0.5))
PICK = st.integers(0, 7)


class Fleet(RuleBasedStateMachine):
    """One or two gateways; workers come and go. At the end the weather calms down and everything has to have ended."""

    @initialize(
        seed=st.integers(0, 3),
        gateways=st.integers(1, 2),
        decodes=st.integers(1, 2),
        pages=st.sampled_from((12, 16, 40)),
        depth=st.integers(1, 2),
        reuse=st.booleans(),
        short_tokens=st.integers(0, 4),
    )
    def build(self, seed: int, gateways: int, decodes: int, pages: int, depth: int, reuse: bool, short_tokens: int) -> None:
        self.world = World(seed, reuse=reuse, short_tokens=short_tokens)
        self.pages, self.depth, self.deaths, self.frozen_gateways = pages, depth, 0, 0
        self.gateways: list[Gateway] = [self.world.gateway() for _ in range(gateways)]
        self.world.prefill(pages, depth)
        for _ in range(decodes):
            self.world.decode(pages, depth)
        self.world.run(1.5)

    def _worker(self, pick: int) -> Worker | None:
        workers = self.world.living(Worker)
        return workers[pick % len(workers)] if workers else None

    @rule(
        pick=PICK,
        prompt=st.integers(1, 22),
        max_tokens=st.integers(1, 24),
        seed=st.integers(0, 5),
        stop=st.booleans(),
        n=st.integers(1, 3),
        deadline_s=st.sampled_from((600.0, 600.0, 0.05, 2.5)),
        job_class=st.sampled_from(CLASSES[1:]),
    )
    def ask(self, pick: int, prompt: int, max_tokens: int, seed: int, stop: bool, n: int, deadline_s: float, job_class: str) -> None:
        gateway = self.gateways[pick % len(self.gateways)]
        ids = [(7 * i + prompt % 3) % 40 for i in range(prompt)]
        gateway.submit(Ask(ids, Sampling(seed=seed), max_tokens, [3, 4, 5, 6] if stop else [], deadline_s, job_class, n))

    @precondition(lambda self: self.deaths < 2)
    @rule(pick=PICK)
    def a_gateway_dies(self, pick: int) -> None:
        """And another one comes."""
        at = pick % len(self.gateways)
        self.world.kill(self.gateways[at])
        self.gateways[at] = self.world.gateway()
        self.deaths += 1

    @rule(seconds=st.sampled_from((0.001, 0.01, 0.05, 0.3, 1.0, 3.0)))
    def wait(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(pick=PICK)
    def client_leaves(self, pick: int) -> None:
        gateway = self.gateways[pick % len(self.gateways)]
        if gateway.clients:
            gateway.cancel(sorted(gateway.clients)[pick % len(gateway.clients)])

    @rule(pick=PICK)
    def kill(self, pick: int) -> None:
        worker = self._worker(pick)
        if worker is not None:
            self.world.kill(worker)

    @rule(pick=PICK, seconds=st.sampled_from((0.4, 3.0, 10.0)), gateway=st.booleans())
    def freeze(self, pick: int, seconds: float, gateway: bool) -> None:
        victim = self.gateways[pick % len(self.gateways)] if gateway else self._worker(pick)
        if victim is not None:
            self.world.freeze(victim, seconds)
            self.frozen_gateways += gateway

    @rule(pick=PICK)
    def drain(self, pick: int) -> None:
        worker = self._worker(pick)
        if worker is not None and not worker.draining and not worker.frozen:
            worker.drain()

    @precondition(lambda self: len(self.world.living(Worker)) < 6)
    @rule(role=st.sampled_from((Prefill, Decode, Colocated)))
    def start(self, role: type[Worker]) -> None:
        self.world.start(role, self.pages, self.depth)

    @rule()
    def redis_restarts_empty(self) -> None:
        self.world.queue.restart_empty()

    @rule(back_after=st.sampled_from((0.2, 3.0)))
    def redis_is_away(self, back_after: float) -> None:
        self.world.queue.away = True
        self.world.clock.after(back_after, lambda: setattr(self.world.queue, "away", False))

    @rule()
    def redis_replays(self) -> None:
        for _, job in self.world.jobs[-2:]:
            self.world.queue.put(job, "interactive")

    @rule(tokens=CHANCES, control=st.sampled_from((0.0, 0.02)), put=CHANCES, duplicate=CHANCES, claim=CHANCES)
    def words_are_lost(self, tokens: float, control: float, put: float, duplicate: float, claim: float) -> None:
        weather = self.world.weather
        weather.token_loss, weather.control_cut, weather.put_trouble = tokens, control, put
        weather.duplicate_put, weather.claim_loss = duplicate, claim

    @rule(corrupt=CHANCES, fail=CHANCES, stall=CHANCES, unposted=CHANCES, launch=st.sampled_from((0.0, 0.02)))
    def pages_are_lost(self, corrupt: float, fail: float, stall: float, unposted: float, launch: float) -> None:
        weather = self.world.weather
        weather.corrupt, weather.push_fail, weather.push_stall, weather.launch_fail = corrupt, fail, stall, launch
        weather.not_posted = unposted

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.settle()
        if self.frozen_gateways:
            return  # they could not end what was late
        for gateway in self.world.living(Gateway):
            for client in gateway.clients.values():
                late = client.last_at - client.accepted_at > client.ask.deadline_s + 1.0
                assert not late, f"a token {client.last_at - client.accepted_at:.1f} s after it was asked, deadline {client.ask.deadline_s}"


TestFleet = Fleet.TestCase
TestFleet.settings = settings(
    max_examples=FULL or 60,
    stateful_step_count=60 if FULL else 30,
    deadline=None,
    derandomize=not FULL,
    database=None,
    suppress_health_check=list(HealthCheck),
)
