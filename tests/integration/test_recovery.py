"""Workers die, stall and come back in the middle of requests: no answer changes, no token is lost or doubled.

BATON_TEST_KILLS=20 repeats each kill that often.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.launcher.cluster import Cluster
from services.worker import role
from tests.integration.talk import Heard, body, listen
from tests.references import references
from tests.systems import assert_conserved, figures

KILLS = int(os.environ.get("BATON_TEST_KILLS", "1"))
TOKENS = 64
WHERE = {"prefill_queue": "prefill", "prefill": "prefill", "transfer": "prefill", "decode_queue": "decode", "decode": "decode"}


@pytest.fixture(scope="module")
def short(smollm2: Path) -> list[dict[str, Any]]:
    """Short prompts with the text of their first TOKENS tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chosen = sorted(references(), key=lambda one: len(one["prompt"]))[2:10]
    return [{**one, "text": tokenizer.decode(one["output"][:TOKENS], skip_special_tokens=True)} for one in chosen]


@pytest.fixture(scope="module")
def both(launch: Callable[..., Cluster]) -> Cluster:
    return launch(prefill=2, decode=2)


@pytest.fixture
def four(both: Cluster) -> Cluster:
    """A replica of each role, all alive, none about to die."""
    revive(both, {})
    return both


def talk(cluster: Cluster, asked: list[dict[str, Any]], meanwhile: Callable[[list[Heard]], Awaitable[None]]) -> list[Heard]:
    """Ask everything at once, run `meanwhile` beside it, and return what was heard."""

    async def run() -> list[Heard]:
        heard = [Heard() for _ in asked]
        async with httpx.AsyncClient() as client, asyncio.TaskGroup() as tasks:
            for one, ear in zip(asked, heard, strict=True):
                tasks.create_task(listen(client, cluster.urls[0], body(one["prompt"], TOKENS), ear))
            tasks.create_task(meanwhile(heard))  # type: ignore[arg-type]
        return heard

    return asyncio.run(run())


def assert_undisturbed(asked: list[dict[str, Any]], heard: list[Heard]) -> None:
    for one, answer in zip(asked, heard, strict=True):
        assert answer.error is None
        assert answer.completion_tokens == TOKENS
        assert answer.text == one["text"]


async def nothing(heard: list[Heard]) -> None:
    """Let them talk."""


async def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    give_up = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up, "it does not come to pass"
        await asyncio.sleep(0.01)


def known_workers(cluster: Cluster) -> dict[str, int]:
    found: dict[str, int] = httpx.get(f"{cluster.urls[0]}/ready", timeout=5).json()["workers"]
    return found


def revive(cluster: Cluster, deaths: dict[str, str]) -> None:
    """Start dead workers again, and those that are to die (or were) with what they die of; wait until all have met."""
    for child in cluster.workers:
        if child.alive and child.name not in deaths and "die" not in child.flags:
            continue
        cluster.kill(child.name)
        child.flags.pop("die", None)
        child.flags.update({"die": deaths[child.name]} if child.name in deaths else {})
        cluster.restart(child.name, wait=False)
    met(cluster)


def met(cluster: Cluster) -> None:
    """Wait until the gateway and every prefill have met everybody."""
    cluster.wait_ready()
    give_up = time.monotonic() + 20
    decodes = len(cluster.of("decode"))
    while known_workers(cluster) != {"prefill": len(cluster.of("prefill")), "decode": decodes} or any(
        figures(cluster, prefill.name)["decodes"] != decodes for prefill in cluster.of("prefill")
    ):
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.mark.timeout(240 + 60 * KILLS)
@pytest.mark.parametrize("stage", list(WHERE))
def test_kill_9_in_each_stage(both: Cluster, short: list[dict[str, Any]], stage: str) -> None:
    """Six at once, so that the worker that dies catches some. A decode that dies between commit and `Committed` costs no new attempt:
    the prefill still holds the pages and offers them to the other decode."""
    name = f"{WHERE[stage]}-0"
    for _ in range(KILLS):
        revive(both, {name: f"{stage}:{20 if stage == 'decode' else 1}"})
        child = both.children[name]
        heard = talk(both, short[:6], nothing)
        assert not child.alive, "the worker did not come to that stage"
        assert_undisturbed(short[:6], heard)
        again = [one for one in heard if one.timeline["attempts"] > 1]
        assert again or stage == "decode_queue", "nobody was caught by the death"
        assert_conserved(both)


