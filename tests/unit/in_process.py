"""A worker in the test's own process, over a pool of nothing: what it does about its engine, its gateways and its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.messages import Identity, Layout
from common.queue import connect
from common.service import Service
from common.settings import WorkerSettings
from services.colocated.worker import ColocatedWorker
from services.engine.grid import Grid
from services.engine.pages import PagePool
from services.engine.plan import Draw, Plan, StepOutput
from services.engine.policies import Limits
from services.engine.scheduler import Scheduler
from services.worker.ranks import Ranks
from services.worker.room import Memory, Room

LAYOUT = Layout(1, 1, 4, 1, "float32")
IDENTITY = Identity("f", "model", "t", 100, 25, 4)


class Idle:
    """A runner that draws 9s."""

    depth = 1

    def launch(self, plan: Plan) -> Plan:
        return plan

    def collect(self, ticket: Plan) -> StepOutput:
        return StepOutput(tuple(Draw(9) if chunk.draws else None for chunk in ticket.chunks))


def room(settings: WorkerSettings, runner: Idle) -> Room:
    limits = Limits(64, 64)
    return Room(
        layout=LAYOUT,
        shards=Grid().shards(LAYOUT),
        ranks=Ranks(settings, Grid(), Path("model"), [[0]], "worker"),
        pool=None,  # type: ignore[arg-type]
        runner=runner,  # type: ignore[arg-type]
        scheduler=Scheduler(PagePool(64, 4), "chunked", limits),
        limits=limits,
        budget_tokens=64,
        longest_step_s=1.0,
        identity=IDENTITY,
        memory=Memory(0, 0, 0, 0, None),
        prefill_rate=1.0,
    )


def serve(
    begun: Callable[[Any], None],
    *,
    runner: Idle | None = None,
    kind: type[ColocatedWorker] = ColocatedWorker,
    stop: Callable[[Service], None] = Service.stop,
    after_s: float = 0.3,
) -> tuple[Any, Service]:
    """Let a worker serve; `begun` is told at its beginning, `stop` after a while. Redis is away. Returns it as it has ended."""

    async def run() -> tuple[Any, Service]:
        settings = WorkerSettings(host="127.0.0.1", drain_s=0.2, redis_url="redis://127.0.0.1:1/0")
        service, redis = Service("colocated", settings), connect(settings.redis_url, None)
        worker: Any = kind(room(settings, runner or Idle()), settings, service, redis, IDENTITY)
        begun(worker)
        asyncio.get_running_loop().call_later(after_s, stop, service)
        await worker.run()
        await redis.aclose()
        return worker, service

    return asyncio.run(run())
