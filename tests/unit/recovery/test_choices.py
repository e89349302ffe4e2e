"""Several choices of one request: one job, one prefill, one handoff; each recovers by itself."""

from __future__ import annotations

import pytest

from common.messages import Offer, Sampling, Started
from gateway.ask import Ask
from tests.unit.recovery.test_rules import carrying, fleet
from tests.unit.recovery.world import World

FOUR = Ask(list(range(18)), Sampling(seed=4), 12, n=4)


def all_seen(gateway, least: int) -> bool:  # type: ignore[no-untyped-def]
    return all(len(client.seen) >= least for client in gateway.clients.values())


def test_one_job_one_prefill_one_handoff() -> None:
    world, gateway, _, [decode] = fleet(pages=40)
    offers = []
    world.wires.drop = lambda source, to, message: carrying(message, Offer) and bool(offers.append(message))
    gateway.submit(FOUR)
    assert world.run_until(lambda: not world.waiting(), 10)
    assert len(world.jobs) == 1 and len({letter.body.handoff for letter in offers}) == 1
    assert gateway.ledger.recoveries == 0 and decode.snapshot.step > 0
    assert len({tuple(client.seen) for client in gateway.clients.values()}) == 4
    world.settle()


def test_a_decode_that_dies_takes_no_choice_with_it() -> None:
    world, gateway, _, decodes = fleet(decodes=2, pages=40)
    gateway.submit(FOUR)
    assert world.run_until(lambda: all_seen(gateway, 3), 10)
    world.kill(max(decodes, key=lambda decode: decode.snapshot.running))
    world.settle()
    assert all(client.error is None for client in gateway.clients.values())


def test_a_prefill_that_dies_takes_all_choices_along_to_the_next_one() -> None:
    world, gateway, prefills, _ = fleet(prefills=2, pages=40)
    gateway.submit(FOUR)
    assert world.run_until(lambda: any(prefill.in_launch for prefill in prefills), 5)
    world.kill(next(prefill for prefill in prefills if prefill.in_launch))
    world.settle()
    assert len(world.jobs) == 2, "the second job brings all four"


@pytest.mark.parametrize("lost", range(1, 6))
def test_lost_words_about_the_others_are_made_good(lost: int) -> None:
    world, gateway, _, _ = fleet(pages=40)
    dropped = []
    world.wires.drop = lambda source, to, message: carrying(message, Started) and len(dropped) < lost and not dropped.append(message)
    gateway.submit(FOUR)
    world.settle()
    assert all(client.error is None for client in gateway.clients.values())


def test_an_answer_of_one_token_lets_the_others_go_on() -> None:
    world, gateway, _, _ = fleet(pages=40)
    gateway.submit(Ask(list(range(9)), Sampling(seed=4), 1, n=3))
    world.settle()
    assert [len(client.seen) for client in gateway.clients.values()] == [1, 1, 1]


def test_the_first_choice_may_leave_before_the_others_have_started() -> None:
    for after_s in (0.0, 0.01, 0.03, 0.1):
        world, gateway, _, _ = fleet(pages=40)
        name = gateway.submit(FOUR)
        world.run(after_s)
        gateway.cancel(name)
        world.settle()
        assert [client.error for client in gateway.clients.values()] == [None] * 4
        assert all(client.ended for client in list(gateway.clients.values())[1:])


def test_a_colocated_worker_shares_as_well() -> None:
    world = World(3)
    gateway = world.gateway()
    world.colocated(40)
    world.run(2)
    gateway.submit(FOUR)
    assert world.run_until(lambda: not world.waiting(), 10)
    assert len(world.jobs) == 1 and gateway.ledger.recoveries == 0