@pytest.mark.timeout(240)
def test_dead_decode_is_noticed_within_three_seconds(four: Cluster, short: list[dict[str, Any]]) -> None:
    """A gateway that was itself stopped for a second takes nobody for dead meanwhile, so one of three deaths has to do."""
    noticed: list[float] = []
    while len(noticed) < 3 and (not noticed or min(noticed) > 3.0):
        revive(four, {})
        killed: list[float] = []
        heard = talk(four, short[:4], kill_and_wait(four, recoveries(four), killed))
        assert_undisturbed(short[:4], heard)
        noticed.append(killed[1] - killed[0])
    assert min(noticed) <= 3.0, noticed
    assert_conserved(four)


def busier_decode(cluster: Cluster) -> str:
    return max((child.name for child in cluster.of("decode")), key=lambda name: figures(cluster, name)["running"])


def recoveries(cluster: Cluster) -> float:
    text = httpx.get(f"{cluster.urls[0]}/metrics", timeout=5).text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith("baton_recoveries ")))


def kill_and_wait(cluster: Cluster, before: float, moments: list[float]) -> Callable[[list[Heard]], Awaitable[None]]:
    """Kill once everybody is being answered; note the moments of the death and of the first new attempt."""

    async def run(heard: list[Heard]) -> None:
        await until(lambda: all(len(one.at) > 5 for one in heard))
        cluster.kill(busier_decode(cluster))
        moments.append(time.monotonic())
        await until(lambda: recoveries(cluster) > before, 10)
        moments.append(time.monotonic())

    return run


@pytest.mark.timeout(180)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_without_a_replica_it_resumes_when_one_starts(pair: Cluster, short: list[dict[str, Any]], role: str) -> None:
    name = f"{role}-0"

    async def kill(heard: list[Heard]) -> None:
        await until(lambda: any(one.at for one in heard))
        pair.kill(name)
        try:
            await asyncio.sleep(4.0)
        finally:
            pair.restart(name, wait=False)

    heard = talk(pair, short[:4], kill)
    assert_undisturbed(short[:4], heard)
    met(pair)
    assert_conserved(pair)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_worker_stopped_for_ten_seconds_does_no_harm(four: Cluster, short: list[dict[str, Any]], name: str) -> None:
    """Its requests go on elsewhere; when it continues, what it still says and sends is refused."""

    async def stall(heard: list[Heard]) -> None:
        await until(lambda: sum(bool(one.at) for one in heard) >= 2)
        four.kill(name, signal.SIGSTOP)
        await asyncio.sleep(10.0)
        four.kill(name, signal.SIGCONT)

    heard = talk(four, short, stall)
    assert_undisturbed(short, heard)
    time.sleep(3.0)
    assert_conserved(four)


@pytest.mark.timeout(120)
def test_redis_restarted_empty_in_mid_stream(pair: Cluster, short: list[dict[str, Any]]) -> None:
    assert pair.valkey is not None
    valkey = pair.valkey

    async def restart(heard: list[Heard]) -> None:
        await until(lambda: all(len(one.at) > 5 for one in heard))
        valkey.kill()
        valkey.forget()
        try:
            had = [len(one.at) for one in heard]
            await until(lambda: all(one.finish or len(one.at) > before + 2 for one, before in zip(heard, had, strict=True)))
        finally:
            valkey.start()

    heard = talk(pair, short[:4], restart)
    assert_undisturbed(short[:4], heard)
    assert all(one.timeline["attempts"] == 1 for one in heard)

    assert_undisturbed(short[:2], talk(pair, short[:2], nothing))
    assert_conserved(pair)


