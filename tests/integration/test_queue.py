"""The job queue on a real server: claiming, removing, states, burial, and a server that restarts empty."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from msgspec.structs import replace
from redis import exceptions as redis_errors
from redis.asyncio import Redis

from common import names
from common.errors import QueueError, SettingError
from common.messages import Choice, Job, Sampling, decode, encode
from common.queue import KEPT_S, LONGEST_WAIT_S, Absent, Claimed, Entry, JobQueue, Pending, Queued, connect
from scripts.launcher.valkey import Valkey

FLEET, PRINT = "f", "p"


def job(name: str, gateway: str = "g") -> Job:
    return Job(name, gateway, "tcp://127.0.0.1:1", [1, 2, 3], [Choice(0, 1)], Sampling(), 16)


@pytest.fixture
def queue(redis: Redis) -> JobQueue:
    return JobQueue(redis, FLEET, PRINT)


@pytest.fixture
async def own(valkey: Valkey) -> AsyncIterator[JobQueue]:
    """A queue on the test's own server."""
    async with connect(valkey.url) as redis:
        yield JobQueue(redis, FLEET, PRINT)


async def restart_empty(valkey: Valkey) -> None:
    """And let the loop see that the connections are gone."""
    valkey.restart_empty()
    await asyncio.sleep(0.05)


def ids(claimed: list[Claimed]) -> list[str]:
    return [one.job.request_id for one in claimed]


async def claim_id(queue: JobQueue, consumer: str) -> str | None:
    claimed = await queue.claim(consumer)
    return None if claimed is None else claimed.job.request_id


# ------------------------------------------------------------------------------------------------------------- claiming


async def test_a_job_comes_out_as_it_went_in_and_once(queue: JobQueue) -> None:
    assert await queue.claim("a") is None
    entry = await queue.put(job("r1"), "interactive")
    claimed = await queue.claim("a")
    assert claimed is not None and claimed == Claimed(entry, job("r1"), claimed.waited_s) and claimed.waited_s < 1
    assert await queue.claim("a") is None and await queue.claim("b") is None


async def test_classes_are_claimed_in_their_order_whatever_the_order_of_putting(queue: JobQueue) -> None:
    for job_class in reversed(names.CLASSES):
        for number in range(2):
            await queue.put(job(f"{job_class}{number}"), job_class)
    claimed = [await claim_id(queue, "a") for _ in range(9)]
    ordered = ("resume", "priority", "interactive", "batch")
    assert claimed == [*(f"{job_class}{number}" for job_class in ordered for number in range(2)), None]


async def test_a_claimed_job_has_aged_in_the_queue(queue: JobQueue) -> None:
    await queue.put(replace(job("r1"), deadline_s=5.0, age_s=1.0), "interactive")
    await asyncio.sleep(0.3)
    claimed = await queue.claim("a")
    assert claimed is not None and 0.25 < claimed.waited_s < 2
    assert claimed.aged.deadline_s == 5.0 - claimed.waited_s and claimed.aged.age_s == 1.0 + claimed.waited_s


async def test_wait_takes_at_most_one_of_each_class(queue: JobQueue) -> None:
    for name in ("b1", "b2", "b3"):
        await queue.put(job(name), "batch")
    await queue.put(job("i1"), "interactive")
    assert sorted(ids(await queue.wait("a", 1.0))) == ["b1", "i1"]
    assert ids(await queue.wait("a", 1.0)) == ["b2"]
    assert await queue.depth() == 1


async def test_wait_wakes_up_for_a_new_job(queue: JobQueue, redis_url: str) -> None:
    async with connect(redis_url) as other:
        await queue.claim("a")
        started = time.monotonic()
        waiting = asyncio.create_task(queue.wait("a", 2.0))
        await asyncio.sleep(0.2)
        await JobQueue(other, FLEET, PRINT).put(job("r1"), "batch")
        assert ids(await waiting) == ["r1"]
        assert time.monotonic() - started < 1.8


