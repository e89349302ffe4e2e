"""The fourteen rules of the protocol, one test each, on the pure halves in a simulated fleet."""

from __future__ import annotations

import pytest

from common.errors import RequestError
from common.messages import (
    Cancel,
    Choice,
    Finished,
    Granted,
    Handed,
    Holding,
    Job,
    Key,
    Letter,
    Lost,
    Offer,
    Parcel,
    Rejected,
    Resent,
    Sampling,
    Started,
    Token,
    Tokens,
    WorkerBeat,
)
from common.queue import Absent, Entry, Pending
from gateway.ask import Ask
from gateway.flight import Bury, End, Put, Remove, Tell
from gateway.ledger import Ledger
from services.worker.outbox import Outbox
from tests.unit.recovery.decodes import Decode
from tests.unit.recovery.gateways import Gateway
from tests.unit.recovery.prefills import Prefill
from tests.unit.recovery.worker import Worker
from tests.unit.recovery.world import World

ASK = Ask([1, 2, 3, 4, 5, 6], Sampling(seed=1), 12)
LONG = Ask(list(range(20)), Sampling(seed=2), 24)


def fleet(prefills: int = 1, decodes: int = 1, *, pages: int = 24) -> tuple[World, Gateway, list[Prefill], list[Decode]]:
    world = World(3)
    gateway = world.gateway()
    found = [world.prefill(pages) for _ in range(prefills)], [world.decode(pages) for _ in range(decodes)]
    world.run(2)
    return world, gateway, *found


def until_streaming(world: World, gateway: Gateway, request_id: str, tokens: int = 3) -> None:
    assert world.run_until(lambda: len(gateway.clients[request_id].seen) >= tokens, 5)


def carrying(message: object, kind: type) -> bool:
    """Whether a letter's body or one of a parcel's events is of this kind."""
    if isinstance(message, Letter):
        return isinstance(message.body, kind)
    return isinstance(message, Parcel) and any(isinstance(event, kind) for event in message.events)


def ledger(*roles: tuple[str, str]) -> tuple[Ledger, Key]:
    """A ledger with one request of which p has started execution e."""
    found = Ledger("g", "tcp://g")
    for name, role in roles or (("p", "prefill"), ("d", "decode"), ("d2", "decode")):
        found.join(name, role)  # type: ignore[arg-type]
    found.open("r", ASK, 0.0)
    found.put("r", 0, 1, Entry("interactive", "1-0"))
    key = Key("r", 0, 1, "e")
    assert found.event("p", Started(key), 0.1) == []
    return found, key


def beat_of(role: str, *holding: Holding) -> WorkerBeat:
    return WorkerBeat(role, 1, 1, True, 1.0, 9, 9, 0, 0, holding=list(holding))  # type: ignore[arg-type]


def test_rule_1_an_attempt_is_bound_to_the_first_execution_and_the_first_decode() -> None:
    found, key = ledger()
    second = Key("r", 0, 1, "other")
    assert found.event("p", Started(second), 0.2) == [Tell("p", Cancel(second))]
    assert found.event("d", Started(key), 0.3) == []
    assert found.event("d2", Started(key), 0.4) == [Tell("d2", Cancel(key))]
    assert found.event("p", Handed(key, "d2"), 0.5) == [Tell("d2", Cancel(key))]


def test_rule_1_a_job_that_entered_twice_is_answered_once() -> None:
    world, gateway, _, _ = fleet(2)
    world.weather.duplicate_put = 1.0
    for _ in range(5):
        gateway.submit(ASK)
    world.settle()


def test_rule_2_a_new_attempt_goes_on_behind_what_was_accepted() -> None:
    found, key = ledger()
    found.event("p", Tokens(key, [Token(0, 7), Token(1, 8)]), 0.2)
    actions = found.dead("p", 1.0)
    jobs = [action.job for action in actions if isinstance(action, Put)]
    assert [job.choices for job in jobs] == [[Choice(0, 2, [7, 8])]]
    found.event("p", Tokens(key, [Token(2, 9)]), 1.1)
    assert jobs[0].choices[0].accepted == [7, 8]