@pytest.mark.timeout(120)
def test_while_redis_is_away_new_requests_are_told_to_come_back_and_running_ones_go_on(pair: Cluster, short: list[dict[str, Any]]) -> None:
    assert pair.valkey is not None
    valkey = pair.valkey
    refused: list[httpx.Response] = []

    async def away(heard: list[Heard]) -> None:
        await until(lambda: all(len(one.at) > 5 for one in heard))
        valkey.kill()
        try:
            async with httpx.AsyncClient(timeout=5) as client:
                for _ in range(2):
                    refused.append(await client.post(f"{pair.urls[0]}/v1/completions", json=body(short[0]["prompt"], 2)))
                    await asyncio.sleep(0.7)
        finally:
            valkey.start()

    heard = talk(pair, short[:4], away)
    assert_undisturbed(short[:4], heard)
    assert all(one.timeline["attempts"] == 1 for one in heard)
    assert [(reply.status_code, reply.headers.get("retry-after")) for reply in refused] == [(503, "2"), (503, "2")]
    give_up = time.monotonic() + 10
    while httpx.post(f"{pair.urls[0]}/v1/completions", json=body(short[0]["prompt"], 2), timeout=30).status_code != 200:
        assert time.monotonic() < give_up, "it does not come back with Redis"
        time.sleep(0.2)
    assert_conserved(pair)


@pytest.mark.timeout(120)
def test_a_client_that_leaves_frees_its_pages_at_once(pair: Cluster, short: list[dict[str, Any]]) -> None:
    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            asked = body(short[0]["prompt"], 1500)
            async with client.stream("POST", f"{pair.urls[0]}/v1/completions", json=asked, timeout=60) as reply:
                lines = reply.aiter_lines()
                for _ in range(20):
                    await anext(lines)

    asyncio.run(leave())
    asyncio.run(until(lambda: figures(pair, "decode-0")["pages_held"] == 0, 10))  # by itself it would go on for a minute
    assert_conserved(pair)


@pytest.mark.timeout(120)
def test_sigterm_hands_everything_back(four: Cluster, short: list[dict[str, Any]]) -> None:
    """A drained decode ends by itself, and its answers go on elsewhere, uncounted."""

    drained: list[str] = []

    async def drain(heard: list[Heard]) -> None:
        await until(lambda: all(len(one.at) > 3 for one in heard))
        drained.append(busier_decode(four))
        four.kill(drained[0], signal.SIGTERM)

    heard = talk(four, short[:4], drain)
    assert_undisturbed(short[:4], heard)
    process = four.children[drained[0]].process
    assert process is not None and process.wait(20) == 0


@pytest.mark.timeout(300)
def test_roles_change_under_load(four: Cluster, short: list[dict[str, Any]]) -> None:
    """A prefill becomes a decode and the first decode a prefill, without a restart, and everything back again."""
    asked = [*short, *short]

    async def change(heard: list[Heard]) -> None:
        await until(lambda: all(len(one.at) > 3 for one in heard[:2]))
        for name, to in (("prefill-1", "decode"), ("decode-0", "prefill"), ("prefill-1", "prefill"), ("decode-0", "decode")):
            facts = four.children[name].facts
            assert facts is not None
            assert await asyncio.to_thread(role.main, [facts["incarnation"][:8], to], {"BATON_REDIS_URL": four.redis_url}) == 0

    heard = talk(four, asked, change)
    assert_undisturbed(asked, heard)
    asyncio.run(until(lambda: known_workers(four) == {"prefill": 2, "decode": 2}))  # the last to join has yet to be heard
    assert_undisturbed(asked, talk(four, asked, nothing))
    assert_conserved(four)


@pytest.mark.timeout(120)
def test_corrupted_pages_are_never_shown(launch: Callable[..., Cluster], short: list[dict[str, Any]]) -> None:
    """A prefill that corrupts every tenth page: each is noticed, and the text is still right."""
    cluster = launch(role_flags={"prefill": {"fault": "corrupt:10"}})

    heard = talk(cluster, short[:4], nothing)
    assert_undisturbed(short[:4], heard)
    assert_conserved(cluster)
    log = cluster.children["prefill-0"].log.read_text()
    assert "Traceback" not in log, log
    cluster.stop()
