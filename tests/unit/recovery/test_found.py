"""Bugs that the simulation (or reading) has found, each as the few steps that show it."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from common.messages import (
    Choice,
    Committed,
    Finished,
    Granted,
    GrantedRank,
    Handed,
    Holding,
    Job,
    Key,
    Lost,
    Offer,
    PeerBeat,
    Pushed,
    Refused,
    Resend,
    Sampling,
    Shard,
    Started,
    Token,
    Tokens,
    Withdraw,
    WorkerBeat,
)
from common.queue import Entry
from gateway.ask import Ask
from gateway.flight import End, Put, Tell
from gateway.ledger import Ledger
from services.decode import inbound
from services.decode.core import DecodeCore
from services.decode.inbound import Inbound
from services.engine.plan import Began, Drawn
from services.engine.plan import Granted as EngineGranted
from services.prefill import moves
from services.prefill.core import PrefillCore
from services.prefill.handoffs import Handoffs
from services.prefill.routing import Load
from services.transfer.protocol import Arrived, Landed, NotPosted, Posted, PushFailed
from services.worker.outbox import Outbox
from services.worker.runs import Runs, Submit

ASK = Ask([1, 2, 3], Sampling(seed=1), 12)
KEY = Key("r", 0, 1, "e")
RANK = GrantedRank(Shard(0, (0, 1), (0, 1)), b"address")
LOAD = Load(0, 10)


def job(attempt: int = 1) -> Job:
    return Job("r", "g", "tcp://g", [1, 2, 3], [Choice(0, attempt)], Sampling(), 12)


def ledger(*, started: bool = True) -> Ledger:
    found = Ledger("g", "tcp://g")
    found.join("p", "prefill")
    found.join("d", "decode")
    found.open("r", ASK, 0.0)
    found.put("r", 0, 1, Entry("interactive", "1-0"))
    if started:
        found.event("p", Started(KEY), 0.1)
    return found


def beat(role: str, *holding: Holding) -> WorkerBeat:
    return WorkerBeat(role, 1, 1, False, 1.0, 9, 9, 0, 0, holding=list(holding))  # type: ignore[arg-type]


def puts(actions: list[object]) -> int:
    return sum(isinstance(action, Put) for action in actions)


def prefill(short_tokens: int = 0) -> PrefillCore:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    return PrefillCore(Outbox(), ways, fingerprint="f", page_tokens=4, max_request_tokens=64, short_tokens=short_tokens)


def decode() -> DecodeCore:
    return DecodeCore(Outbox(), Inbound(4, 64), max_request_tokens=64)


def offer(number: int) -> Offer:
    return Offer(number, KEY, job(), 3, [], 60.0)


# ------------------------------------------------------------------------------------------------------------- gateway


def test_a_finish_is_not_acknowledged_before_its_tokens_have_come() -> None:
    found = ledger()
    found.event("d", Started(KEY), 0.2)
    assert found.event("d", Finished(KEY, 12, "length"), 0.3) == [Tell("d", Resend(KEY, 0))]
    assert (KEY, 0, True) not in found.seen("d")


def test_an_ending_of_which_nothing_was_heard_is_asked_for() -> None:
    found = ledger(started=False)
    assert found.event("p", beat("prefill", Holding(KEY, 1, True, False)), 0.5) == [Tell("p", Resend(KEY, 0))]
    assert (KEY, 0, True) not in found.seen("p")


def test_a_decode_that_dies_before_prefill_knew_of_its_commit_does_not_strand_the_request() -> None:
    found = ledger()
    found.event("d", Started(KEY), 0.2)
    actions = [*found.dead("d", 3.0), *found.event("p", Handed(KEY, "d"), 3.1), *found.tick(60.0)]
    assert puts(actions) == 1


def test_a_stranger_is_not_taken_for_a_prefill() -> None:
    found = ledger()
    assert found.event("new decode", Started(KEY), 0.2) == []
    assert found.event("new decode", beat("decode", Holding(KEY, 1, False, True)), 0.3) == [Tell("new decode", Resend(KEY, 0))]


def test_a_put_that_failed_although_the_job_had_entered_is_not_repeated() -> None:
    found = ledger(started=False)
    found.event("p", Lost(KEY, "drained"), 0.2)
    second = Key("r", 0, 2, "e2")
    found.event("p", Started(second), 0.3)
    found.put_failed("r", 0, 2, 0.4)
    assert puts(found.tick(1.5)) == 0


def test_old_words_of_a_prefill_that_let_go_do_not_hide_the_death_of_the_decode() -> None:
    found = ledger()
    found.event("p", Handed(KEY, "d"), 0.3)
    found.event("p", Tokens(KEY, [Token(0, 1)]), 0.4)
    assert puts(found.dead("d", 3.0)) == 1


def test_a_prefill_that_drains_without_knowing_of_the_commit_costs_no_attempt() -> None:
    found = ledger()
    found.event("d", Tokens(KEY, [Token(0, 1)]), 0.2)
    assert found.event("p", Lost(KEY, "drained"), 0.3) == []


# ------------------------------------------------------------------------------------------------------------- prefill


def test_a_run_given_up_before_it_began_is_not_offered() -> None:
    core = prefill()
    core.claimed(Entry("interactive", "1-0"), job(), 0.0)
    (key,) = core.runs.outbox.unended()
    core.drain(0.1)
    assert core.outcome(Began(key, (0,)), 0.2) == [], "its pages are free already: they would be pushed with somebody else's KV"
    assert len(core.handoffs) == 0


def test_refusals_do_not_chase_each_other() -> None:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    ways.begin(KEY, job(), 3, [], (0,), 0.0)
    actions = ways.letter("d", Refused(1, "draining"), 0.1)
    assert not [action for action in actions if isinstance(action, moves.Send) and isinstance(action.body, Offer)]
    assert [action.body.handoff for action in ways.tick(0.5) if isinstance(action, moves.Send) and isinstance(action.body, Offer)] == [2]


def granted(ways: Handoffs) -> None:
    ways.begin(KEY, job(), 3, [], (0,), 0.0)
    ways.letter("d", Granted(1, 7, [0], [RANK]), 0.1)


def test_pages_that_never_leave_condemn_their_link() -> None:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    granted(ways)
    assert moves.FinishPush(1, 7) in ways.drawn(KEY, Token(0, 1), 0.2)
    actions = [*ways.push_failed(PushFailed(1, 7, "nothing has moved for 5 s"), 5.3), *ways.tick(5.5)]
    assert moves.ResetLink("d") in actions
    assert any(isinstance(action, moves.Send) and isinstance(action.body, Offer) and action.body.handoff > 1 for action in actions)


@pytest.mark.parametrize(("more", "moves_on"), [({}, True), ({"alone": True}, False), ({"reserve_all": True}, False)], ids=str)
def test_an_offer_that_needs_an_empty_decode_keeps_its_place(more: dict[str, object], moves_on: bool) -> None:
    """Every five seconds it went to the end of the other decode's line, where it was passed again."""
    ways = Handoffs(4, random.Random(1))
    for peer in ("d", "e"):
        ways.beat(peer, LOAD, 0.0)
    ways.begin(KEY, replace(job(), **more), 3, [], (0,), 0.0)
    actions = [action for second in range(1, 12) for action in ways.tick(float(second))]
    assert any(isinstance(action, moves.Send) and isinstance(action.body, Withdraw) for action in actions) is moves_on


