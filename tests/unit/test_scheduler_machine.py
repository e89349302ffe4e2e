"""The scheduler under random submits, offers, cancels, failures and launches ahead, against a model of who owns which page."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.messages import Key, Sampling, Token
from services.engine.pages import PagePool
from services.engine.plan import Began, Computed, Draw, Drawn, Failed, Granted, Handoff, Outcome, Plan, Preempted, StepOutput
from services.engine.policies import POLICIES, Limits
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence

FULL = int(os.environ.get("BATON_TEST_EXAMPLES", "3000")) if os.environ.get("BATON_TEST_FULL") else 0
pytestmark = pytest.mark.timeout(3600 if os.environ.get("BATON_TEST_FULL") else 120)
PAGE, STOP, OTHER = 2, 0, 9


@dataclass(eq=False)
class Known:
    """What the model knows of a sequence that is in the engine."""

    sequence: Sequence
    rank: tuple[float, int]
    known: int
    planned: int = 0
    index: int = 0
    ahead: int = 0
    began: bool = False
    parked: bool = False
    admitted: bool = False


@dataclass(eq=False)
class Flight:
    plan: Plan
    pages: list[tuple[Known, tuple[int, ...]]]


def sequences() -> st.SearchStrategy[dict[str, Any]]:
    rarely = st.sampled_from([False, False, False, True])
    return st.fixed_dictionaries(
        {
            "prompt": st.integers(1, 9),
            "accepted": st.sampled_from([0, 0, 2]),
            "more": st.integers(1, 7),
            "order": st.integers(0, 4),
            "reserve_all": rarely,
            "alone": st.sampled_from([False] * 7 + [True]),
        }
    )


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        pages=st.integers(2, 12),
        policy=st.sampled_from(sorted(POLICIES)),
        limits=st.builds(Limits, st.integers(1, 12), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2)),
        depth=st.integers(1, 3),
        reuse=st.booleans(),
    )
    def start(self, pages: int, policy: Any, limits: Limits, depth: int, reuse: bool) -> None:
        self.pool = PagePool(pages, PAGE, keep_cached=reuse)
        self.scheduler = Scheduler(self.pool, policy, limits, depth=depth, reuse="model" if reuse else None)
        self.reuse = reuse
        self.policy, self.limits, self.depth = policy, limits, depth
        self.here: dict[Key, Known] = {}
        self.flights: list[Flight] = []
        self.line: list[tuple[Handoff, Sequence]] = []
        self.granted: dict[Handoff, tuple[Sequence, Granted]] = {}
        self.lapsed: dict[Handoff, tuple[Sequence, Granted]] = {}
        self.taken_up: set[Sequence] = set()
        self.inside: set[Known] = set()
        """Who could be preempted by the next plan: whoever has pages before it."""
        self.named = self.arrivals = 0

    # -------------------------------------------------------------------------------------------------------- commands

    def make(self, facts: dict[str, Any], parks: bool = False) -> Sequence:
        self.named += 1
        accepted = facts["accepted"]
        return Sequence(
            Key(f"r{self.named}", 0, 0, "x"),
            [1] * (facts["prompt"] + accepted),
            facts["prompt"],
            Sampling(),
            accepted + facts["more"],
            frozenset({STOP}),
            order=float(facts["order"]),
            parks=parks,
            reserve_all=facts["reserve_all"],
            alone=facts["alone"],
        )

    def fits(self, sequence: Sequence) -> bool:
        most = len(sequence.ids) if sequence.parks else sequence.most_tokens
        return self.pool.pages_for(most) <= self.pool.total

    def meet(self, sequence: Sequence, **facts: Any) -> None:
        self.arrivals += 1
        rank = (sequence.order, self.arrivals)
        self.here[sequence.key] = Known(sequence, rank, len(sequence.ids), index=sequence.index, **facts)

    @rule(facts=sequences(), parks=st.booleans())
    def submit(self, facts: dict[str, Any], parks: bool) -> None:
        sequence = self.make(facts, parks)
        try:
            self.scheduler.submit(sequence)
        except ValueError:
            assert not self.fits(sequence)
        else:
            assert self.fits(sequence)
            self.meet(sequence)

    @rule(facts=sequences())
    def offer(self, facts: dict[str, Any]) -> None:
        sequence = self.make(facts)
        handoff = ("prefill", self.named)
        try:
            self.scheduler.reserve(handoff, sequence)
        except ValueError:
            assert not self.fits(sequence)
        else:
            self.line.append((handoff, sequence))

    @precondition(lambda self: self.line or self.granted or self.lapsed)
    @rule(data=st.data())
    def repeat_offer(self, data: st.DataObject) -> None:
        """In line or granted: nothing changes. Lapsed: the grant is taken up again."""
        known = [*self.line, *((handoff, sequence) for handoff, (sequence, _) in self.granted.items())]
        handoffs = [handoff for handoff, _ in known]
        handoff = data.draw(st.sampled_from([*handoffs, *self.lapsed]))
        if handoff in self.lapsed:
            self.granted[handoff] = sequence, _ = self.lapsed.pop(handoff)
            self.taken_up.add(sequence)
        else:
            sequence = dict(known)[handoff]
        self.scheduler.reserve(handoff, sequence)

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), ends=st.booleans())
    def admit(self, data: st.DataObject, ends: bool) -> None:
        handoff = data.draw(st.sampled_from(sorted(self.granted)))
        sequence, _ = self.granted.pop(handoff)
        token = Token(sequence.index, STOP if ends else OTHER)
        self.meet(sequence, admitted=True, planned=len(sequence.ids))
        self.here[sequence.key].index += 1
        finish = "stop" if ends else "length" if sequence.index + 1 >= sequence.max_tokens else None
        self.scheduler.admit(handoff, token)
        if finish is not None:
            assert self.scheduler.take_outcomes()[-1] == Drawn(sequence.key, token, finish)
            self.leave(sequence.key)

    @precondition(lambda self: self.line or self.granted)
    @rule(data=st.data())
    def lapse(self, data: st.DataObject) -> None:
        handoff = data.draw(st.sampled_from(sorted([*dict(self.line), *self.granted])))
        self.scheduler.lapse(handoff)
        self.give_up(handoff)

    def give_up(self, handoff: Handoff) -> None:
        self.line = [offer for offer in self.line if offer[0] != handoff]
        if handoff in self.granted:
            self.lapsed[handoff] = self.granted.pop(handoff)

    @precondition(lambda self: self.granted or self.lapsed)
    @rule(data=st.data())
    def landed(self, data: st.DataObject) -> None:
        handoff = data.draw(st.sampled_from(sorted([*self.granted, *self.lapsed])))
        self.scheduler.landed(handoff)
        self.granted.pop(handoff, None)
        self.lapsed.pop(handoff, None)

    @precondition(lambda self: self.here or self.line or self.granted)
    @rule(data=st.data(), whole=st.booleans())
    def cancel(self, data: st.DataObject, whole: bool) -> None:
        inbound = [*self.line, *((handoff, sequence) for handoff, (sequence, _) in self.granted.items())]
        keys = {sequence.key: handoff for handoff, sequence in inbound}
        key = data.draw(st.sampled_from(sorted([*self.here, *keys], key=lambda key: key.request_id)))
        self.scheduler.cancel(Key(key.request_id, key.choice, key.attempt, "" if whole else key.execution))
        if key in self.here:
            self.leave(key)
        else:
            self.give_up(keys[key])

    @precondition(lambda self: any(known.parked for known in self.here.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        parked = [key for key, known in self.here.items() if known.parked]
        key = data.draw(st.sampled_from(parked))
        self.scheduler.release(key)
        self.leave(key)

    # ----------------------------------------------------------------------------------------------------------- steps

    @rule()
    def plan(self) -> None:
        self.inside = {known for known in self.here.values() if self.entered(known)}
        plan = self.scheduler.next()
        outcomes = self.scheduler.take_outcomes()
        if len(self.flights) >= self.depth:
            assert plan is None and not outcomes
            return
        self.hear(outcomes)
        if plan is None:
            if not self.flights:
                assert self.scheduler.next() is None and not self.scheduler.take_outcomes(), "the engine would have slept on work"
            return
        flight = Flight(plan, [])
        decodes = 0
        for chunk in plan.chunks:
            known = self.here[chunk.sequence.key]
            assert known.sequence is chunk.sequence and known.began and not known.parked
            assert chunk.start == known.planned and chunk.tokens >= 1
            assert chunk.start + chunk.tokens <= min(len(chunk.sequence.pages) * PAGE, chunk.sequence.most_tokens)
            if chunk.start < known.known:
                assert chunk.tokens <= self.limits.chunk_tokens
                assert chunk.draws == (chunk.start + chunk.tokens == known.known) and not chunk.pending
            else:
                decodes += 1
                assert chunk.tokens == 1 and chunk.draws and chunk.pending == (known.ahead > 0)
            assert chunk.index == known.index + known.ahead
            known.planned += chunk.tokens
            known.ahead += chunk.draws
            flight.pages.append((known, tuple(chunk.sequence.pages)))
        assert len({id(known) for known, _ in flight.pages}) == len(plan.chunks)
        assert decodes <= self.limits.max_batch
        if self.policy == "prefill_first":
            assert decodes in (0, len(plan.chunks))
        self.flights.append(flight)

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def collect(self, data: st.DataObject) -> None:
        chunks = self.flights[0].plan.chunks
        ids = data.draw(st.lists(st.sampled_from([OTHER, OTHER, STOP]), min_size=len(chunks), max_size=len(chunks)))
        self.land(ids)

    def land(self, ids: list[int]) -> None:
        flight = self.flights.pop(0)
        draws = [Draw(i) if chunk.draws else None for i, chunk in zip(ids, flight.plan.chunks, strict=True)]
        self.scheduler.commit(flight.plan, StepOutput(tuple(draws)))
        outcomes = self.scheduler.take_outcomes()
        expected: list[Outcome] = []
        for (known, _), chunk, draw in zip(flight.pages, flight.plan.chunks, draws, strict=True):
            key = known.sequence.key
            if self.here.get(key) is not known:
                continue
            if chunk.start < known.known:
                pages = next(o.pages for o in outcomes if isinstance(o, Computed) and o.key == key)
                expected.append(Computed(key, chunk.start + chunk.tokens, pages))
                assert len(pages) * PAGE >= chunk.start + chunk.tokens
            if draw is not None:
                stops = "length" if known.index + 1 >= known.sequence.max_tokens else None
                expected.append(Drawn(key, Token(known.index, draw.id), "stop" if draw.id == STOP else stops))
        assert outcomes == expected
        self.hear(outcomes)

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        flight = self.flights.pop(data.draw(st.integers(0, len(self.flights) - 1)))
        self.scheduler.abort(flight.plan, "broken")
        outcomes = self.scheduler.take_outcomes()
        still = [known.sequence.key for known, _ in flight.pages if self.here.get(known.sequence.key) is known]
        assert outcomes == [Failed(key, "broken") for key in still]
        self.hear(outcomes)

    def leave(self, key: Key) -> None:
        del self.here[key]

    def hear(self, outcomes: list[Outcome]) -> None:
        fresh: set[Key] = set()
        for outcome in outcomes:
            match outcome:
                case Granted(handoff, pages, shared):
                    assert self.reuse or not shared
                    assert shared * PAGE <= len(self.line[0][1].ids)
                    assert self.line[0][0] == handoff, "not first in, first out"
                    _, sequence = self.line.pop(0)
                    known, most = self.pool.pages_for(len(sequence.ids)), self.pool.pages_for(sequence.most_tokens)
                    assert len(pages) == (most if sequence.reserve_all else min(known + self.limits.growth_pages, most))
                    self.granted[handoff] = (sequence, outcome)
                case Began(key, pages, reused):
                    begun = self.here[key]
                    assert not begun.began and pages == tuple(begun.sequence.pages)
                    assert self.reuse or not reused
                    assert begun.admitted or begun.planned == 0 <= reused < begun.known
                    begun.planned = max(begun.planned, reused)
                    waiting = [k.rank for k in self.here.values() if not (k.began or k.admitted)]
                    # One that was let in before, with what was found of it, may begin while an older one has no room yet.
                    assert begun.admitted or begun in self.inside or begun.rank == min(waiting), "an older prompt was overtaken"
                    begun.began = True
                    fresh.add(key)
                case Drawn(key, _, finish):
                    drawn = self.here[key]
                    drawn.index += 1
                    drawn.ahead -= 1
                    drawn.parked = drawn.sequence.parks
                    if finish is not None:
                        self.leave(key)
                case Preempted(key):
                    victim = self.here[key]
                    candidates = [
                        k.rank
                        for k in self.here.values()
                        if k in self.inside and k.sequence.key not in fresh and not (k.parked or k.sequence.reserve_all)
                    ]
                    assert victim.rank == max(candidates), "not the youngest"
                    self.leave(key)
                case Failed(key):
                    self.leave(key)
                case Computed():
                    pass

    @staticmethod
    def entered(known: Known) -> bool:
        """Whether it has pages, or has had them: one whose beginning was found has them before it begins."""
        return known.began or known.admitted or len(known.sequence.pages) > 0

    # ------------------------------------------------------------------------------------------------------ invariants

    def leaving(self) -> set[Known]:
        return {known for flight in self.flights for known, _ in flight.pages if self.here.get(known.sequence.key) is not known}

    @invariant()
    def every_page_has_the_owners_it_should(self) -> None:
        self.pool.check()
        owners = Counter(page for known in {*self.here.values(), *self.leaving()} for page in known.sequence.pages)
        grants = [granted for _, granted in (*self.granted.values(), *self.lapsed.values())]
        owners.update(page for granted in grants for page in granted.pages[: granted.shared])
        assert all(self.pool.users(page) == owners[page] for page in range(self.pool.total))
        assert self.reuse or max(owners.values(), default=1) == 1, "two sequences share a page, and nothing is to be reused"
        for flight in self.flights:
            for known, pages in flight.pages:
                assert tuple(known.sequence.pages[: len(pages)]) == pages, "a launch in flight names a page that was taken away"
            for chunk in flight.plan.chunks:
                written = chunk.sequence.pages[chunk.start // PAGE : -(-(chunk.start + chunk.tokens) // PAGE)]
                assert all(owners[page] == 1 for page in written), "a launch in flight writes a page that others hold"
        transit = [page for granted in grants for page in granted.pages[granted.shared :]]
        assert self.pool.counts.in_transit == len(transit) == len(set(transit)) and not set(transit) & set(owners)

    @invariant()
    def alone_means_alone(self) -> None:
        started = [known.sequence for known in self.here.values() if self.entered(known) and not known.parked]
        inside = [*started, *(known.sequence for known in self.leaving()), *(sequence for sequence, _ in self.granted.values())]
        if any(sequence.alone for sequence in inside):
            # A grant taken up after a lapse comes back beside whatever has started meanwhile.
            assert len(inside) == 1 or self.taken_up & set(inside)

    @invariant()
    def the_snapshot_agrees(self) -> None:
        snapshot = self.scheduler.snapshot()
        waiting = [known for known in self.here.values() if not self.entered(known)]
        parked = [known for known in self.here.values() if known.parked]
        assert snapshot.in_flight == len(self.flights)
        assert (snapshot.waiting, snapshot.parked) == (len(waiting), len(parked))
        assert snapshot.running == len(self.here) - len(waiting) - len(parked)
        assert snapshot.inbound == len(self.line) + len(self.granted) + len(self.lapsed)
        planned = [known.planned if known.began else max(known.planned, known.sequence.planned) for known in self.here.values()]
        assert snapshot.unplanned_tokens == sum(max(0, known.known - at) for known, at in zip(self.here.values(), planned, strict=True))
        assert snapshot.reused <= snapshot.looked_up
        assert set(self.scheduler.keys()) == set(self.here)

    def teardown(self) -> None:
        """Everything ends, whatever state it is in, and every page is free."""
        if not hasattr(self, "pool"):
            return
        for _ in range(5000):
            if not (self.here or self.line or self.granted or self.lapsed or self.flights):
                break
            for handoff in list(self.lapsed):
                self.scheduler.landed(handoff)
                del self.lapsed[handoff]
            for handoff in list(self.granted):
                self.scheduler.lapse(handoff)
                self.scheduler.landed(handoff)
                del self.granted[handoff]
            for key in [key for key, known in self.here.items() if known.parked]:
                self.scheduler.release(key)
                self.leave(key)
            self.plan()
            if self.flights:
                self.land([OTHER] * len(self.flights[0].plan.chunks))
            self.every_page_has_the_owners_it_should()
        assert not (self.here or self.line or self.flights), "the engine stands still"
        assert self.pool.available == self.pool.total and (self.reuse or not self.pool.counts.cached)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=FULL or 150, stateful_step_count=120 if FULL else 60, deadline=None)
