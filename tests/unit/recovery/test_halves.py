"""Each half of the protocol by itself: what it answers at once, where the simulation would only be slower without the answer."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from msgspec.structs import replace

from common.messages import (
    Choice,
    Committed,
    Finished,
    Granted,
    Job,
    Key,
    Lost,
    Offer,
    PeerBeat,
    Pushed,
    Refused,
    Rejected,
    Resent,
    Token,
    Tokens,
    Waiting,
    Withdraw,
    Withdrawn,
)
from common.queue import Entry
from services.decode import inbound
from services.decode.core import DecodeCore
from services.engine.plan import Began, Drawn
from services.engine.plan import Granted as EngineGranted
from services.prefill import handoffs, moves
from services.prefill.handoffs import Handoffs
from services.prefill.routing import Holders, Load
from services.transfer.protocol import Arrived, Posted, PushFailed, Sent
from services.worker.outbox import Outbox
from services.worker.runs import Acknowledge, Runs, Stop, Submit
from tests.unit.recovery.test_found import KEY, LOAD, RANK, arrive, decode, job, offer, prefill
from tests.unit.recovery.worker import LAYOUT

ENTRY = Entry("interactive", "1-0")
FLUSH = moves.Flush("d", RANK, 1, 7, (0,), ())


def beat(link: int, *pursued: int) -> PeerBeat:
    return PeerBeat(1, link, "f", "f", LAYOUT, [], list(pursued))


def said(actions: list[object]) -> list[object]:
    """Bodies of the letters among the actions."""
    return [action.body for action in actions if isinstance(action, inbound.Send | moves.Send)]


def offering(*decodes: str) -> Handoffs:
    ways = Handoffs(4, random.Random(1))
    for peer in decodes or ("d",):
        ways.beat(peer, LOAD, 0.0)
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
    actions = core.arrived(Arrived(1, ((2,),)), 0.3)
    assert said(actions) == [Rejected(1, 0, [0])] and inbound.Lapse(("p", 1)) in actions
    assert len(core.runs) == 0


def known_beginning(core: DecodeCore, length: int = 11, shared: int = 2) -> Granted:
    """An offer of three pages, of which the pool holds the first `shared`."""
    core.letter("p", replace(offer(1), length=length), 0.0)
    actions = core.outcome(EngineGranted(("p", 1), (4, 5, 6, 7), shared), 0.1)
    assert actions == [inbound.Expect(("p", 1), 1, (4, 5, 6)[shared:], tuple(range(shared, 3)), ())]
    (word,) = said(core.posted(Posted(1, (RANK,)), 0.2))
    assert isinstance(word, Granted)
    return word


def test_a_grant_names_missing_pages_only_and_is_judged_by_them() -> None:
    core = decode()
    assert known_beginning(core).pages == [-1, -1, 6]
    assert core.letter("p", Pushed(1, 1, [(0, Token(0, 5))], [[9]]), 0.3) == []
    assert Committed(1) in said(core.arrived(Arrived(1, ((9,),)), 0.4))


def test_a_missing_page_that_differs_is_rejected_by_its_place_in_the_sequence() -> None:
    core = decode()
    known_beginning(core)
    core.letter("p", Pushed(1, 1, [(0, Token(0, 5))], [[9]]), 0.3)
    assert said(core.arrived(Arrived(1, ((8,),)), 0.4)) == [Rejected(1, 0, [2])]


def test_nothing_missing_is_committed_when_prefill_has_said_its_word() -> None:
    core = decode()
    assert known_beginning(core, shared=3).pages == [-1, -1, -1]
    assert core.arrived(Arrived(1, ((),)), 0.3) == []
    assert Committed(1) in said(core.letter("p", Pushed(1, 1, [(0, Token(0, 5))], [[]]), 0.4))


def test_checksums_of_pages_that_were_not_asked_for_are_no_agreement() -> None:
    core = decode()
    known_beginning(core, shared=3)
    core.arrived(Arrived(1, ((),)), 0.3)
    assert said(core.letter("p", Pushed(1, 1, [(0, Token(0, 5))], [[9]]), 0.4)) == [Rejected(1, 0, [])]


def test_neighbours_on_both_sides_travel_as_one_message() -> None:
    core = DecodeCore(Outbox(), inbound.Inbound(4, 64, run_pages=3), max_request_tokens=64)
    core.letter("p", replace(offer(1), length=31, breaks=[4]), 0.0)
    pages = (9, 10, 11, 12, 13, 14, 2, 3)
    (expect,) = core.outcome(EngineGranted(("p", 1), pages, 0), 0.1)
    assert expect == inbound.Expect(("p", 1), 1, pages, tuple(range(8)), (0, 3, 4, 6))
    (word,) = said(core.posted(Posted(1, (RANK,)), 0.2))
    assert isinstance(word, Granted) and word.starts == [0, 3, 4, 6]


def test_who_does_not_name_its_breaks_sends_page_by_page() -> None:
    core = DecodeCore(Outbox(), inbound.Inbound(4, 64, run_pages=3), max_request_tokens=64)
    core.letter("p", replace(offer(1), length=11), 0.0)
    (expect,) = core.outcome(EngineGranted(("p", 1), (4, 5, 6), 0), 0.1)
    assert isinstance(expect, inbound.Expect) and expect.starts == ()


@pytest.mark.parametrize("hashes", [[b"x" * 16, b"y" * 16], [b"short"]])
def test_an_offer_with_other_hashes_than_its_pages_is_refused(hashes: list[bytes]) -> None:
    core = decode()
    (word,) = said(core.letter("p", replace(offer(1), length=7, hashes=hashes), 0.0))
    assert isinstance(word, Refused) and "hashes" in word.reason


def test_hashes_of_an_offer_reach_the_engine() -> None:
    core = decode()
    reserve, _ = core.letter("p", replace(offer(1), length=7, hashes=[b"x" * 16]), 0.0)
    assert isinstance(reserve, inbound.Reserve) and reserve.sequence.hashes == [b"x" * 16]


# ------------------------------------------------------------------------------------------------------------- prefill


def test_an_offer_that_found_no_decode_is_made_as_soon_as_one_comes() -> None:
    ways = Handoffs(4, random.Random(1))
    assert ways.begin(KEY, job(), 3, [], (0,), 0.0) == []
    (offered,) = said(ways.beat("d", LOAD, 0.1))
    assert isinstance(offered, Offer) and offered.handoff == 1
    assert ways.beat("d2", LOAD, 0.2) == []


def test_pages_that_the_decode_holds_are_neither_pushed_nor_flushed() -> None:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    ways.begin(KEY, job(), 15, [b"1", b"2", b"3"], (3, 4, 5, 6), 0.0)
    ways.letter("d", Granted(1, 7, [-1, -1, 8, 9], [RANK]), 0.1)
    assert ways.computed(KEY, 8, 0.2) == []
    assert ways.computed(KEY, 12, 0.3) == [moves.Push("d", RANK, 1, 7, (5,), (2,), ())]
    assert ways.drop(KEY, 0.4)[1:] == [moves.Flush("d", RANK, 1, 7, (3,), ())]
    assert ways.spared_pages == 0


def test_a_message_is_pushed_once_its_last_page_is_final() -> None:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    (sent,) = ways.begin(KEY, job(), 19, [], (3, 4, 5, 8, 9, 1), 0.0)  # the last page is room to grow
    assert isinstance(sent, moves.Send) and isinstance(sent.body, Offer) and sent.body.breaks == [3]
    ways.letter("d", Granted(1, 7, [20, 21, 22, 23, 24], [RANK], [0, 2, 3]), 0.1)
    assert ways.computed(KEY, 4, 0.2) == []
    assert ways.computed(KEY, 8, 0.3) == [moves.Push("d", RANK, 1, 7, (3, 4), (0, 1), (0, 2, 3))]
    assert ways.computed(KEY, 16, 0.3) == [moves.Push("d", RANK, 1, 7, (5,), (2,), (0, 2, 3))]
    assert ways.drawn(KEY, Token(0, 5), 0.4)[0] == moves.Push("d", RANK, 1, 7, (8, 9), (3, 4), (0, 2, 3))


def test_what_is_given_up_is_flushed_message_by_message() -> None:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    ways.begin(KEY, job(), 16, [], (3, 4, 5, 6), 0.0)
    ways.letter("d", Granted(1, 7, [20, 21, 22, 23], [RANK], [0, 2]), 0.1)
    ways.computed(KEY, 12, 0.3)
    assert ways.drop(KEY, 0.4)[1:] == [moves.Flush("d", RANK, 1, 7, (2, 3), (0, 2))]


@pytest.mark.parametrize("starts", [[0, 2], [1], [0, 3, 2], [0, 3, 9], [0, 3, 3]])
def test_messages_over_pages_that_lie_apart_are_not_sent(starts: list[int]) -> None:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    ways.begin(KEY, job(), 16, [], (3, 4, 5, 8), 0.0)
    actions = ways.letter("d", Granted(1, 7, [20, 21, 22, 23], [RANK], starts), 0.1)
    assert Withdraw(1) in said(actions)


def test_a_handoff_of_which_nothing_is_missing_is_finished_by_the_first_token() -> None:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    ways.begin(KEY, job(), 8, [b"1", b"2"], (3, 4), 0.0)
    ways.letter("d", Granted(1, 7, [-1, -1], [RANK]), 0.1)
    assert ways.drawn(KEY, Token(0, 5), 0.2) == [moves.FinishPush(1, 7)]
    (word,) = said(ways.sent(Sent(1, 7, ()), 0.3))
    assert isinstance(word, Pushed) and word.checksums == []
    ways.letter("d", Committed(1), 0.4)
    assert ways.spared_pages == 2


def test_the_next_turn_is_offered_to_the_decode_that_holds_the_first() -> None:
    other = Key("r2", 0, 1, "e")
    for seed in range(8):
        ways = Handoffs(4, random.Random(seed), holders=Holders())
        for peer in ("d1", "d2", "d3"):
            ways.beat(peer, LOAD, 0.0)
        (first,) = ways.begin(KEY, job(), 8, [b"1", b"2"], (3, 4), 0.0)
        assert isinstance(first, moves.Send)
        ways.letter(first.to, Committed(1), 0.1)
        (second,) = ways.begin(other, job(), 13, [b"1", b"2", b"3"], (5, 6, 7, 8), 0.2)
        assert isinstance(second, moves.Send) and second.to == first.to


@pytest.mark.parametrize("beginning", [[], [b"1"]], ids=["new", "held"])
def test_a_burst_is_spread_though_each_is_committed_before_the_next_beat(beginning: list[bytes]) -> None:
    """Six short prompts in half a second, all of which one decode held, went to that one; the other stood by."""
    ways = Handoffs(4, random.Random(1), holders=Holders())
    took = Counter[str]()
    for peer in ("d1", "d2"):
        ways.beat(peer, LOAD, 0.0)
    for number in range(6):
        key = Key(f"r{number}", 0, 1, "e")
        (word,) = ways.begin(key, job(), 4, beginning, (3,), 0.1)
        assert isinstance(word, moves.Send) and isinstance(word.body, Offer)
        ways.letter(word.to, Granted(word.body.handoff, 7, [1], [RANK]), 0.1)
        ways.letter(word.to, Committed(word.body.handoff), 0.1)
        took[word.to] += 1
    assert min(took.values()) >= 2, took
    for peer in ("d1", "d2"):
        ways.beat(peer, Load(took[peer], 10), 0.5)
        assert ways._load(peer).running == took[peer], "counted by the beat, and no more by us"


def test_an_offer_in_line_is_counted_once() -> None:
    """The decode's beat counts what waits there as load; not as pages, of which none are reserved for it."""
    ways = offering("d")
    ways.letter("d", Waiting(1), 0.1)
    assert ways._load("d").running == 1 and ways._room("d") == LOAD.free_pages - 1
    ways.beat("d", Load(1, LOAD.free_pages), 0.5)
    assert ways._load("d").running == 1 and ways._room("d") == LOAD.free_pages - 1