@pytest.mark.parametrize("pages", [[], [0, 1], [-1, -1, -1]], ids=str)
def test_a_grant_of_other_pages_than_were_asked_for_is_no_grant(pages: list[int]) -> None:
    """It ended the process, by an index beyond the list."""
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    ways.begin(KEY, job(), 3, [], (0,), 0.0)
    actions = [*ways.letter("d", Granted(1, 7, pages, [RANK]), 0.1), *ways.drawn(KEY, Token(0, 1), 0.2)]
    assert [action.body for action in actions if isinstance(action, moves.Send)] == [Withdraw(1)]
    assert not [action for action in actions if isinstance(action, moves.Push)]


def test_a_push_without_an_end_is_ended_when_it_is_withdrawn() -> None:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    ways.begin(KEY, job(), 4, [], (0,), 0.0)
    ways.letter("d", Granted(1, 7, [0], [RANK]), 0.1)
    ways.computed(KEY, 4, 0.2)
    assert moves.Flush("d", RANK, 1, 7, (), ()) in ways.drop(KEY, 0.3), "the transfer would wait for the end of this push for ever"


# -------------------------------------------------------------------------------------------------------------- decode


def arrive(core: DecodeCore, number: int, grant: int) -> list[object]:
    """Grant, receive and hear of handoff `number`, as far as the core goes along."""
    actions: list[object] = []
    actions += core.outcome(EngineGranted(("p", number), (number,)), 0.2)
    actions += core.posted(Posted(grant, (RANK,)), 0.2)
    actions += core.letter("p", Pushed(number, grant, [(0, Token(0, 5))], [[1]]), 0.3)
    actions += core.arrived(Arrived(grant, ((1,),)), 0.4)
    return actions


def test_a_second_commit_of_what_runs_already_leaves_its_words_alone() -> None:
    core = decode()
    core.letter("p", offer(1), 0.0)
    core.letter("p", offer(2), 0.1)
    assert Committed(1) in [action.body for action in arrive(core, 1, 1) if isinstance(action, inbound.Send)]
    core.runs.outbox.tokens(KEY, [Token(1, 6)], stage_s=0.1)
    arrive(core, 2, 2)
    assert core.runs.outbox.holding("g") == [Holding(KEY, 2, False, False)]