async def test_wait_ends_in_time_and_never_outlasts_the_socket(queue: JobQueue) -> None:
    started = time.monotonic()
    assert await queue.wait("a", 0.2) == []
    assert 0.15 < time.monotonic() - started < 2.0
    started = time.monotonic()
    assert await queue.wait("a", 3600.0) == []
    assert time.monotonic() - started < LONGEST_WAIT_S + 1.0


async def test_two_consumers_share_and_never_double(queue: JobQueue) -> None:
    for number in range(20):
        await queue.put(job(str(number)), "interactive")
    taken = await asyncio.gather(*[claim_id(queue, consumer) for consumer in "ab" * 12])
    assert sorted(int(name) for name in taken if name is not None) == list(range(20))


async def test_a_duplicate_put_is_two_entries(queue: JobQueue) -> None:
    first, second = await queue.put(job("r1"), "batch"), await queue.put(job("r1"), "batch")
    assert first != second
    assert [await claim_id(queue, "a") for _ in range(3)] == ["r1", "r1", None]


async def test_fleets_and_models_do_not_mix(queue: JobQueue, redis: Redis) -> None:
    await queue.put(job("r1"), "batch")
    assert await JobQueue(redis, FLEET, "another").claim("a") is None
    assert await JobQueue(redis, "another", PRINT).claim("a") is None
    assert await claim_id(queue, "a") == "r1"


async def test_an_absurd_job_is_refused(queue: JobQueue, redis: Redis) -> None:
    huge = Job("r1", "g", "", [2**32 - 1] * 4_000_000, [Choice(0, 1)], Sampling(), 16)
    with pytest.raises(QueueError, match="limit"):
        await queue.put(huge, "batch")
    assert await redis.dbsize() == 0


# ------------------------------------------------------------------------------------------------- where an entry stands


async def test_an_entry_is_queued_then_pending_then_absent(queue: JobQueue) -> None:
    entry = await queue.put(job("r1"), "interactive")
    assert await queue.states([entry]) == {entry: Queued()}
    await queue.claim("a")
    await asyncio.sleep(0.05)
    state = (await queue.states([entry]))[entry]
    assert isinstance(state, Pending) and state.consumer == "a" and 0.04 < state.idle_s < 2.0
    await queue.remove(entry)
    await queue.remove(entry)
    assert await queue.states([entry]) == {entry: Absent()}
    assert await queue.claim("b") is None


async def test_an_entry_removed_before_it_is_claimed_is_never_delivered(queue: JobQueue) -> None:
    entry = await queue.put(job("r1"), "interactive")
    await queue.remove(entry)
    assert await queue.claim("a") is None
    assert await queue.states([entry]) == {entry: Absent()}


async def test_removal_leaves_nothing_behind(queue: JobQueue, redis: Redis) -> None:
    entries = [await queue.put(job(str(n)), job_class) for n, job_class in enumerate(names.CLASSES)]
    await queue.wait("a", 0.1)
    await queue.remove(*entries)
    for job_class in names.CLASSES:
        stream = names.stream(FLEET, PRINT, job_class)
        assert await redis.xlen(stream) == 0
        assert (await redis.xpending(stream, names.GROUP))["pending"] == 0
    await queue.remove()


async def test_hundreds_of_states_come_in_one_round_trip(queue: JobQueue, redis: Redis) -> None:
    entries = [await queue.put(job(str(number)), names.CLASSES[number % 3]) for number in range(300)]
    for _ in range(100):
        await queue.claim("a")
    await queue.remove(entries[299])
    states = await queue.states([*entries, Entry("batch", "1-1")])
    assert list(states) == [*entries, Entry("batch", "1-1")]
    resumed = [entry for entry in entries if entry.job_class == "resume"]
    assert all(isinstance(states[entry], Pending) for entry in resumed) and len(resumed) == 100
    assert states[entries[298]] == Queued() and states[entries[299]] == Absent() == states[Entry("batch", "1-1")]
    assert await queue.states([]) == {}


