"""How a decode that runs meets a prefill that it does not know."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from common.control import ControlClient
from common.fleet import Fleet
from common.messages import Identity, Introduction, Letter, Mismatch, PeerBeat, WorkerBeat
from common.names import BEAT_S
from common.queue import connect
from common.seal import read_seal
from common.settings import WorkerSettings
from scripts.launcher.cluster import Cluster
from tests.unit.recovery.test_found import offer

pytestmark = pytest.mark.system

PATIENCE_S = 5.0
TRIES = 5


@dataclass
class Prefill:
    """One that speaks only when told to, and what it has heard."""

    decode: Introduction
    identity: Identity
    client: ControlClient = field(init=False)
    heard: list[Letter] = field(default_factory=list)
    waiting: asyncio.Event = field(default_factory=asyncio.Event)

    def connect(self, name: str, cluster: Cluster) -> None:
        self.client = ControlClient(name, self._letter, read_seal(str(cluster.secret)))
        self.client.connect(self.decode.incarnation, self.decode.control_address)

    def beat(self, fingerprint: str | None = None, *, checksums: bool = True) -> None:
        layout = self.decode.layout
        assert layout is not None
        own = fingerprint or self.identity.fingerprint
        words = PeerBeat(1, 0, WorkerSettings.fleet, own, layout, self.decode.shards, checksums=checksums)
        assert self.client.send(self.decode.incarnation, words)

    async def answer(self) -> Letter:
        """The next letter that comes."""
        self.waiting.clear()
        async with asyncio.timeout(PATIENCE_S):
            await self.waiting.wait()
        return self.heard[-1]

    def _letter(self, letter: Letter) -> None:
        self.heard.append(letter)
        self.waiting.set()


@pytest.fixture
async def prefills(pair: Cluster) -> AsyncIterator[list[Prefill]]:
    """All connected to the decode of `pair`, none of them known to it."""
    async with connect(pair.redis_url) as redis:
        fleet = Fleet(redis, WorkerSettings.fleet)
        identity = await fleet.identity()
        decode = next(one for one in (await fleet.peers()).values() if one.role == "decode")
    assert identity is not None
    made = [Prefill(decode, identity) for _ in range(1 + TRIES)]
    for one in made:
        one.connect(secrets.token_hex(8), pair)
    yield made
    for one in made:
        one.client.close()


async def test_the_first_beat_is_answered_at_once(prefills: list[Prefill]) -> None:
    """A prefill offers nothing to a decode that it has not heard: its first handoff would wait for the decode's next round of beats.

    Asked just after such a round, so that an answer that only the next one brings comes almost BEAT_S later.
    """
    known, *strangers = prefills
    known.beat()
    await known.answer()
    waited: list[float] = []
    for stranger in strangers:
        known.beat()
        await known.answer()
        asked = time.monotonic()
        stranger.beat()
        answer = await stranger.answer()
        waited.append(time.monotonic() - asked)
        assert isinstance(answer.body, WorkerBeat) and answer.body.role == "decode"
    assert sorted(waited)[TRIES // 2] < BEAT_S / 2, waited


async def test_one_of_another_model_is_refused_in_words_and_gets_nothing(prefills: list[Prefill]) -> None:
    stranger = prefills[0]
    stranger.beat("another model")
    answer = await stranger.answer()
    assert isinstance(answer.body, Mismatch) and "another model" in answer.body.reason
    stranger.client.send(stranger.decode.incarnation, offer(1))
    stranger.beat("another model")
    await stranger.answer()
    assert [type(letter.body) for letter in stranger.heard] == [Mismatch, Mismatch]


async def test_one_without_checksums_is_refused_by_one_with_them(prefills: list[Prefill]) -> None:
    """Each of its handoffs was rejected until the deadline, and nobody was told why."""
    prefills[0].beat(checksums=False)
    answer = await prefills[0].answer()
    assert isinstance(answer.body, Mismatch) and "checksums off" in answer.body.reason
