"""Which GPU of its host a worker computes on: a free one, by a lease in Redis, so that replicas need no numbering.

`docker compose up --scale decode=4` starts four equal containers that all see every GPU. Each takes one by `SET NX` with an expiry,
renews it with its beats and gives it back at its end; what a killed worker held is free a few seconds later. A Redis restarted empty
gets the lease again at the next beat; who finds somebody else's name there has been silent for too long, and ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from redis.asyncio import Redis

from common import names
from common.connection import mapped
from common.errors import BatonError, QueueError, SettingError, StartError
from common.logs import get_logger
from common.messages import Incarnation
from common.service import Service, end
from common.settings import WorkerSettings

log = get_logger(__name__)

LEASE_S = names.INTRODUCTION_TTL_S
WAIT_S = LEASE_S + 5.0
"""A worker waits this long for a GPU: what a killed predecessor held is free by then."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Equal in all containers of a host, and nowhere else."""

RENEW = """
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) return 1 end
if not holder then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) return 1 end
return 0
"""
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@dataclass(frozen=True)
class Gpu:
    """One card (or MIG instance) as the driver lists it."""

    index: int
    uuid: str
    used_bytes: int = 0


@dataclass(frozen=True)
class Choice:
    """What the settings ask for: nothing to do, a certain card whoever else uses it, or one of several by lease."""

    kind: Literal["none", "fixed", "lease"]
    gpus: tuple[Gpu, ...] = ()


class LeaseLost(BatonError):
    """Somebody else has this worker's GPU."""


def choose(wanted: str, gpus: Sequence[Gpu], visible: str | None) -> Choice:
    """Decide from the setting `gpu`, the cards of this host and CUDA_VISIBLE_DEVICES, which bounds the choice.

    Cards that nobody uses come first: after a Redis was emptied a lease may be missing for a moment, but the memory in use is not.
    Raises SettingError and StartError.
    """
    if wanted == "none":
        return Choice("none")
    allowed = _allowed(gpus, visible)
    if wanted == "auto":
        if not allowed:
            raise StartError(
                "device is cuda, but the driver shows no GPU" if not gpus else f"{VISIBLE} is {visible!r}: none of this host's GPUs"
            )
        return Choice("lease", tuple(sorted(allowed, key=lambda gpu: (gpu.used_bytes, gpu.index))))
    found = [gpu for gpu in gpus if wanted in (str(gpu.index), gpu.uuid)]
    if not found:
        there = ", ".join(str(gpu.index) for gpu in gpus) or "none"
        raise SettingError(f"gpu is {wanted!r}; it must be auto, none, or an index or UUID of this host's GPUs ({there})")
    return Choice("fixed", (found[0],))


def _allowed(gpus: Sequence[Gpu], visible: str | None) -> list[Gpu]:
    """CUDA's own reading: indices or (beginnings of) UUIDs, and nothing after the first that does not exist."""
    if visible is None:
        return list(gpus)
    chosen: list[Gpu] = []
    for word in (part.strip() for part in visible.split(",")):
        match = [gpu for gpu in gpus if word and (word == str(gpu.index) or gpu.uuid.startswith(word))]
        if not match:
            break
        chosen.append(match[0])
    return chosen


def host_id() -> str:
    """Names this host, whatever the container."""
    return BOOT_ID.read_text().strip()


def gpu_key(host: str, uuid: str) -> str:
    """Of no fleet: cards are shared by all fleets that use this Redis."""
    return f"baton:gpu:{host}:{uuid}"


class Lease:
    """One card held by one incarnation."""

    def __init__(self, redis: Redis, host: str, gpu: Gpu, holder: Incarnation, lease_s: float) -> None:
        self.gpu = gpu
        self._redis: Any = redis
        self._key = gpu_key(host, gpu.uuid)
        self._holder = holder
        self._ms = int(lease_s * 1000)

    async def take(self) -> bool:
        """Whether it was free. Raises QueueError."""
        return bool(await mapped(self._redis.set(self._key, self._holder, nx=True, px=self._ms)))

    async def renew(self) -> bool:
        """Whether it is still ours, or nobody's and now ours again. Raises QueueError."""
        return bool(await mapped(self._redis.eval(RENEW, 1, self._key, self._holder, self._ms)))

    async def release(self) -> None:
        """Raises QueueError; the lease then lapses by itself."""
        await mapped(self._redis.eval(RELEASE, 1, self._key, self._holder))