def test_a_second_commit_of_what_has_ended_is_not_computed_again() -> None:
    """Its end was said and not yet acknowledged; the engine knew nothing of it any more, and wrote the whole answer again for nobody."""
    core = decode()
    core.letter("p", offer(1), 0.0)
    core.letter("p", offer(2), 0.1)
    arrive(core, 1, 1)
    core.outcome(Drawn(KEY, Token(1, 6), "stop"), 0.5)
    actions = arrive(core, 2, 2)
    assert [action for action in actions if isinstance(action, inbound.Commit | inbound.Lapse | inbound.Land)] == [
        inbound.Lapse(("p", 2)),
        inbound.Land(("p", 2)),
    ]
    assert Committed(2) in [action.body for action in actions if isinstance(action, inbound.Send)]


def test_an_offer_of_which_another_choice_still_runs_is_committed_already() -> None:
    """It was taken again, and the tokens that the other choice had said were forgotten."""
    core = decode()
    both = Offer(1, KEY, replace(job(), choices=[Choice(0, 1), Choice(1, 1)]), 3, [], 60.0)
    core.letter("p", both, 0.0)
    arrive(core, 1, 1)
    second = Key("r", 1, 1, "e")
    core.outcome(Drawn(second, Token(0, 6), None), 0.5)
    core.outcome(Drawn(KEY, Token(1, 6), "stop"), 0.5)
    for ended in core.runs.outbox.seen([(KEY, 2, True)]):
        core.over(ended)
    assert [action.body for action in core.letter("p", replace(both, handoff=2), 0.6) if isinstance(action, inbound.Send)] == [Committed(2)]
    assert core.runs.outbox.holding("g") == [Holding(second, 1, False, False)]


def test_a_grant_that_cannot_be_received_is_refused_at_once_and_its_pages_come_back() -> None:
    """Another decode may take it; a prefill that was told nothing offered it here again and again."""
    core = decode()
    core.letter("p", offer(1), 0.0)
    core.outcome(EngineGranted(("p", 1), (1,)), 0.2)
    actions = core.not_posted(NotPosted(1), 0.3)
    assert actions[:2] == [inbound.Lapse(("p", 1)), inbound.Abandon(1, told=False)]
    assert [action.body for action in actions if isinstance(action, inbound.Send)] == [Refused(1, "nothing can be received now")]
    assert core.not_posted(NotPosted(1), 0.3) == [], "another rank says so too"
    assert core.landed(Landed(1), 0.4) == [inbound.Land(("p", 1))] and len(core.inbound) == 0


def test_a_first_token_that_is_not_the_next_one_is_refused() -> None:
    """It ended the engine's thread, and with it the decode."""
    core = decode()
    core.letter("p", offer(1), 0.0)
    core.outcome(EngineGranted(("p", 1), (1,)), 0.2)
    core.posted(Posted(1, (RANK,)), 0.2)
    core.letter("p", Pushed(1, 1, [(0, Token(5, 5))], [[1]]), 0.3)
    actions = core.arrived(Arrived(1, ((1,),)), 0.4)
    assert not [action for action in actions if isinstance(action, inbound.Commit)] and not len(core.runs)
    assert [action.body for action in actions if isinstance(action, inbound.Send)] == [Refused(1, "token 5 where 0 is due")]


def test_what_is_in_transit_when_a_decode_drains_goes_elsewhere() -> None:
    core = decode()
    core.letter("p", offer(1), 0.0)
    core.outcome(EngineGranted(("p", 1), (1,)), 0.1)
    core.posted(Posted(1, (RANK,)), 0.1)
    bodies = [action.body for action in core.drain(0.2) if isinstance(action, inbound.Send)]
    assert bodies == [Refused(1, "draining")]
    assert not [action for action in arrive(core, 1, 1) if isinstance(action, inbound.Commit)]


def test_an_abandoned_grant_that_does_not_land_costs_its_link() -> None:
    core = decode()
    core.letter("p", offer(1), 0.0)
    core.outcome(EngineGranted(("p", 1), (1,)), 0.1)
    core.posted(Posted(1, (RANK,)), 0.1)
    core.letter("p", PeerBeat(1, 0, "f", "f", None, []), 0.2)  # type: ignore[arg-type]
    actions = [action for second in range(1, 20) for action in core.tick(float(second))]
    assert actions.count(inbound.ClosePeer("p")) == 1