@pytest.mark.parametrize("fault", ["kill", "freeze", "hang"])
@pytest.mark.parametrize("role", [Prefill, Decode])
def test_rule_3_silence_or_work_without_a_step_is_death(fault: str, role: type[Worker]) -> None:
    world, gateway, _, _ = fleet(2, 2)
    asked = [gateway.submit(LONG) for _ in range(4)]
    world.run(0.4)
    victim = max(world.living(role), key=lambda worker: len(worker.outbox))
    assert len(victim.outbox), "nobody to hurt"
    getattr(world, fault)(victim, *([] if fault == "kill" else [10.0]))
    assert world.run_until(lambda: not world.waiting(), 9), "death was not noticed while it lasted"
    assert max(gateway.clients[one].last_at for one in asked) < world.now
    world.run(10)
    world.settle()


def test_rule_4_the_gateway_judges_its_own_entries() -> None:
    found = Ledger("g", "tcp://g")
    entry = Entry("interactive", "1-0")

    def judged(state: object, at: float) -> bool:
        found.open("r", ASK, 0.0)
        found.put("r", 0, 1, entry)
        actions = found.judge({entry: state}, at)  # type: ignore[dict-item]
        found.cancel("r", 0, 0.0)
        return any(isinstance(action, Put) for action in actions)

    assert judged(Absent(), 2.5)
    assert not judged(Absent(), 1.0), "a job that has just been put may still be on its way"
    assert judged(Pending("p", 2.5), 2.5)
    assert not judged(Pending("just started", 0.1), 2.5)


def test_rule_4_a_lost_claim_reply_does_not_lose_the_request() -> None:
    world, gateway, _, _ = fleet()
    world.weather.claim_loss = 1.0
    gateway.submit(ASK)
    world.run(1)
    world.weather.claim_loss = 0.0
    assert world.run_until(lambda: not world.waiting(), 6)
    world.settle()


def test_rule_4_a_job_is_acknowledged_only_after_committed() -> None:
    world, gateway, prefills, _ = fleet(1, 0)
    gateway.submit(ASK)
    world.run(3)
    assert len(world.queue) == 1 and len(prefills[0].core.handoffs) == 1
    world.decode()
    world.run(3)
    assert len(world.queue) == 0
    world.settle()


def test_rule_5_resend_comes_before_resubmit() -> None:
    """Whatever single message of the token socket is lost, no second attempt is needed."""
    for lost in range(14):
        world, gateway, _, _ = fleet()
        seen = 0

        def drop(source: str, to: str, message: object) -> bool:
            nonlocal seen
            if not isinstance(message, Parcel) or carrying(message, WorkerBeat):
                return False
            seen += 1
            return seen == lost + 1  # noqa: B023

        world.wires.drop = drop
        gateway.submit(ASK)
        world.settle()
        assert gateway.ledger.recoveries == 0, f"losing message {lost} cost an attempt"


def test_rule_5_an_unknown_execution_is_resubmitted() -> None:
    found, key = ledger()
    actions = found.event("p", Resent(key, unknown=True), 0.5)
    assert [action.job.choices[0].attempt for action in actions if isinstance(action, Put)] == [2]


def test_rule_6_what_could_not_be_sent_stays_until_it_is_seen() -> None:
    outbox, key = Outbox(), Key("r", 0, 1, "e")
    outbox.hold("g", key, 0)
    outbox.tokens(key, [Token(0, 5), Token(1, 6)], stage_s=0.0)
    outbox.end(Finished(key, 2, "length"))
    outbox.take()  # and lost
    outbox.seen([(key, 1, False)])
    outbox.resend("g", key, 1)
    assert outbox.take() == {"g": [Resent(key, started=True, tokens=[Token(1, 6)], end=Finished(key, 2, "length"))]}
    assert outbox.seen([(key, 2, True)]) == [key] and len(outbox) == 0


def test_rule_7_a_preempted_request_is_lost_and_comes_back_fully_reserved() -> None:
    world, gateway, _, _ = fleet(pages=12)
    for _ in range(4):
        gateway.submit(Ask(list(range(8)), Sampling(seed=5), 24))
    world.settle()
    assert gateway.ledger.recoveries > 0, "nobody was preempted: the pool is not tight"
    assert any(job.reserve_all for _, job in world.jobs)


def test_rule_7_an_offer_in_line_is_made_elsewhere_after_its_deadline() -> None:
    world, gateway, _, decodes = fleet(1, 2)
    world.wires.drop = lambda source, to, message: to == decodes[0].name and carrying(message, Offer)
    for _ in range(4):
        gateway.submit(ASK)
    assert world.run_until(lambda: not world.waiting(), 8)
    world.settle()


