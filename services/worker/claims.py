"""Claiming jobs only as fast as they can be started: late binding through the queue is the load balancer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from common.errors import QueueError
from common.logs import get_logger
from common.messages import Incarnation
from common.names import BEAT_S
from common.queue import Claimed, Delivered, JobQueue

log = get_logger(__name__)

BLOCK_S = 1.0
"""A blocking read, and a wait for room, end after this long at the latest, so that a change of mind is noticed."""
SWEEP_S = 10.0
"""Between two looks for entries whose gateway is dead."""
ORPHAN_S = 30.0
"""An entry delivered this long ago whose gateway nobody has heard of belongs to no one."""
FORGOTTEN_S = 3600.0
"""A consumer that has neither claimed nor holds anything for this long is a name of the past."""


def orphaned(delivered: Delivered, living: set[Incarnation]) -> bool:
    """Whether nobody answers for this entry any more."""
    job, idle_s = delivered.job, delivered.state.idle_s
    if idle_s <= ORPHAN_S:
        return False
    return job is None or job.gateway not in living or idle_s > job.deadline_s


class Claims:
    """Claims while `room()` tokens are wanted; `wake` says that the answer may have changed."""

    def __init__(self, queue: JobQueue, consumer: Incarnation, room: Callable[[], int], take: Callable[[list[Claimed]], None]) -> None:
        self._queue = queue
        self._consumer = consumer
        self._room = room
        self._take = take
        self._awake = asyncio.Event()

    def wake(self) -> None:
        self._awake.set()

    async def run(self) -> None:
        """Claim until cancelled. A Redis that is away is asked again at the beat's pace; what runs goes on."""
        while True:
            self._awake.clear()
            if self._room() <= 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(BLOCK_S):
                        await self._awake.wait()
                continue
            try:
                claimed = await self._batch() or await self._queue.wait(self._consumer, BLOCK_S)
            except QueueError as error:
                log.warning("cannot claim jobs", error=error)
                await asyncio.sleep(BEAT_S)
                continue
            if claimed:
                self._take(claimed)

    async def _batch(self) -> list[Claimed]:
        """What is there now, up to the room there is; a single job may be larger."""
        batch: list[Claimed] = []
        wanted = self._room()
        while wanted > 0:
            try:
                claimed = await self._queue.claim(self._consumer)
            except asyncio.CancelledError:
                self._take(batch)  # a drain, which gives them back at once; without a word of us they would look like victims
                raise
            except QueueError:
                if not batch:
                    raise
                break
            if claimed is None:
                break
            batch.append(claimed)
            wanted -= len(claimed.job.prompt) + sum(choice.index for choice in claimed.job.choices[:1])
            if claimed.job.alone:
                break
        return batch

    async def sweep(self, living: Callable[[], set[Incarnation]]) -> None:
        """Rule 4: remove delivered entries whose gateway is dead; living gateways judge their own. One past its deadline is nobody's: a
        doubled or replayed job that its gateway does not know of."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                orphans = [one.entry for one in await self._queue.pending() if orphaned(one, living())]
                if orphans:
                    log.warning("entries of dead gateways removed", entries=len(orphans))
                    await self._queue.remove(*orphans)
                await self._queue.forget_idle(FORGOTTEN_S)
                await self._queue.keep()
            except QueueError as error:
                log.warning("cannot sweep the queue", error=error)