def test_what_is_offered_is_counted_until_it_is_granted_and_a_beat_has_come() -> None:
    ways = offering("d")
    assert ways._load("d").running == 1
    ways.beat("d", LOAD, 0.1)
    assert ways._load("d").running == 1, "the beat may have crossed the offer"
    ways.letter("d", Granted(1, 7, [0], [RANK]), 0.2)
    assert ways._load("d").running == 1
    ways.beat("d", LOAD, 0.6)
    assert ways._load("d").running == 0
    ways.drop(KEY, 0.7)
    ways.begin(KEY, job(), 3, [], (0,), 0.8)
    ways.drop(KEY, 0.9)
    assert ways._load("d").running == 0, "given up again"


def test_every_request_is_repeated_until_it_is_answered() -> None:
    ways = offering()
    assert [type(body) for body in said(ways.tick(0.6))] == [Offer]
    ways.letter("d", Granted(1, 7, [0], [RANK]), 0.7)
    assert said(ways.tick(1.3)) == []
    ways.drawn(KEY, Token(0, 5), 1.4)
    (word,) = said(ways.sent(Sent(1, 7, ((1,),)), 1.5))
    assert said(ways.tick(1.6)) == [] and said(ways.tick(2.1)) == [word]
    ways.drop(KEY, 2.2)
    assert said(ways.tick(2.8)) == [Withdraw(1)]
    ways.letter("d", Withdrawn(1), 2.9)
    assert ways.tick(9.0) == []