@pytest.mark.parametrize("how", ["acknowledged only", "consumer deleted"])
async def test_an_entry_that_will_never_be_delivered_again_is_absent(queue: JobQueue, redis: Redis, how: str) -> None:
    entry = await queue.put(job("r1"), "batch")
    await queue.claim("a")
    stream = names.stream(FLEET, PRINT, "batch")
    if how == "acknowledged only":
        await redis.xack(stream, names.GROUP, entry.id)
    else:
        await redis.xgroup_delconsumer(stream, names.GROUP, "a")
    assert await redis.xlen(stream) == 1 and await queue.claim("b") is None
    assert await queue.states([entry]) == {entry: Absent()}


async def test_depth_and_age_are_of_what_nobody_has_claimed(queue: JobQueue) -> None:
    assert (await queue.depth(), await queue.oldest_s()) == (0, 0.0)
    first = await queue.put(job("r1"), "batch")
    await asyncio.sleep(0.3)
    await queue.put(job("r2"), "interactive")
    assert await queue.depth() == 2
    assert 0.25 < await queue.oldest_s() < 3.0
    assert await claim_id(queue, "a") == "r2"
    assert await queue.depth() == 1
    await queue.put(job("r3"), "interactive")
    assert await claim_id(queue, "a") == "r3" and await claim_id(queue, "a") == "r1"
    assert (await queue.depth(), await queue.oldest_s()) == (0, 0.0)
    began = time.monotonic()
    await queue.put(job("r4"), "batch")
    assert await queue.depth() == 1 and await queue.oldest_s() < time.monotonic() - began + 0.05
    await queue.remove(first)
    assert await queue.depth() == 1


# -------------------------------------------------------------------------------------------------------------- sweeping


async def test_pending_entries_come_with_their_jobs_for_the_sweep(queue: JobQueue) -> None:
    dead = await queue.put(job("r1", gateway="dead"), "interactive")
    alive = await queue.put(job("r2", gateway="alive"), "batch")
    unclaimed = await queue.put(job("r3", gateway="dead"), "batch")
    await queue.claim("a")
    await queue.claim("b")
    found = {one.entry: one for one in await queue.pending()}
    assert set(found) == {dead, alive}
    assert (found[dead].job, found[dead].state.consumer) == (job("r1", gateway="dead"), "a")
    await queue.remove(*[one.entry for one in found.values() if one.job is not None and one.job.gateway == "dead"])
    assert [one.entry for one in await queue.pending()] == [alive]
    assert await queue.states([unclaimed]) == {unclaimed: Queued()}


async def test_a_pending_entry_whose_job_is_gone_has_none(queue: JobQueue, redis: Redis) -> None:
    entry = await queue.put(job("r1"), "batch")
    await queue.claim("a")
    await redis.xdel(names.stream(FLEET, PRINT, "batch"), entry.id)
    [one] = await queue.pending()
    assert (one.entry, one.job) == (entry, None)
    await queue.remove(entry)
    assert await queue.pending() == []


async def test_a_consumer_is_forgotten_only_with_nothing_pending(queue: JobQueue, redis: Redis) -> None:
    entry = await queue.put(job("r1"), "batch")
    await queue.claim("a")

    async def consumers() -> list[bytes]:
        return [row["name"] for row in await redis.xinfo_consumers(names.stream(FLEET, PRINT, "batch"), names.GROUP)]

    await queue.forget("a")
    assert await consumers() == [b"a"]
    assert isinstance((await queue.states([entry]))[entry], Pending)
    await queue.remove(entry)
    await queue.forget("a")
    await queue.forget("a")
    assert await consumers() == []


async def test_idle_consumers_are_forgotten_and_busy_ones_are_not(queue: JobQueue, redis: Redis) -> None:
    await queue.put(job("r1"), "batch")
    await queue.claim("busy")
    await queue.claim("idle")
    assert await queue.forget_idle(60.0) == 0
    assert await queue.forget_idle(0.0) == 1
    assert [row["name"] for row in await redis.xinfo_consumers(names.stream(FLEET, PRINT, "batch"), names.GROUP)] == [b"busy"]