async def claim(
    redis: Redis, host: str, gpus: Sequence[Gpu], holder: Incarnation, *, lease_s: float = LEASE_S, wait_s: float = WAIT_S
) -> Lease:
    """The first free one of these cards. Asks again with every beat (an expiry is no event), for `wait_s`; then raises StartError."""
    give_up = time.monotonic() + wait_s
    said = False
    while True:
        for gpu in gpus:
            lease = Lease(redis, host, gpu, holder, lease_s)
            if await lease.take():
                return lease
        if time.monotonic() >= give_up:
            raise StartError(
                f"all {len(gpus)} GPUs of this host for this worker are taken: start fewer workers, or share one by setting gpu to an index"
            )
        if not said:
            log.info("every GPU is taken: waiting for one", gpus=len(gpus), wait_s=wait_s)
            said = True
        await asyncio.sleep(min(names.BEAT_S, max(0.0, give_up - time.monotonic())))


async def keep(lease: Lease, lost: Callable[[BaseException], None]) -> None:
    """Renew with every beat until cancelled, or until the card is somebody else's or cannot be kept: `lost` hears of it, once."""
    away = False
    while True:
        await asyncio.sleep(names.BEAT_S)
        try:
            ours = await lease.renew()
        except QueueError as error:
            if not away:
                log.warning("the lease of the GPU cannot be renewed", reason=error)
            away = True
            continue
        except Exception as error:
            lost(error)
            return
        away = False
        if not ours:
            lost(LeaseLost(f"GPU {lease.gpu.index} ({lease.gpu.uuid}) was given to another worker while this one was silent"))
            return


@contextlib.asynccontextmanager
async def leased(settings: WorkerSettings, redis: Redis, service: Service) -> AsyncIterator[None]:
    """Around all of a worker's life, from before CUDA is first touched: torch sees the cards that are this worker's, one for each rank."""
    if settings.device != "cuda":
        yield
        return
    choice = choose(settings.gpu, await asyncio.to_thread(list_gpus) if settings.gpu != "none" else [], os.environ.get(VISIBLE))
    ranks = settings.tp * settings.pp
    if choice.kind == "none":
        yield
    elif choice.kind == "fixed":
        if ranks > 1:
            raise SettingError(f"gpu is {settings.gpu!r}, one card, but the worker has {ranks} ranks; it must be auto or none")
        _show(choice.gpus)
        yield
    else:
        async with contextlib.AsyncExitStack() as held:
            _show([await held.enter_async_context(_held(redis, choice.gpus, service)) for _ in range(ranks)])
            yield


@contextlib.asynccontextmanager
async def _held(redis: Redis, gpus: Sequence[Gpu], service: Service) -> AsyncIterator[Gpu]:
    """One free card of these, kept until the end."""
    lease = await claim(redis, host_id(), gpus, service.incarnation)
    keeping = asyncio.create_task(keep(lease, service.fail), name="gpu lease")
    try:
        yield lease.gpu
    finally:
        if not keeping.done():
            await end(keeping)
        try:
            await lease.release()
        except QueueError as error:
            log.warning("the lease of the GPU was not given back: it lapses", reason=error)


def _show(gpus: Sequence[Gpu]) -> None:
    os.environ[VISIBLE] = ",".join(gpu.uuid for gpu in gpus)
    for gpu in gpus:
        log.info("computing on a GPU", index=gpu.index, uuid=gpu.uuid)


def list_gpus() -> list[Gpu]:
    """Cards that the driver shows to this container, MIG instances in the place of a card that is cut up. Raises StartError."""
    import pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise StartError(f"device is cuda, but there is no NVIDIA driver: {error}") from error
    try:
        found: list[Gpu] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            card = nvml.nvmlDeviceGetHandleByIndex(index)
            for device in _instances(nvml, card) or [card]:
                found.append(Gpu(index, str(nvml.nvmlDeviceGetUUID(device)), int(nvml.nvmlDeviceGetMemoryInfo(device).used)))
        return found
    except nvml.NVMLError as error:
        raise StartError(f"the NVIDIA driver does not list its GPUs: {error}") from error
    finally:
        nvml.nvmlShutdown()


def _instances(nvml: Any, card: Any) -> list[Any]:
    """The MIG instances of a card; none if it is whole."""
    try:
        if not nvml.nvmlDeviceGetMigMode(card)[0]:
            return []
        most = nvml.nvmlDeviceGetMaxMigDeviceCount(card)
    except nvml.NVMLError:  # a card without MIG
        return []
    found = []
    for number in range(most):
        with contextlib.suppress(nvml.NVMLError):  # a place that is empty
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, number))
    return found