def test_an_offer_in_line_moves_to_a_decode_with_room_and_to_no_other() -> None:
    """A long prompt went from the head of one full line to the end of the other every five seconds, and smaller ones took the pages that
    had been saved for it."""
    ways = Handoffs(4, random.Random(1), growth_pages=2)
    for peer in ("d", "e"):
        ways.beat(peer, Load(3, 5), 0.0)
    (offered,) = ways.begin(KEY, job(), 40, [], tuple(range(10)), 0.0)
    assert isinstance(offered, moves.Send)
    first, other = offered.to, {"d": "e", "e": "d"}[offered.to]
    ways.letter(first, Waiting(1), 0.1)
    assert [type(body) for body in said(ways.tick(handoffs.OFFER_S + 1))] == [Offer], "repeated where it stands"
    ways.beat(other, Load(3, 11), handoffs.OFFER_S + 1.1)
    assert ways.tick(handoffs.OFFER_S + 1.2) == [], "a grant has room to grow"
    ways.beat(other, Load(3, 12), handoffs.OFFER_S + 1.3)
    moved = ways.tick(handoffs.OFFER_S + 1.4)
    assert [(action.to, type(action.body)) for action in moved if isinstance(action, moves.Send)] == [(first, Withdraw), (other, Offer)]


def test_no_more_offers_move_than_there_is_room_for() -> None:
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", Load(3, 0), 0.0)
    for number in range(3):
        (offered,) = ways.begin(Key(f"r{number}", 0, 1, "e"), job(), 32, [], tuple(range(8)), 0.0)
        assert isinstance(offered, moves.Send) and isinstance(offered.body, Offer)
        ways.letter("d", Waiting(offered.body.handoff), 0.1)
    ways.beat("e", Load(3, 17), handoffs.OFFER_S)
    moved = [action for action in ways.tick(handoffs.OFFER_S + 1) if isinstance(action, moves.Send) and action.to == "e"]
    assert [type(action.body) for action in moved] == [Offer, Offer]


