"""A link that is slow but works is not condemned; one that is stuck is, in time."""

from __future__ import annotations

import random

from msgspec.structs import replace

from common.messages import Committed, Granted, Pushed, Token, Withdraw
from services.decode import inbound
from services.decode.core import DecodeCore
from services.decode.inbound import LAND_S
from services.engine.plan import Granted as EngineGranted
from services.prefill import moves
from services.prefill.handoffs import FAILURES, Handoffs
from services.transfer.protocol import Arrived, Landed, Posted, PushFailed, Sent
from tests.unit.recovery.test_found import KEY, LOAD, RANK, decode, job, offer

# ------------------------------------------------------------------------------------------------------------- prefill


def pushing(prompts: int) -> Handoffs:
    """So many prompts at once, all computed and given to the transfer at 0.2."""
    ways = Handoffs(4, random.Random(1))
    ways.beat("d", LOAD, 0.0)
    for number in range(1, prompts + 1):
        key = replace(KEY, request_id=f"r{number}")
        ways.begin(key, job(), 3, [], (number,), 0.0)
        ways.letter("d", Granted(number, number, [number], [RANK]), 0.1)
        assert moves.FinishPush(number, number) in ways.drawn(key, Token(0, 1), 0.2)
    return ways


def test_pushes_that_wait_for_each_other_on_a_slow_link_condemn_nothing() -> None:
    """16 prompts of 1 GiB on 10 GbE: the last has left after 15 s. Each began again from the first byte, five times, then all were lost."""
    ways = pushing(16)
    actions: list[moves.Action] = []
    for number in range(1, 17):
        actions += ways.tick(float(number))
        actions += ways.sent(Sent(number, number, ((1,),)), float(number))
        ways.letter("d", Committed(number), number + 0.1)
    assert not [action for action in actions if isinstance(action, moves.ResetLink | moves.GivenUp)]
    assert sum(isinstance(action, moves.Send) and isinstance(action.body, Pushed) for action in actions) == 16
    assert len(ways) == 0


def test_a_long_push_by_itself_condemns_nothing() -> None:
    ways = pushing(1)
    assert not [action for second in range(1, 120) for action in ways.tick(float(second)) if isinstance(action, moves.ResetLink)]


def test_only_the_word_that_a_push_has_failed_condemns_and_counts() -> None:
    ways = pushing(2)
    actions = ways.push_failed(PushFailed(2, 2, "nothing has moved for 5 s"), 5.3)
    assert moves.ResetLink("d") in actions
    assert [going.failures for going in ways._going.values()] == [0, 1] and FAILURES > 1


# -------------------------------------------------------------------------------------------------------------- decode


def transit(core: DecodeCore, *numbers: int) -> None:
    """Grants of the same numbers, receives posted."""
    for number in numbers:
        core.letter("p", replace(offer(number), key=replace(KEY, request_id=f"r{number}")), 0.0)
        core.outcome(EngineGranted(("p", number), (number,)), 0.1)
        core.posted(Posted(number, (RANK,)), 0.1)


def closed_at(core: DecodeCore, seconds: range) -> list[int]:
    """When the link was closed."""
    return [second for second in seconds if inbound.ClosePeer("p") in core.tick(float(second))]


def test_a_flush_waits_for_the_pages_in_front_of_it() -> None:
    """On a link that carries them, however slowly."""
    core = decode()
    transit(core, 1, 2)
    core.letter("p", Withdraw(2), 1.0)
    assert closed_at(core, range(1, 30)) == []
    core.arrived(Arrived(1, ((1,),)), 30.0)
    assert closed_at(core, range(30, 30 + int(LAND_S))) == []
    assert inbound.Land(("p", 2)) in core.landed(Landed(2), 39.0)


def test_a_flush_that_nothing_is_in_front_of_any_more_has_its_time_from_then_on() -> None:
    core = decode()
    transit(core, 1, 2)
    core.letter("p", Withdraw(2), 1.0)
    assert closed_at(core, range(1, 6)) == []
    core.arrived(Arrived(1, ((1,),)), 5.5)
    first, *_ = closed_at(core, range(6, 30))
    assert first == 5 + LAND_S + 1


def test_what_was_granted_later_is_behind_and_puts_nothing_off() -> None:
    core = decode()
    transit(core, 1)
    core.letter("p", Withdraw(1), 0.5)
    transit(core, 2, 3)
    first, *_ = closed_at(core, range(1, 30))
    assert first == 1 + LAND_S + 1


def test_another_prefill_is_not_in_front() -> None:
    core = decode()
    core.letter("q", replace(offer(9), key=replace(KEY, request_id="r9")), 0.0)
    core.outcome(EngineGranted(("q", 9), (9,)), 0.1)
    core.posted(Posted(1, (RANK,)), 0.1)
    core.letter("p", offer(1), 0.0)
    core.outcome(EngineGranted(("p", 1), (1,)), 0.1)
    core.posted(Posted(2, (RANK,)), 0.1)
    core.letter("p", Withdraw(1), 0.5)
    first, *_ = closed_at(core, range(1, 30))
    assert first == 1 + LAND_S + 1