def test_rule_8_pages_of_a_launch_in_flight_are_not_given_away() -> None:
    """Every KV read in the simulation is checked; here with cancels in the middle of overlapping launches."""
    world = World(5)
    gateway = world.gateway()
    world.prefill(12, 2)
    world.decode(12, 2)
    world.run(2)
    for number in range(12):
        gateway.submit(Ask([number] * 8, Sampling(seed=number), 12))
        world.run(0.05)
        if number % 2:
            gateway.cancel(f"{gateway.name}-{number - 1}")
    world.settle()


def test_rule_9_a_withdrawn_grant_keeps_its_pages_in_transit_until_they_have_landed() -> None:
    world, gateway, prefills, decodes = fleet()
    world.weather.push_stall = 1.0
    request_id = gateway.submit(LONG)
    assert world.run_until(lambda: decodes[0].pool.counts.in_transit > 0 and bool(prefills[0].carrier.pushes), 3)
    gateway.cancel(request_id)
    world.run(0.6)
    world.weather.push_stall = 0.0
    assert decodes[0].pool.counts.in_transit > 0, "a push may still write there"
    world.settle()


def test_rule_9_prefill_pushes_only_after_granted() -> None:
    world, gateway, prefills, decodes = fleet()
    world.wires.drop = lambda source, to, message: carrying(message, Granted)
    gateway.submit(ASK)
    world.run(2)
    assert not prefills[0].carrier.pushes and decodes[0].pool.counts.in_transit > 0
    world.wires.drop = lambda source, to, message: False
    world.settle()


@pytest.mark.parametrize("decodes", [1, 2])
def test_rule_10_what_does_not_verify_is_never_shown(decodes: int) -> None:
    world, gateway, _, found = fleet(1, decodes)
    world.weather.corrupt = 1.0
    rejected = []
    world.wires.drop = lambda source, to, message: bool(carrying(message, Rejected) and rejected.append(message))
    gateway.submit(ASK)
    assert world.run_until(lambda: len(rejected) > 1, 2)
    assert not any(len(decode.runs) for decode in found)
    world.weather.corrupt = 0.0
    world.settle()
    assert gateway.ledger.recoveries == 0


def test_rule_10_a_prefill_whose_pages_never_verify_hands_the_request_back() -> None:
    world, gateway, _, found = fleet(1, 2)
    world.weather.corrupt = 1.0
    gateway.submit(ASK)
    world.run(2)
    assert gateway.ledger.recoveries > 0 and not any(len(decode.runs) for decode in found)
    assert all(job.suspicion == 0 for _, job in world.jobs)
    world.weather.corrupt = 0.0
    world.settle()


def test_rule_11_only_deaths_during_its_launches_count_and_the_third_is_the_last() -> None:
    found, key = ledger()
    buried: list[Bury] = []
    attempts: list[Job] = []
    for attempt in range(1, 4):
        key = Key("r", 0, attempt, f"e{attempt}" if attempt > 1 else "e")
        worker = "p" * attempt
        found.join(worker, "prefill")
        found.event(worker, Started(key), 1.0)
        outbox = Outbox()
        outbox.hold("g", key, 0)
        outbox.launched(key, True)
        beat = WorkerBeat("prefill", 1, 0, True, 1.0, 0, 0, 0, 0, holding=outbox.holding("g"))
        found.event(worker, beat, 1.0)
        actions = found.dead(worker, 2.0)
        attempts += [action.job for action in actions if isinstance(action, Put)]
        buried += [action for action in actions if isinstance(action, Bury)]
        ends = [action for action in actions if isinstance(action, End)]
    assert [(job.suspicion, job.alone) for job in attempts] == [(1, False), (2, True)]
    assert len(buried) == 1 and isinstance(ends[0].error, RequestError) and ends[0].error.code == "poison"