def test_an_offer_that_nobody_has_answered_moves_to_any_other_decode() -> None:
    ways = Handoffs(4, random.Random(1))
    for peer in ("d", "e"):
        ways.beat(peer, Load(3, 0), 0.0)
    (offered,) = ways.begin(KEY, job(), 40, [], tuple(range(10)), 0.0)
    assert isinstance(offered, moves.Send)
    moved = [action for action in ways.tick(handoffs.OFFER_S + 1) if isinstance(action, moves.Send)]
    assert [type(action.body) for action in moved] == [Withdraw, Offer] and moved[1].to != offered.to


def test_a_grant_that_crosses_the_withdrawal_is_flushed() -> None:
    ways = offering()
    assert ways.drop(KEY, 0.1) == [moves.Send("d", Withdraw(1))]
    assert ways.letter("d", Granted(1, 7, [0], [RANK]), 0.2) == [FLUSH]
    assert ways.letter("d", Withdrawn(1, Granted(1, 7, [0], [RANK])), 0.3) == [], "it is flushed already"


def test_a_grant_of_which_only_the_answer_to_withdraw_tells_is_flushed() -> None:
    ways = offering()
    ways.drop(KEY, 0.1)
    assert ways.letter("d", Withdrawn(1, Granted(1, 7, [0], [RANK])), 0.3) == [FLUSH]


def test_a_dead_decode_is_closed_and_its_handoffs_go_elsewhere() -> None:
    ways = offering("d")
    for peer in ("d", "d2"):
        ways.beat(peer, LOAD, 0.0)
    actions = ways.peer_dead("d", 3.0)
    assert actions[0] == moves.ResetLink("d")
    assert [action.to for action in actions[1:] if isinstance(action, moves.Send)] == ["d2"]


