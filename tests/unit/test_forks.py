"""Several choices of one prompt in the scheduler: one prefill, shared pages, own draws."""

from __future__ import annotations

import pytest

from common.messages import Key, Sampling, Token
from services.engine.plan import Began, Drawn, Granted, Preempted
from services.engine.sequence import Sequence
from tests.unit.test_scheduler import PAGE, Rig, key, names, sequence, shape

EIGHT = 2 * PAGE


def family(tokens: int, choices: int = 3, *, most: int = 8, order: float = 0.0, execution: str = "x") -> Sequence:
    """A leader and its forks; a choice's name is its number."""
    ids = list(range(1, tokens + 1))
    leader, *forks = [Sequence(Key(str(i), i, 0, execution), list(ids), tokens, Sampling(), most, order=order) for i in range(choices)]
    leader.forks = tuple(forks)
    return leader


def test_forks_start_with_the_first_token_and_compute_only_the_last_page() -> None:
    rig = Rig(40)
    rig.submit(family(3 * PAGE + 1))
    assert shape(rig.plan()) == [("0", 0, 3 * PAGE + 1)]
    rig2 = Rig(40)
    rig2.submit(family(3 * PAGE + 1))
    first = rig2.step()
    assert names(first, Drawn) == ["0"]
    assert sorted(shape(rig2.plan())) == [("0", 3 * PAGE + 1, 1), ("1", 3 * PAGE, 1), ("2", 3 * PAGE, 1)]


def test_a_prompt_of_whole_pages_leaves_its_last_page_to_be_computed_again() -> None:
    rig = Rig(40)
    rig.submit(family(EIGHT))
    rig.step()
    assert sorted(shape(rig.plan())) == [("0", EIGHT, 1), ("1", PAGE, PAGE), ("2", PAGE, PAGE)]


def test_shared_pages_are_held_once_and_go_with_the_last() -> None:
    rig = Rig(40)
    rig.submit(family(5 * PAGE, most=2))
    rig.step()
    shared = rig.pool.counts.held
    assert shared == 5 + 1 + 1, "five pages of the prompt, and a last one for each fork"
    while rig.scheduler.keys():
        rig.step()
    assert rig.free == 40


def test_forks_live_on_when_the_leader_ends_at_once_or_is_cancelled() -> None:
    for gone in ("ends", "cancelled"):
        rig = Rig(40)
        rig.submit(family(EIGHT, most=1 if gone == "ends" else 4))
        outcomes = rig.step()
        assert names(outcomes, Drawn) == ["0"]
        if gone == "cancelled":
            rig.scheduler.cancel(Key("0", 0, 0, "x"))
        assert names(rig.step(), Began) == ["1", "2"]
        while rig.scheduler.keys():
            rig.step()
        assert rig.free == 40


def test_without_room_a_fork_waits_and_shares_nothing() -> None:
    """It must not hold pages that it cannot use: two such would wait for each other for ever."""
    rig = Rig(3)
    rig.submit(family(EIGHT, choices=2, most=2))
    rig.step()
    assert rig.pool.counts.held == 3, "the leader's two pages, and the fork's last one"
    tight = Rig(2)
    tight.submit(family(EIGHT, choices=2, most=1))
    tight.step()
    assert shape(tight.plan()) == [("1", 0, EIGHT)]


def test_a_full_batch_makes_forks_wait() -> None:
    rig = Rig(40, batch=1)
    rig.submit(family(EIGHT, choices=2))
    rig.step()
    assert shape(rig.plan()) == [("0", EIGHT, 1)]


def test_forks_are_preempted_like_others_and_leave_the_shared_pages_to_the_rest() -> None:
    rig = Rig(4)
    rig.submit(family(PAGE + 1, choices=2, most=3 * PAGE))
    seen = []
    for _ in range(6 * PAGE):
        seen += rig.step()
    assert names(seen, Preempted) == ["1"]
    assert rig.free == 4


def test_a_grant_brings_the_forks_along() -> None:
    rig = Rig(40)
    leader = family(EIGHT + 1)
    rig.scheduler.reserve(("p", 1), leader)
    rig.scheduler.next()
    assert [type(one) for one in rig.scheduler.take_outcomes()] == [Granted]
    rig.scheduler.admit(("p", 1), Token(0, 9))
    assert sorted(shape(rig.plan())) == [("0", EIGHT + 1, 1), ("1", EIGHT, 1), ("2", EIGHT, 1)]


def test_a_second_handoff_of_a_running_execution_brings_nothing() -> None:
    rig = Rig(40)
    for number in (1, 2):
        rig.scheduler.reserve(("p", number), family(EIGHT + 1))
    rig.scheduler.next()
    for number in (1, 2):
        rig.scheduler.admit(("p", number), Token(0, 9))
    assert len(rig.scheduler.keys()) == 3
    while rig.scheduler.keys():
        rig.step()
    assert rig.free == 40


def test_a_family_that_must_run_alone_does() -> None:
    """Its choices were counted as company: others were let in beside them."""
    rig = Rig(40)
    leader = family(EIGHT)
    for one in (leader, *leader.forks):
        one.alone = True
    rig.submit(leader)
    rig.submit(sequence("other", 4, order=1.0))
    for _ in range(4):
        assert "other" not in names(rig.step(), Began)
    while len(rig.scheduler.keys()) > 1:
        rig.step()
    assert rig.scheduler.keys() == (key("other"),)


@pytest.mark.parametrize(("order", "first"), [(2.0, "the choice"), (0.0, "the offer")])
def test_a_choice_that_waits_for_a_page_is_not_passed_by_later_offers(order: float, first: str) -> None:
    """It never started while others came, and its gateway believed that it ran."""
    rig = Rig(5, growth=0)
    rig.scheduler.reserve(("p", 0), family(3 * PAGE + 1, choices=2, most=3, order=1.0))
    rig.scheduler.reserve(("p", 1), sequence("full", PAGE, order=0.5))
    assert len(rig.step()) == 2 and rig.free == 0
    rig.scheduler.admit(("p", 0), Token(0, 9))
    assert rig.scheduler.snapshot().waiting == 1
    rig.scheduler.reserve(("p", 2), sequence("later", PAGE, order=order))
    rig.scheduler.lapse(("p", 1))
    rig.scheduler.landed(("p", 1))
    seen: list[str] = []
    while len(seen) < 2:
        for outcome in rig.step():
            seen += ["the offer"] if isinstance(outcome, Granted) else ["the choice"] if names([outcome], Began) == ["1"] else []
    assert seen[0] == first


def test_a_decode_grants_no_more_than_it_has_places_for() -> None:
    """Sequences beyond `max_batch` had pages and did not move."""
    rig = Rig(40, batch=2)
    for number in range(4):
        rig.scheduler.reserve(("p", number), sequence(str(number), 4, order=float(number)))
    assert [outcome.handoff for outcome in rig.step() if isinstance(outcome, Granted)] == [("p", 0), ("p", 1)]
    rig.scheduler.admit(("p", 0), Token(0, 9))
    assert not [outcome for outcome in rig.step() if isinstance(outcome, Granted)]
    rig.scheduler.cancel(key("0"))
    assert [outcome.handoff for outcome in rig.step() if isinstance(outcome, Granted)] == [("p", 2)]
