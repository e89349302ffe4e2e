"""Each half of the protocol by itself: what it answers at once, where the simulation would only be slower without the answer."""

from __future__ import annotations

import random

from common.messages import (
    Committed,
    Granted,
    Offer,
    PeerBeat,
    Pushed,
    Refused,
    Rejected,
    Resent,
    Token,
    Waiting,
    Withdraw,
    Withdrawn,
)
from common.queue import Entry
from services.decode import inbound
from services.engine.plan import Granted as EngineGranted
from services.prefill import handoffs
from services.prefill.handoffs import Handoffs
from services.transfer.protocol import Arrived, Sent
from services.worker.outbox import Outbox
from services.worker.runs import Acknowledge, Runs, Stop
from tests.unit.recovery.test_found import KEY, LOAD, RANK, arrive, decode, job, offer
from tests.unit.recovery.worker import LAYOUT

ENTRY = Entry("interactive", "1-0")
FLUSH = handoffs.Flush("d", RANK, 1, 7, (0,))


def beat(link: int, *pursued: int) -> PeerBeat:
    return PeerBeat(1, link, "f", "f", LAYOUT, [], list(pursued))


def said(actions: list[object]) -> list[object]:
    """Bodies of the letters among the actions."""
    return [action.body for action in actions if isinstance(action, inbound.Send | handoffs.Send)]


def offering(*decodes: str) -> Handoffs:
    ways = Handoffs(4, random.Random(1))
    ways.decodes(dict.fromkeys(decodes or ("d",), LOAD))
    ways.begin(KEY, job(), 3, [], (0,), 0.0)
    return ways


# ------------------------------------------------------------------------------------------------------------- decode


def test_a_raised_link_closes_this_side_once() -> None:
    core = decode()
    core.letter("p", beat(3, 1), 0.0)
    core.letter("p", offer(1), 0.0)
    core.outcome(EngineGranted(("p", 1), (1,)), 0.1)
    assert inbound.ClosePeer("p") not in core.letter("p", beat(3, 1), 0.2)
    actions = core.letter("p", beat(4, 1), 0.3)
    assert actions[0] == inbound.Lapse(("p", 1)) and actions[-1] == inbound.ClosePeer("p")
    assert core.letter("p", beat(4, 1), 0.4) == []


def test_a_grant_that_comes_after_its_offer_was_given_up_lands_at_once() -> None:
    core = decode()
    core.letter("p", offer(1), 0.0)
    core.letter("p", Withdraw(1), 0.1)
    assert core.outcome(EngineGranted(("p", 1), (1,)), 0.2) == [inbound.Land(("p", 1))]


def test_repeated_words_get_the_same_answer() -> None:
    core = decode()
    assert said(core.letter("p", offer(1), 0.0)) == [Waiting(1)]
    assert said(core.letter("p", offer(1), 0.1)) == [Waiting(1)]
    arrive(core, 1, 1)
    assert said(core.letter("p", Pushed(1, 1, [(0, Token(0, 5))], [[1]]), 0.5)) == [Committed(1)]
    assert said(core.letter("p", offer(1), 0.6)) == [Committed(1)]


def test_pages_that_differ_are_rejected_by_index() -> None:
    core = decode()
    core.letter("p", offer(1), 0.0)
    core.outcome(EngineGranted(("p", 1), (1,)), 0.1)
    core.letter("p", Pushed(1, 1, [(0, Token(0, 5))], [[1]]), 0.2)
    actions = core.arrived(Arrived(1, (2,)), 0.3)
    assert said(actions) == [Rejected(1, 0, [0])] and inbound.Lapse(("p", 1)) in actions
    assert len(core.runs) == 0


# ------------------------------------------------------------------------------------------------------------- prefill


def test_every_request_is_repeated_until_it_is_answered() -> None:
    ways = offering()
    assert [type(body) for body in said(ways.tick(0.6))] == [Offer]
    ways.letter("d", Granted(1, 7, [0], [RANK]), 0.7)
    assert said(ways.tick(1.3)) == []
    ways.drawn(KEY, Token(0, 5), 1.4)
    (word,) = said(ways.sent(Sent(1, 7, (1,)), 1.5))
    assert said(ways.tick(1.6)) == [] and said(ways.tick(2.1)) == [word]
    ways.drop(KEY, 2.2)
    assert said(ways.tick(2.8)) == [Withdraw(1)]
    ways.letter("d", Withdrawn(1), 2.9)
    assert ways.tick(9.0) == []


def test_a_grant_that_crosses_the_withdrawal_is_flushed() -> None:
    ways = offering()
    assert ways.drop(KEY, 0.1) == [handoffs.Send("d", Withdraw(1))]
    assert ways.letter("d", Granted(1, 7, [0], [RANK]), 0.2) == [FLUSH]
    assert ways.letter("d", Withdrawn(1, Granted(1, 7, [0], [RANK])), 0.3) == [], "it is flushed already"


def test_a_grant_of_which_only_the_answer_to_withdraw_tells_is_flushed() -> None:
    ways = offering()
    ways.drop(KEY, 0.1)
    assert ways.letter("d", Withdrawn(1, Granted(1, 7, [0], [RANK])), 0.3) == [FLUSH]


def test_a_dead_decode_is_closed_and_its_handoffs_go_elsewhere() -> None:
    ways = offering("d")
    ways.decodes({"d": LOAD, "d2": LOAD})
    actions = ways.peer_dead("d", 3.0)
    assert actions[0] == handoffs.ResetLink("d")
    assert [action.to for action in actions[1:] if isinstance(action, handoffs.Send)] == ["d2"]


def test_a_refusal_goes_elsewhere_at_once() -> None:
    ways = offering("d")
    ways.decodes({"d": LOAD, "d2": LOAD})
    actions = ways.letter("d", Refused(1, "draining"), 0.1)
    assert [action.to for action in actions if isinstance(action, handoffs.Send) and isinstance(action.body, Offer)] == ["d2"]


# -------------------------------------------------------------------------------------------------------- every worker


def test_the_entry_is_acknowledged_when_the_last_word_is_over_or_nobody_wants_it() -> None:
    runs = Runs(Outbox(), 64, parks=True)
    runs.claimed(ENTRY, job(), 0.0)
    (key,) = runs.outbox.unended()
    assert runs.lose(key, "drained") == [Stop(key)], "not before the gateway knows"
    assert runs.over(key) == [Acknowledge(ENTRY)]
    runs.claimed(ENTRY, job(), 0.0)
    (key,) = runs.outbox.unended()
    assert runs.cancel(key) == [Stop(key), Acknowledge(ENTRY)]
    assert runs.cancel(KEY) == [Stop(KEY)], "the engine may know what this layer has forgotten"


def test_an_execution_that_is_not_here_is_unknown() -> None:
    outbox = Outbox()
    outbox.resend("g", KEY, 3)
    assert outbox.take() == {"g": [Resent(KEY, unknown=True)]}


def test_a_job_that_cannot_run_here_is_refused_in_words() -> None:
    runs = Runs(Outbox(), 8, parks=True)
    assert runs.claimed(ENTRY, job(), 0.0) == []
    ((_, words),) = runs.outbox.take().items()
    assert words[0].reason == "refused" and "8" in words[0].detail  # type: ignore[union-attr]