def test_what_a_later_attempt_finds_in_a_pool_is_not_told_as_cached() -> None:
    found = Ledger("g", "tcp://g")
    for name in ("p", "q"):
        found.join(name, "prefill")
    found.open("r", ASK, 0.0)
    found.put("r", 0, 1, Entry("interactive", "1-0"))
    found.event("p", Started(Key("r", 0, 1, "e"), reused_tokens=2), 0.1)
    timeline = next(iter(found._flights.values())).timeline
    assert timeline.cached_tokens == 2
    found.dead("p", 1.0)
    found.put("r", 0, 2, Entry("interactive", "2-0"))
    found.event("q", Started(Key("r", 0, 2, "f"), reused_tokens=5), 1.1)
    assert timeline.cached_tokens == 2


def test_choices_that_wait_together_end_once_when_their_deadline_has_passed() -> None:
    """The first took the others along, and each of them was then ended again."""
    found = Ledger("g", "tcp://g")
    found.join("p", "prefill")
    found.open("r", Ask([1, 2], Sampling(), 4, deadline_s=1.0, n=3), 0.0)
    ended = [action.choice for action in found.tick(2.0) if isinstance(action, End)]
    assert ended == [0, 1, 2] and not len(found) and found.tick(2.0) == []


def test_a_deadline_that_only_a_jumping_clock_has_passed_is_no_end() -> None:
    """What a job has waited is told by Redis' clock: it may be set while the job stands there."""
    found = Ledger("g", "tcp://g")
    found.join("p", "prefill")
    found.open("r", Ask([1, 2], Sampling(), 4, deadline_s=100.0), 0.0)
    actions = found.event("p", Lost(Key("r", 0, 1, "e"), "expired"), 5.0)
    (again,) = (action for action in actions if isinstance(action, Put))
    assert again.job.deadline_s == 95.0
    (end,) = (action for action in found.event("p", Lost(Key("r", 0, 2, "f"), "expired"), 99.5) if isinstance(action, End))
    assert end.error is not None and end.error.code == "deadline_exceeded"


# ------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("more", [{"deadline_s": 0.0}, {"max_tokens": 1000}, {"protocol": 0}], ids=str)
def test_a_job_that_is_over_as_it_is_claimed_does_not_keep_the_worker_from_claiming(more: dict[str, object]) -> None:
    """It counted as one that is about to begin, no launch ever contained it, and an idle worker claimed nothing any more."""
    runs = Runs(Outbox(), 64, parks=False)
    runs.claimed(Entry("interactive", "1-0"), replace(job(), **more), 0.0)
    assert (runs.unbegun, runs.unbegun_tokens) == (0, 0)


def test_a_suspect_runs_only_where_its_gateway_knows_of_it() -> None:
    """A worker that had just started launched it before any gateway had met the worker: its death was no suspicion, again and again."""
    runs = Runs(Outbox(), 64, parks=False)
    assert runs.claimed(Entry("resume", "1-0"), replace(job(), suspicion=1), 0.0) == [] == runs.acknowledged()
    (key,) = runs.outbox.unended()
    assert runs.unbegun == 1, "it comes: no room for another"
    runs.outbox.seen([(key, 0, False)])
    (submit,) = runs.acknowledged()
    assert isinstance(submit, Submit) and submit.sequence.key == key and runs.acknowledged() == []
    assert runs.began(Began(key, (0,)), 0.1) is not None and runs.unbegun == 0


@pytest.mark.parametrize("end", ["cancel", "lose", "drain"])
def test_a_suspect_that_is_given_up_while_it_waits_does_not_run(end: str) -> None:
    runs = Runs(Outbox(), 64, parks=False)
    runs.claimed(Entry("resume", "1-0"), replace(job(), suspicion=1), 0.0)
    (key,) = runs.outbox.unended()
    actions = {"cancel": lambda: runs.cancel(key), "lose": lambda: runs.lose(key, "failed"), "drain": runs.drain}[end]()
    runs.outbox.seen([(key, 0, False)])
    assert not [action for action in (*actions, *runs.acknowledged()) if isinstance(action, Submit)] and not runs.unbegun


def test_a_decode_that_dies_in_its_first_step_is_suspected() -> None:
    """Only its beats told of the launch: what killed within one was never suspected, and killed one decode after the other."""
    found = ledger()
    found.event("d", Started(KEY), 0.2)
    assert [action.job.suspicion for action in found.dead("d", 3.0) if isinstance(action, Put)] == [1]


def test_a_decode_that_dies_before_its_first_word_is_suspected_once() -> None:
    found = ledger()
    suspicions = []
    for attempt in (1, 2, 3):
        key = Key("r", 0, attempt, "e")
        found.event("p", Started(key), 1.0 * attempt)
        found.event("p", Tokens(key, [Token(attempt - 1, 1)]), 1.1 * attempt)
        found.event("p", Handed(key, f"d{attempt}"), 1.2 * attempt)
        suspicions += [action.job.suspicion for action in found.dead(f"d{attempt}", 10.0 * attempt) if isinstance(action, Put)]
    assert suspicions == [1, 1, 1]