# ---------------------------------------------------------------------------------------------------------- dead letters


async def test_a_buried_job_is_there_with_its_reason(queue: JobQueue, redis: Redis) -> None:
    await queue.bury(job("r1"), "two workers died with it")
    [(_, fields)] = await redis.xrange(names.dead_letters(FLEET))
    assert fields[b"job"] == encode(job("r1")) and fields[b"reason"] == b"two workers died with it"


async def test_dead_letters_are_bounded_and_go_in_time_like_the_streams_of_a_model_that_nobody_serves(
    queue: JobQueue, redis: Redis
) -> None:
    await queue.bury(replace(job("r1"), prompt=[100_000] * 60_000), "too long")
    [(_, fields)] = await redis.xrange(names.dead_letters(FLEET))
    assert len(fields[b"job"]) < 64 << 10 and decode(fields[b"job"], Job).request_id == "r1" and b"60000" in fields[b"reason"]
    await queue.put(job("r2"), "batch")
    await queue.keep()
    for key in (names.dead_letters(FLEET), names.stream(FLEET, PRINT, "batch")):
        assert 0 < await redis.ttl(key) <= KEPT_S


@pytest.mark.parametrize("fields", [{b"job": b"\xff\x00garbage"}, {b"other": b"1"}, {b"job": b""}])
async def test_an_entry_nobody_can_read_is_buried_and_the_next_one_is_claimed(
    queue: JobQueue, redis: Redis, fields: dict[bytes, bytes]
) -> None:
    stream = names.stream(FLEET, PRINT, "interactive")
    await redis.xadd(stream, fields)
    await queue.put(job("r1"), "batch")
    assert ids(await queue.wait("a", 0.5)) == ["r1"]
    [(_, dead)] = await redis.xrange(names.dead_letters(FLEET))
    assert dead[b"job"] == fields.get(b"job", b"") and b"not a Job" in dead[b"reason"]
    assert await redis.xlen(stream) == 0
    assert [one.entry.job_class for one in await queue.pending()] == ["batch"]


async def test_one_request_at_a_time_runs_alone(queue: JobQueue) -> None:
    assert await queue.lock_alone("r1") and await queue.lock_alone("r1")
    assert not await queue.lock_alone("r2")
    await queue.unlock_alone("r2")
    assert not await queue.lock_alone("r2")
    await queue.unlock_alone("r1")
    assert await queue.lock_alone("r2")


# ------------------------------------------------------------------------------------------------------ a server in trouble


async def test_after_a_restart_everything_works_and_the_lost_is_absent(own: JobQueue, valkey: Valkey) -> None:
    kept = [await own.put(job("r1"), "interactive"), await own.put(job("r2"), "batch")]
    await own.claim("a")
    await restart_empty(valkey)
    assert await own.states(kept) == dict.fromkeys(kept, Absent())
    assert await own.claim("a") is None
    await own.put(job("r3"), "batch")
    assert await claim_id(own, "a") == "r3"


@pytest.mark.parametrize("first", ["claim", "wait", "states", "remove", "pending", "depth", "oldest_s", "forget", "forget_idle", "put"])
async def test_whatever_comes_first_after_a_restart_makes_the_groups_anew(own: JobQueue, valkey: Valkey, first: str) -> None:
    entry = await own.put(job("r1"), "interactive")
    await own.claim("a")
    await restart_empty(valkey)
    match first:
        case "claim":
            assert await own.claim("a") is None
        case "wait":
            assert await own.wait("a", 0.1) == []
        case "states":
            assert await own.states([entry]) == {entry: Absent()}
        case "remove":
            await own.remove(entry)
        case "pending":
            assert await own.pending() == []
        case "depth":
            assert await own.depth() == 0
        case "oldest_s":
            assert await own.oldest_s() == 0.0
        case "forget":
            await own.forget("a")
        case "forget_idle":
            assert await own.forget_idle(0.0) == 0
    late = await own.put(job("r2"), "interactive")
    assert await own.states([late]) == {late: Queued()}
    assert await claim_id(own, "a") == "r2"