def test_rule_11_a_worker_that_was_only_silent_is_no_death() -> None:
    found, key = ledger()
    outbox = Outbox()
    outbox.hold("g", key, 0)
    outbox.launched(key, True)
    found.event("p", WorkerBeat("prefill", 1, 0, True, 1.0, 0, 0, 0, 0, holding=outbox.holding("g")), 1.0)
    [first] = [action.job for action in found.dead("p", 4.0) if isinstance(action, Put)]
    assert first.suspicion == 1
    found.event("p", WorkerBeat("prefill", 2, 0, False, 1.0, 0, 0, 0, 0), 5.0)
    found.join("q", "prefill")
    found.event("q", Started(Key("r", 0, 2, "e2")), 5.0)
    [second] = [action.job for action in found.dead("q", 8.0) if isinstance(action, Put)]
    assert second.suspicion == 1, "q's death alone counts"


def test_rule_11_a_bystander_is_not_suspected() -> None:
    found, key = ledger()
    found.event("p", Lost(key, "drained"), 1.0)
    key = Key("r", 0, 2, "e2")
    found.event("p", Started(key), 1.1)
    found.event("p", beat_of("prefill", Holding(key, 0, False, False)), 1.5)
    jobs = [action.job for action in found.dead("p", 4.0) if isinstance(action, Put)]
    assert [job.suspicion for job in jobs] == [0]


@pytest.mark.parametrize("role", [Prefill, Decode])
def test_rule_12_draining_hands_everything_back_uncounted(role: type[Worker]) -> None:
    world, gateway, _, _ = fleet(2, 2)
    for _ in range(6):
        gateway.submit(LONG)
    world.run(0.4)
    victim = max(world.living(role), key=lambda worker: len(worker.outbox))
    assert len(victim.outbox)
    victim.drain()
    assert world.run_until(lambda: not victim.alive, 3), "it did not exit although everything was acknowledged"
    world.settle()
    assert all(job.suspicion == 0 for _, job in world.jobs)


def test_rule_13_cancel_frees_every_page_within_a_second() -> None:
    for after in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        world, gateway, _, _ = fleet()
        request_id = gateway.submit(LONG)
        world.run(after)
        gateway.cancel(request_id)
        assert world.run_until(lambda world=world: not world.leftovers(), 1.0), (after, world.leftovers())


def test_rule_13_cancel_removes_the_entry_and_reaches_every_holder() -> None:
    found, key = ledger()
    found.event("d", Started(key), 0.2)
    assert found.cancel("r", 0, 0.0) == [Remove(Entry("interactive", "1-0")), Tell("d", Cancel(key)), Tell("p", Cancel(key))]
    assert found.event("d", beat_of("decode", Holding(key, 1, False, True)), 0.5) == [Tell("d", Cancel(key))], "a lost cancel is said again"
    found.open("late", ASK, 1.0)
    found.cancel("late", 0, 0.0)
    assert found.put("late", 0, 1, Entry("interactive", "2-0")) == [Remove(Entry("interactive", "2-0"))]


def test_an_answer_that_ends_takes_its_entry_with_it() -> None:
    found, key = ledger()
    actions = found.event("p", Tokens(key, [Token(index, 1) for index in range(12)]), 0.2)
    assert isinstance(actions[0], End) and actions[0].finish == "length" and actions[1:] == [Remove(Entry("interactive", "1-0"))]


def test_rule_13_an_event_of_a_stranger_is_answered_with_cancel() -> None:
    found, _ = ledger()
    stranger = Key("nobody", 0, 1, "e")
    assert found.event("d", Tokens(stranger, [Token(0, 1)]), 1.0) == [Tell("d", Cancel(stranger))]
    assert found.event("d", Finished(stranger, 1, "stop"), 1.0) == []
    assert found.seen("d") == [(stranger, 0, True)]


def test_rule_14_redis_away_leaves_running_streams_alone() -> None:
    world, gateway, _, _ = fleet()
    request_id = gateway.submit(LONG)
    until_streaming(world, gateway, request_id)
    world.queue.away = True
    refused = gateway.submit(ASK)
    assert world.run_until(lambda: gateway.clients[request_id].ended, 5)
    assert gateway.clients[request_id].error is None and gateway.clients[refused].error is not None
    assert gateway.ledger.recoveries == 0
    world.settle()


def test_rule_14_redis_restarted_empty_is_not_noticed_by_running_streams() -> None:
    world, gateway, _, _ = fleet()
    request_id = gateway.submit(LONG)
    until_streaming(world, gateway, request_id)
    waiting = gateway.submit(ASK)
    world.queue.restart_empty()
    world.settle()
    assert gateway.clients[request_id].error is None and gateway.clients[waiting].error is None
