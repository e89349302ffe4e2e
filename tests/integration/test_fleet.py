"""The fleet on a real server: joining, being refused in words, introductions, and a server that is away or restarts empty."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from common import names
from common.errors import StartError
from common.fleet import Fleet
from common.messages import Identity, Introduction, encode
from common.queue import connect
from scripts.launcher.valkey import Valkey

IDENTITY = Identity("p" * 16, "smollm2", "t", 8192, 512, 16)
PREFILL = Introduction("prefill", "a", "tcp://127.0.0.1:1", "p" * 16)
DECODE = Introduction("decode", "b", "tcp://127.0.0.1:2", "p" * 16)


@pytest.fixture
def fleet(redis: Redis) -> Fleet:
    return Fleet(redis, "f")


class Keeper:
    """`keep` in a task, and what it reported."""

    def __init__(self, fleet: Fleet, own: Introduction, identity: Identity | None) -> None:
        self.reports: list[tuple[set[str], Identity | None]] = []
        self.task = asyncio.create_task(fleet.keep(own, identity, self._report))

    def _report(self, peers: dict[str, Introduction], identity: Identity | None) -> bool:
        self.reports.append((set(peers), identity))
        return True

    async def until(self, condition: Callable[[], object], timeout_s: float = 5.0) -> None:
        give_up = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < give_up and not self.task.done(), self.reports
            await asyncio.sleep(0.02)


@pytest.fixture
async def keep() -> AsyncIterator[Callable[..., Keeper]]:
    keepers: list[Keeper] = []

    def start(fleet: Fleet, own: Introduction, identity: Identity | None) -> Keeper:
        keepers.append(Keeper(fleet, own, identity))
        return keepers[-1]

    yield start
    for keeper in keepers:
        keeper.task.cancel()
    for keeper in keepers:
        with pytest.raises(asyncio.CancelledError):
            await keeper.task


# --------------------------------------------------------------------------------------------------------------- joining


async def test_the_first_worker_fixes_what_the_fleet_is(fleet: Fleet) -> None:
    assert await fleet.identity() is None
    assert await fleet.join(IDENTITY) == IDENTITY
    larger = replace(IDENTITY, max_request_pages=600)
    assert await fleet.join(larger) == IDENTITY == await fleet.identity()


async def test_of_many_first_workers_one_is_the_first(redis_url: str) -> None:
    async def join(pages: int) -> Identity:
        async with connect(redis_url) as redis:
            return await Fleet(redis, "f").join(replace(IDENTITY, max_request_pages=pages))

    found = await asyncio.gather(*[join(512) for _ in range(8)])
    assert set(found) == {IDENTITY}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "q" * 16, "model": "another"}, ["another", "smollm2"]),
        ({"protocol": 99}, ["protocol 99"]),
        ({"tokenizer": "u"}, ["tokenizer"]),
        ({"page_tokens": 32}, ["32", "16", "pages"]),
        ({"max_request_pages": 511}, ["511", "512", "pages"]),
    ],
)
async def test_a_worker_that_does_not_fit_is_refused_in_words(fleet: Fleet, change: dict[str, object], words: list[str]) -> None:
    await fleet.join(IDENTITY)
    with pytest.raises(StartError, match="cannot join fleet 'f'") as caught:
        await fleet.join(replace(IDENTITY, **change))
    assert all(word in str(caught.value) for word in words)
    assert await fleet.identity() == IDENTITY


async def test_fleets_do_not_meet(redis: Redis) -> None:
    ours, theirs = Fleet(redis, "f"), Fleet(redis, "f*")
    await ours.join(IDENTITY)
    await theirs.join(replace(IDENTITY, fingerprint="q"))
    await ours.introduce(PREFILL)
    await theirs.introduce(DECODE)
    assert set(await ours.peers()) == {"a"} and set(await theirs.peers()) == {"b"}


async def test_an_identity_that_cannot_be_read_is_a_start_error(fleet: Fleet, redis: Redis) -> None:
    await redis.set(names.identity("f"), b"\x00garbage")
    with pytest.raises(StartError, match="another version"):
        await fleet.join(IDENTITY)


async def test_an_identity_lapses_with_its_last_keeper(fleet: Fleet, redis: Redis) -> None:
    await fleet.join(IDENTITY)
    assert 0 < await redis.ttl(names.identity("f")) <= names.INTRODUCTION_TTL_S


# --------------------------------------------------------------------------------------------------------- introductions


async def test_members_meet_and_part(fleet: Fleet, redis: Redis) -> None:
    assert await fleet.peers() == {}
    await fleet.introduce(PREFILL)
    await fleet.introduce(DECODE)
    assert await fleet.peers() == {"a": PREFILL, "b": DECODE}
    await fleet.leave("a")
    await fleet.leave("a")
    assert await fleet.peers() == {"b": DECODE}
    assert 0 < await redis.ttl(names.introduction("f", "b")) <= names.INTRODUCTION_TTL_S


async def test_a_lapsed_introduction_leaves_no_trace(fleet: Fleet, redis: Redis) -> None:
    await fleet.introduce(PREFILL)
    await fleet.introduce(DECODE)
    await redis.delete(names.introduction("f", "a"))
    assert await fleet.peers() == {"b": DECODE}
    assert await redis.smembers(names.members("f")) == {b"b"}
    await fleet.introduce(PREFILL)
    assert set(await fleet.peers()) == {"a", "b"}


async def test_an_unreadable_introduction_hides_nobody_else(fleet: Fleet, redis: Redis) -> None:
    await fleet.introduce(PREFILL)
    await redis.set(names.introduction("f", "x"), b"garbage")
    await redis.set(names.introduction("f", "y"), encode(IDENTITY))
    await redis.sadd(names.members("f"), "x", "y")
    assert await fleet.peers() == {"a": PREFILL}


async def test_keep_reports_changes_and_only_changes(fleet: Fleet, keep: Callable[..., Keeper]) -> None:
    gateway = keep(fleet, Introduction("gateway", "g", "", ""), None)
    await gateway.until(lambda: gateway.reports == [({"g"}, None)])
    worker = keep(fleet, PREFILL, IDENTITY)
    await gateway.until(lambda: gateway.reports[-1] == ({"g", "a"}, IDENTITY))
    await worker.until(lambda: worker.reports[-1] == ({"g", "a"}, IDENTITY))
    seen = len(gateway.reports)
    await asyncio.sleep(3 * names.BEAT_S)
    assert len(gateway.reports) == seen
    await fleet.introduce(DECODE)
    await gateway.until(lambda: gateway.reports[-1][0] == {"g", "a", "b"})


async def test_keep_keeps_the_keys_alive(fleet: Fleet, redis: Redis, keep: Callable[..., Keeper]) -> None:
    worker = keep(fleet, PREFILL, IDENTITY)
    await worker.until(lambda: worker.reports)
    keys = (names.identity("f"), names.introduction("f", "a"), names.members("f"))
    for key in keys:
        await redis.expire(key, 5)
    give_up = time.monotonic() + 5
    while min([await redis.ttl(key) for key in keys]) <= 5:
        assert time.monotonic() < give_up, "they only expire"
        await asyncio.sleep(0.1)


async def test_two_identities_do_not_overwrite_each_other(fleet: Fleet, redis: Redis, keep: Callable[..., Keeper]) -> None:
    first = keep(fleet, PREFILL, IDENTITY)
    await first.until(lambda: first.reports)
    second = keep(fleet, DECODE, replace(IDENTITY, fingerprint="q"))
    await second.until(lambda: second.reports)
    for _ in range(20):
        assert await fleet.identity() == IDENTITY
        await asyncio.sleep(0.05)


async def test_what_keep_reports_to_may_end_the_process(fleet: Fleet) -> None:
    def on_peers(peers: object, identity: object) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(fleet.keep(PREFILL, IDENTITY, on_peers), 5)


# ----------------------------------------------------------------------------------------------------- a server in trouble


async def test_a_fleet_survives_a_server_that_is_away_and_comes_back_empty(valkey: Valkey, keep: Callable[..., Keeper]) -> None:
    async with connect(valkey.url) as redis, connect(valkey.url) as other:
        gateway = keep(Fleet(redis, "f"), Introduction("gateway", "g", "", ""), None)
        worker = keep(Fleet(other, "f"), PREFILL, IDENTITY)
        everybody = ({"g", "a"}, IDENTITY)
        await gateway.until(lambda: gateway.reports and gateway.reports[-1] == everybody)
        valkey.kill()
        await asyncio.sleep(3 * names.BEAT_S)
        assert not gateway.task.done() and not worker.task.done()
        assert gateway.reports[-1] == everybody
        valkey.start()
        fleet = Fleet(connect(valkey.url), "f")
        give_up = time.monotonic() + 5
        try:
            while set(await fleet.peers()) != {"g", "a"} or await fleet.identity() != IDENTITY:
                assert time.monotonic() < give_up
                await asyncio.sleep(0.05)
        finally:
            await fleet._redis.aclose()
        await gateway.until(lambda: gateway.reports[-1] == everybody)


async def test_who_starts_while_the_server_is_away_waits_for_it(valkey: Valkey) -> None:
    """A worker with its weights loaded ended because Redis was just being restarted."""
    valkey.kill()
    async with connect(valkey.url) as redis:
        fleet = Fleet(redis, "f")
        starting = [asyncio.create_task(fleet.reach()), asyncio.create_task(fleet.join(IDENTITY))]
        await asyncio.sleep(2 * names.BEAT_S)
        assert not any(task.done() for task in starting)
        valkey.start()
        assert await asyncio.wait_for(asyncio.gather(*starting), names.PATIENCE_S) == [None, IDENTITY]


async def test_nobody_waits_for_ever_for_a_server_nor_at_all_with_a_wrong_password(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = valkey.url.replace("@", "x@")
    async with connect(wrong) as redis:
        began = time.monotonic()
        with pytest.raises(StartError, match=r"redis_url.*Authentication"):
            await Fleet(redis, "f").reach()
        assert time.monotonic() - began < names.PATIENCE_S / 2
    monkeypatch.setattr("common.names.PATIENCE_S", 2 * names.BEAT_S)
    valkey.kill()
    async with connect(valkey.url) as redis:
        for attempt in (Fleet(redis, "f").reach(), Fleet(redis, "f").join(IDENTITY)):
            with pytest.raises(StartError, match=r"redis_url.*Error 111"):
                await attempt
