"""GPUs by lease, in a real Valkey: several processes racing, deaths, an emptied Redis. The cards themselves are made up."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from redis.asyncio import Redis

from common.errors import StartError
from scripts.launcher.valkey import Valkey
from services.worker.lease import Gpu, Lease, LeaseLost, claim, gpu_key, keep

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
GPUS = [Gpu(index, f"GPU-{index}") for index in range(3)]
HOST = "host"
WORKER = """
import asyncio, sys
from common.connection import connect
from services.worker.lease import Gpu, claim, keep

async def main(url, name):
    gpus = [Gpu(index, f"GPU-{index}") for index in range(3)]
    async with connect(url) as redis:
        print("up", flush=True)
        sys.stdin.readline()
        lease = await claim(redis, "host", gpus, name, lease_s=4, wait_s=30)
        print(lease.gpu.index, flush=True)
        await keep(lease, lambda error: print("lost", flush=True))

asyncio.run(main(*sys.argv[1:]))
"""


class Racer:
    """A process that claims when told to and keeps what it got."""

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, url, name], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.line() == "up"

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


async def test_racing_processes_get_a_card_each_and_a_killed_ones_goes_to_who_waits(redis: Redis, redis_url: str) -> None:
    racers = [Racer(redis_url, f"worker-{number}") for number in range(4)]
    try:
        for racer in racers:
            racer.go()
        lines = {asyncio.create_task(asyncio.to_thread(racer.line)): racer for racer in racers}
        done: set[asyncio.Task[str]] = set()
        while len(done) < 3:
            done |= (await asyncio.wait(set(lines) - done, return_when=asyncio.FIRST_COMPLETED, timeout=10))[0]
        assert sorted(task.result() for task in done) == ["0", "1", "2"]
        (left,) = set(lines) - done
        await asyncio.sleep(5)  # longer than a lease: renewing keeps the others'
        assert not left.done()
        victim = next(iter(done))
        lines[victim].process.send_signal(signal.SIGKILL)
        assert await asyncio.wait_for(left, 15) == victim.result()
        assert await redis.get(gpu_key(HOST, f"GPU-{left.result()}")) == lines[left].name.encode()
    finally:
        for racer in racers:
            racer.end()


async def test_no_free_card_is_said_after_the_wait(redis: Redis) -> None:
    for number in range(3):
        await claim(redis, HOST, GPUS, f"holder-{number}", wait_s=0)
    began = time.monotonic()
    with pytest.raises(StartError, match="all 3 GPUs of this host"):
        await claim(redis, HOST, GPUS, "late", wait_s=0.3)
    assert 0.3 <= time.monotonic() - began < 3


async def test_what_is_given_back_is_free_and_only_its_holder_gives_back(redis: Redis) -> None:
    own = await claim(redis, HOST, GPUS[:1], "own")
    await Lease(redis, HOST, GPUS[0], "stranger", 10).release()
    assert await redis.get(gpu_key(HOST, "GPU-0")) == b"own"
    await own.release()
    assert (await claim(redis, HOST, GPUS[:1], "next", wait_s=0)).gpu == GPUS[0]


async def test_who_lost_its_card_hears_of_it(redis: Redis) -> None:
    lease = await claim(redis, HOST, GPUS[:1], "sleeper")
    await redis.set(gpu_key(HOST, "GPU-0"), b"newcomer")
    heard: list[BaseException] = []
    await asyncio.wait_for(keep(lease, heard.append), 5)
    assert isinstance(heard[0], LeaseLost)
    await lease.release()
    assert await redis.get(gpu_key(HOST, "GPU-0")) == b"newcomer"


async def test_a_redis_restarted_empty_gets_the_lease_again(valkey: Valkey) -> None:
    from common.connection import connect

    async with connect(valkey.url) as redis:
        lease = await claim(redis, HOST, GPUS[:1], "steady")
        heard: list[BaseException] = []
        keeping = asyncio.create_task(keep(lease, heard.append))
        valkey.restart_empty()
        give_up = time.monotonic() + 10
        while time.monotonic() < give_up:
            async with connect(valkey.url) as other:
                if await other.get(gpu_key(HOST, "GPU-0")) == b"steady":
                    break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError("the lease is not renewed")
        assert not heard
        keeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await keeping
