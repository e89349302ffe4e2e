"""A small machine with round figures, and requests for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from services.planner.agenda import Agenda
from services.planner.apart import Apart, Written
from services.planner.costs import Costs
from services.planner.lanes import Worker
from services.planner.latency import Coefficients, LaunchModel
from services.planner.placement import Simulated
from services.planner.requests import Ask, Request
from services.planner.system import System
from services.planner.trial import system_of

LAUNCH = LaunchModel(Coefficients(0.010, 1e-4, 0.0), Coefficients(0.010, 0.0, 1e-3))
"""A prompt of 100 tokens takes 20 ms, a step of n sequences 10 + n ms."""


def machine(
    tokens: int = 4096, *, transfer_s: float = 0.0, page_s: float = 0.001, launch: LaunchModel = LAUNCH, tps: Sequence[int] = (1,)
) -> Costs:
    """Pages of 16 tokens; a device has `tokens` tokens of room besides weights as large; a page takes `page_s` to another worker."""
    return Costs(
        name="test",
        launches=dict.fromkeys(tps, launch),
        memory_bytes=2.0 * tokens,
        weight_bytes=1.0 * tokens,
        kv_bytes_per_token=1.0,
        transfer_bytes_per_s=16 / page_s,
        network_bytes_per_s=16 / page_s / 100,
        transfer_s=transfer_s,
    )


def played(costs: Costs, where: Simulated, asks: Sequence[Ask], seed: int = 0) -> tuple[System, list[Request]]:
    """All of the asks through a placement until nothing happens any more; `at` is in seconds."""
    agenda = Agenda()
    system = system_of(agenda, costs, where, seed)
    requests = [Request(n, ask.at, ask.input_tokens, ask.output_tokens) for n, ask in enumerate(asks)]
    for request in requests:
        agenda.at(request.due_s, partial(system.arrive, request))
    while agenda.step():
        pass
    return system, requests


def workers_of(system: System) -> list[Worker]:
    return [*system.workers, *(system.decodes.workers if isinstance(system, Apart | Written) and system.decodes else ())]


def assert_idle(system: System) -> None:
    """Every page of every pool is free, and nobody is owed anything."""
    for worker in workers_of(system):
        for lane in worker.lanes:
            lane.pool.check()
            assert lane.pool.counts.free == lane.pool.total
            assert not lane.carried and not lane.bound and not lane.unbegun