def test_a_refusal_goes_elsewhere_at_once() -> None:
    ways = offering("d")
    for peer in ("d", "d2"):
        ways.beat(peer, LOAD, 0.0)
    actions = ways.letter("d", Refused(1, "draining"), 0.1)
    assert [action.to for action in actions if isinstance(action, moves.Send) and isinstance(action.body, Offer)] == ["d2"]


def test_pages_that_arrive_changed_again_and_again_are_given_up() -> None:
    """41 pages of which every 40th was spoilt were pushed for minutes, 64 GB of them, until the request's deadline."""
    ways = offering("d", "d2")
    actions: list[moves.Action] = []
    for number in range(1, handoffs.FAILURES + 1):
        (going,) = ways._going.values()
        assert going.handoff is not None and going.handoff.number == number
        actions = ways.letter(going.handoff.peer, Rejected(number, 0, [0]), 0.1)
    (given_up,) = [action for action in actions if isinstance(action, moves.GivenUp)]
    assert given_up.key == KEY and "changed" in given_up.detail
    assert said(actions) == [Withdraw(handoffs.FAILURES)] and len(ways) == 0


def test_only_whose_pages_could_not_be_pushed_is_given_up() -> None:
    ways = offering("d")
    other = replace(KEY, choice=1)
    ways.begin(other, job(), 3, [], (1,), 0.0)
    actions: list[moves.Action] = []
    for number in range(1, handoffs.FAILURES + 1):
        going = ways._going[KEY]
        assert going.handoff is not None
        actions = ways.push_failed(PushFailed(going.handoff.number, 7, "no way to the peer"), 1.0 * number)
        ways.tick(1.0 * number + 0.5)
    assert actions[0] == moves.ResetLink("d") and [type(action) for action in actions[1:]] == [moves.GivenUp]
    assert list(ways._going) == [other], "its neighbour on the same link goes on"


def test_an_execution_whose_pages_no_decode_takes_goes_back_to_its_gateway() -> None:
    core = prefill()
    (submit,) = core.claimed(ENTRY, replace(job(), max_tokens=9), 0.0)
    assert isinstance(submit, Submit)
    key = submit.sequence.key
    (begun,) = said(core.outcome(Began(key, (0,)), 0.1))
    assert isinstance(begun, Offer)
    core.handoffs._going[key].failures = handoffs.FAILURES - 1
    (peer,) = [going.handoff.peer for going in core.handoffs._going.values() if going.handoff]
    assert Stop(key) in core.letter(peer, Rejected(begun.handoff, 0, [0]), 0.2)
    (word,) = [word for word in core.runs.outbox.take()["g"] if isinstance(word, Lost)]
    assert (word.key, word.reason) == (key, "no_decode")


def test_a_short_answer_is_written_where_its_prompt_was_read() -> None:
    core = prefill(short_tokens=2)
    (submit,) = core.claimed(ENTRY, replace(job(), max_tokens=2), 0.0)
    assert isinstance(submit, Submit) and not submit.sequence.parks
    key = submit.sequence.key
    assert core.outcome(Began(key, (0,)), 0.1) == []
    core.outcome(Drawn(key, Token(0, 5), None), 0.2)
    core.outcome(Drawn(key, Token(1, 6), "length"), 0.3)
    words = core.runs.outbox.take()["g"]
    assert [token.index for word in words if isinstance(word, Tokens) for token in word.tokens] == [0, 1]
    assert words[-1] == Finished(key, 2, "length")
    assert core.over(key) == [Acknowledge(ENTRY)]


@pytest.mark.parametrize(
    "longer", [replace(job(), max_tokens=3), replace(job(), max_tokens=2, choices=[Choice(0, 1, []), Choice(1, 1, [])])]
)
def test_a_longer_answer_and_one_of_several_go(longer: Job) -> None:
    core = prefill(short_tokens=2)
    (submit,) = core.claimed(ENTRY, longer, 0.0)
    assert isinstance(submit, Submit) and submit.sequence.parks
    assert [body for body in said(core.outcome(Began(submit.sequence.key, (0,)), 0.1)) if isinstance(body, Offer)]


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
