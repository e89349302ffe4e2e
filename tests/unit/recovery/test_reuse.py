"""Prompts that begin alike, in the simulated fleet: what a decode holds does not cross the wire again, whatever happens to it."""

from __future__ import annotations

from common.messages import Granted, Letter, Rejected, Sampling
from gateway.ask import Ask
from tests.unit.recovery.decodes import Decode
from tests.unit.recovery.gateways import Gateway
from tests.unit.recovery.prefills import Prefill
from tests.unit.recovery.test_rules import fleet
from tests.unit.recovery.trouble import troubled
from tests.unit.recovery.world import World

TEXT = list(range(20))


def ended(world: World, gateway: Gateway, ask: Ask) -> None:
    gateway.submit(ask)
    assert world.run_until(lambda: not world.waiting(), 10)
    world.run(1.0)


def listening(world: World) -> list[Granted]:
    """Every grant that is said from now on."""
    heard: list[Granted] = []

    def listen(source: str, to: str, message: object) -> bool:
        if isinstance(message, Letter) and isinstance(message.body, Granted):
            heard.append(message.body)
        return False

    world.wires.drop = listen
    return heard


def test_the_second_prompt_brings_only_what_is_missing() -> None:
    world, gateway, [prefill], [decode] = fleet(pages=40)
    heard = listening(world)
    ended(world, gateway, Ask([*TEXT, 1, 2], Sampling(seed=1), 4))
    ended(world, gateway, Ask([*TEXT, 3], Sampling(seed=2), 4))
    first, second = heard
    assert -1 not in first.pages and len(first.pages) == 6
    assert second.pages[:5] == [-1] * 5 and second.pages[5] >= 0
    assert prefill.core.handoffs.spared_pages == 5 and decode.scheduler.snapshot().reused == 20
    world.settle()


def test_the_next_turn_brings_nothing_of_the_answer() -> None:
    world, gateway, _, _ = fleet(pages=40)
    heard = listening(world)
    first = Ask(TEXT[:10], Sampling(seed=1), 12)
    ended(world, gateway, first)
    said = gateway.clients[f"{gateway.name}-0"].seen
    ended(world, gateway, Ask([*first.prompt, *said, 5, 6], Sampling(seed=1), 4))
    assert [page >= 0 for page in heard[-1].pages] == [False] * 5 + [True], "21 tokens were computed by the decode or sent before"
    world.settle()


def test_a_known_prompt_is_committed_although_no_page_moves() -> None:
    world, gateway, [prefill], _ = fleet(pages=40)
    for seed in (1, 2):
        ended(world, gateway, Ask(TEXT, Sampling(seed=seed), 4))
    assert prefill.core.handoffs.spared_pages == 5
    world.settle()


def test_pages_that_never_verified_are_not_found() -> None:
    """The simulation looks at every findable page after every step."""
    world, gateway, [prefill], [decode] = fleet(pages=40)
    world.weather.corrupt = 1.0
    gateway.submit(Ask(TEXT, Sampling(seed=1), 4))
    assert world.run_until(lambda: decode.core.inbound.rejections > 1, 10)
    assert not decode.pool._hash_of and prefill.core.handoffs.spared_pages == 0
    world.weather.corrupt = 0.0
    world.settle()


def test_a_rejected_grant_keeps_nothing_and_what_it_shared_is_shared_again() -> None:
    world, gateway, _, [decode] = fleet(pages=40)
    ended(world, gateway, Ask([*TEXT, 1], Sampling(seed=1), 4))
    heard = listening(world)
    world.weather.corrupt = 1.0
    gateway.submit(Ask([*TEXT, 2], Sampling(seed=2), 4))
    assert world.run_until(lambda: decode.core.inbound.rejections == 1, 10)
    world.weather.corrupt = 0.0
    assert world.run_until(lambda: not world.waiting(), 10)
    assert len(heard) >= 2 and {tuple(one.pages[:5]) for one in heard} == {(-1,) * 5}
    world.settle()


def test_a_prefill_that_dies_in_the_middle_leaves_what_was_shared_to_others() -> None:
    world, gateway, [prefill], [decode] = fleet(pages=40)
    ended(world, gateway, Ask([*TEXT, 1], Sampling(seed=1), 4))
    world.weather.push_stall = 1.0
    gateway.submit(Ask([*TEXT, *TEXT[:9]], Sampling(seed=2), 4))
    assert world.run_until(lambda: decode.pool.counts.in_transit > 0, 5)
    assert decode.pool.counts.held == 5, "referenced until commit or lapse"
    world.kill(prefill)
    world.settle()
    assert decode.pool.counts.cached > 5


def test_the_turns_of_a_conversation_go_where_the_first_one_went() -> None:
    for seed in range(6):
        world = World(seed)
        gateway, prefill = world.gateway(), world.prefill(60)
        for _ in range(3):
            world.decode(60)
        world.run(2)
        prompt = TEXT[:12]
        for _ in range(3):
            ended(world, gateway, Ask(prompt, Sampling(seed=1), 4))
            said = gateway.clients[f"{gateway.name}-{len(gateway.clients) - 1}"].seen
            prompt = [*prompt, *said, 7, 8]
        assert sum(decode.pool.counts.cached > 0 for decode in world.living(Decode)) == 1
        assert prefill.core.handoffs.spared_pages > 0
        world.settle()


def test_without_reuse_everything_is_sent() -> None:
    world = World(3, reuse=False)
    gateway, prefill, decode = world.gateway(), world.prefill(40), world.decode(40)
    world.run(2)
    heard = listening(world)
    for seed in (1, 2):
        ended(world, gateway, Ask(TEXT, Sampling(seed=seed), 4))
    assert [-1 in one.pages for one in heard] == [False, False]
    assert prefill.core.handoffs.spared_pages == decode.pool.counts.cached == 0
    world.settle()


def test_trouble_meets_shared_pages() -> None:
    """The long run is about them as well."""
    spared = 0
    for seed in (1, 2, 8, 11):
        world = troubled(seed)
        world.settle()
        spared += sum(prefill.core.handoffs.spared_pages for prefill in world.processes.values() if isinstance(prefill, Prefill))
    assert spared > 10


def test_rejected_names_the_page_by_its_place() -> None:
    world, gateway, _, [decode] = fleet(pages=40)
    ended(world, gateway, Ask([*TEXT, 1], Sampling(seed=1), 4))
    named: list[list[int]] = []

    def listen(source: str, to: str, message: object) -> bool:
        if isinstance(message, Letter) and isinstance(message.body, Rejected):
            named.append(message.body.pages)
        return False

    world.wires.drop = listen
    world.weather.corrupt = 1.0
    gateway.submit(Ask([*TEXT, 2], Sampling(seed=2), 4))
    assert world.run_until(lambda: len(named) > 0, 10)
    assert named[0] == [5] and decode.core.inbound.rejections >= 1
    world.settle()
