"""The runner of a model in stages: `launch` returns when rank 0 has done its part, tokens are drawn when the last stage has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.engine.plan import Plan, StepOutput
from services.engine.runner import Runner
from services.engine.stage import Leader


@dataclass(frozen=True, slots=True)
class Flight:
    """A launch on its way through the stages."""

    plan: Plan
    order: list[int]


class PipelinedRunner:
    """Launches are collected in their order. None may hold a pending chunk: its token would be known only after it is needed."""

    def __init__(self, leader: Leader, page_tokens: int, stages: int) -> None:
        self._leader = leader
        self.depth = stages
        """A launch in each."""
        self._runner = Runner(leader, page_tokens)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Flight:
        order = self._runner.order(plan)
        self._leader.start(self._runner.arrays([plan.chunks[i] for i in order]))
        return Flight(plan, order)

    @torch.inference_mode()
    def collect(self, flight: Flight) -> StepOutput:
        return StepOutput(self._runner.draws(flight.plan, flight.order, self._leader.finish()))
