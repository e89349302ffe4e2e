"""`python -m gateway`: HTTP on one side, the fleet on the other."""

from __future__ import annotations

import asyncio
import time

from common.faults import parse
from common.names import BEAT_S
from common.queue import connect
from common.seal import read_seal
from common.service import Service, end, leave, run
from common.settings import GatewaySettings
from common.slo import Objectives
from gateway.access import access_of, origins_of
from gateway.app import Bounds, create_app
from gateway.desk import LiveDesk
from gateway.forecast import Bounds as Acceptable
from gateway.local import local_names
from gateway.metrics import Metrics
from gateway.prompts import Model
from gateway.server import GRACE_S, HttpServer, check_open

BODY_S = 30.0


async def main(settings: GatewaySettings, service: Service) -> None:
    access = access_of(settings)
    origins = origins_of(settings.cors_origins)
    anyone = settings.allow_anonymous == "anyone"
    check_open(settings.http_host, keys=access is not None, anyone=anyone)
    names = local_names(settings.http_host) if access is None and not anyone else None
    model = await asyncio.to_thread(Model, settings.model, settings.model_name)
    redis = connect(settings.redis_url, settings.redis_ca_file)
    metrics = Metrics(Objectives(settings.slo_ttft_s, settings.slo_tpot_s))
    desk = LiveDesk(
        service.incarnation,
        redis,
        settings.fleet,
        settings.host,
        model.hash,
        max_running=settings.max_running,
        max_queued=settings.max_queued,
        fault=parse(settings.message_fault),
        on_reenqueued=metrics.reenqueue.observe,
        bounds=Acceptable(settings.max_ttft_s, settings.max_tpot_s),
        seal=read_seal(settings.fleet_secret_file),
    )
    bounds = Bounds(settings.max_body_bytes, settings.max_bodies_bytes, BODY_S, settings.deadline_s, settings.write_timeout_s)
    server = HttpServer(
        create_app(desk, model, bounds, metrics, access, origins, names),
        settings.http_host,
        settings.http_port,
        write_s=settings.write_timeout_s,
        most=settings.max_connections,
    )
    try:
        async with asyncio.TaskGroup() as tasks:
            own = [
                *desk.start(tasks),
                tasks.create_task(_export(desk, metrics), name="metrics"),
            ]
            http = tasks.create_task(server.run(), name="http")
            service.ready(http_host=settings.http_host, http_port=server.port)
            await service.stopping.wait()
            until = time.monotonic() + settings.drain_s
            await desk.drain(settings.drain_s)
            server.stop(max(GRACE_S, until - time.monotonic()))
            await http
            await end(*own)
    finally:
        desk.close()
        await redis.aclose()


async def _export(desk: LiveDesk, metrics: Metrics) -> None:
    """Figures that are states and not events."""
    while True:
        metrics.running.set(desk.running)
        metrics.queued.set(desk.queued)
        metrics.recoveries.set(desk.recoveries)
        metrics.refused_messages.set(desk.refused)
        for role in ("prefill", "decode", "colocated"):
            beats = [beat for beat in desk.workers.values() if beat.role == role]
            metrics.workers.labels(role).set(len(beats))
            metrics.free_pages.labels(role).set(sum(beat.free_pages for beat in beats))
        await asyncio.sleep(BEAT_S)


if __name__ == "__main__":
    leave(run(main, GatewaySettings, "gateway"))