async def test_no_call_fails_for_a_connection_that_broke_unnoticed(own: JobQueue, valkey: Valkey) -> None:
    """Several pooled connections are stale, and the loop has not seen it: what may be repeated is, and drops them all."""
    entry = await own.put(job("r1"), "batch")
    await asyncio.gather(*[own.depth() for _ in range(10)])
    valkey.restart_empty()
    assert await own.states([entry]) == {entry: Absent()}
    await asyncio.gather(*[own.put(job(str(number)), "batch") for number in range(10)])
    assert await own.depth() == 10


async def test_a_server_that_is_away_is_a_queue_error_at_once(own: JobQueue, valkey: Valkey) -> None:
    entry = await own.put(job("r1"), "batch")
    valkey.kill()
    for call in (
        own.put(job("r2"), "batch"),
        own.claim("a"),
        own.wait("a", 1.0),
        own.states([entry]),
        own.remove(entry),
        own.pending(),
        own.depth(),
        own.oldest_s(),
        own.bury(job("r1"), "x"),
        own.forget("a"),
        own.lock_alone("r1"),
    ):
        with pytest.raises(QueueError):
            await asyncio.wait_for(call, 5)
    with pytest.raises(QueueError):
        await asyncio.wait_for(own.keep(), 5)
    valkey.start()
    await own.put(job("r3"), "batch")
    assert await claim_id(own, "a") == "r3"


async def test_connections_that_cannot_be_closed_either_are_a_queue_error(
    own: JobQueue, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TLS and a host that swallows everything, closing an idle connection times out: that ended the process."""
    await own.depth()
    pool = own._redis.connection_pool

    async def stuck(inuse_connections: bool = True) -> None:
        raise redis_errors.TimeoutError("Timed out closing connection after 2")

    monkeypatch.setattr(pool, "disconnect", stuck)
    valkey.kill()
    for call in (own.depth(), own.put(job("r"), "batch")):
        with pytest.raises(QueueError):
            await asyncio.wait_for(call, 5)


async def test_a_server_killed_during_a_blocking_read_is_a_queue_error(own: JobQueue, valkey: Valkey) -> None:
    await own.claim("a")
    waiting = asyncio.create_task(own.wait("a", 2.0))
    await asyncio.sleep(0.2)
    valkey.kill()
    with pytest.raises(QueueError):
        await asyncio.wait_for(waiting, 5)


async def test_a_put_whose_answer_is_lost_is_not_repeated(redis_url: str) -> None:
    """A relay passes the XADD on and hangs up before the answer: exactly one entry is there."""
    port = int(redis_url.rsplit(":", 1)[1].split("/")[0])
    cut = False

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while data := await reader.read(65536):
                up_writer.write(data)
                answer = await up_reader.read(65536)
                if cut and b"XADD" in data:
                    break
                writer.write(answer)
        finally:
            up_writer.close()
            writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    relayed = redis_url.replace(f":{port}/", f":{server.sockets[0].getsockname()[1]}/")
    async with server, connect(redis_url) as direct, connect(relayed) as redis:
        queue = JobQueue(redis, FLEET, PRINT)
        await queue.put(job("r1"), "batch")
        cut = True
        with pytest.raises(QueueError):
            await queue.put(job("r2"), "batch")
        cut = False
        assert await direct.xlen(names.stream(FLEET, PRINT, "batch")) == 2


async def test_errors_do_not_tell_the_password(valkey: Valkey) -> None:
    secret = valkey.url.split(":")[2].split("@")[0]
    async with connect(valkey.url.replace(secret, "wrong" + secret)) as redis:
        with pytest.raises(QueueError) as caught:
            await JobQueue(redis, FLEET, PRINT).depth()
    assert secret not in str(caught.value)
    for url in (f"http://:{secret}@h:1/0", f"redis://:{secret}/@h:1/0", f"redis://:a/{secret}@h"):
        with pytest.raises(SettingError, match="redis_url") as bad:
            connect(url)
        assert secret not in str(bad.value)
