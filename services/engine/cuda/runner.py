"""Computes plans on a GPU, one ahead: the next launch is made while the device works on the last, whose ids never leave it for that."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.engine.cuda.forward import CudaForward
from services.engine.forward import Forward
from services.engine.launch import Launch
from services.engine.plan import Chunk, Draw, Plan, StepOutput
from services.engine.runner import Runner, mark
from services.engine.sampler import Row, drawn, looks_back, pick
from services.engine.sequence import Sequence


def runner(forward: Forward, page_tokens: int) -> Runner:
    """The one for this forward pass."""
    return AheadRunner(forward, page_tokens) if isinstance(forward, CudaForward) else Runner(forward, page_tokens)


@dataclass(frozen=True, slots=True)
class Flight:
    """A launch under way, and copies of what it draws that are there when `done` has come (on a CPU: at once)."""

    plan: Plan
    drawing: list[int]
    """Chunks that draw, in the order of the rows."""
    ids: Tensor | None
    table: Tensor | None
    described: dict[int, int]
    done: torch.cuda.Event | None

    def read(self) -> dict[int, Draw]:
        """By position in the plan. Waits."""
        if self.done is not None:
            self.done.synchronize()
        if self.ids is None:
            return {}
        draws = drawn(self.ids.tolist(), [] if self.table is None else self.table.tolist(), self.described)
        return dict(zip(self.drawing, draws, strict=True))


class AheadRunner(Runner):
    """`Runner` for `CudaForward`. A pending chunk takes its id on the device, from what the launch before it draws; only a draw that looks
    back at ids (penalties) waits for that one."""

    depth = 2

    def __init__(self, forward: CudaForward, page_tokens: int) -> None:
        super().__init__(forward, page_tokens)
        self._cuda = forward
        self._last: Flight | None = None
        self._places: dict[Sequence, int] = {}
        """Where each sequence's id lies among those that the last launch draws."""

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Flight:  # type: ignore[override]
        """Returns before the device is done."""
        if not plan.chunks:
            return Flight(plan, [], None, None, {}, None)
        order = self.order(plan)
        drawing = [i for i in order if plan.chunks[i].draws]
        logits = self._forward(self.arrays([plan.chunks[i] for i in order]))
        ids = table = None
        described: dict[int, int] = {}
        if drawing:
            picked = pick(logits, self._rows([plan.chunks[i] for i in drawing]))
            self._cuda.drawn[: len(drawing)].copy_(picked.ids)
            ids, table, described = _fetched(picked.ids), None if picked.table is None else _fetched(picked.table), picked.described
        self._last = Flight(plan, drawing, ids, table, described, mark(logits.device))
        self._places = {plan.chunks[i].sequence: place for place, i in enumerate(drawing)}
        return self._last

    def collect(self, flight: Flight) -> StepOutput:  # type: ignore[override]
        found = flight.read()
        return StepOutput(tuple(found.get(i) for i in range(len(flight.plan.chunks))))

    def arrays(self, chunks: list[Chunk]) -> Launch:
        launch = super().arrays(chunks)
        if not any(chunk.pending for chunk in chunks):
            return launch
        sources = launch.ids * 0 - 1
        firsts = launch.chunks[:, 0]
        for first, chunk in zip(firsts.tolist(), chunks, strict=True):
            if chunk.pending:
                sources[first] = self._places[chunk.sequence]
        return replace(launch, sources=sources)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _pending(self, chunk: Chunk) -> int:
        """On the host it stands for what only the device knows yet."""
        return 0

    def _rows(self, chunks: Items[Chunk]) -> list[Row]:
        rows, known = [], None
        for chunk in chunks:
            sequence, ids = chunk.sequence, chunk.sequence.ids
            if chunk.pending and looks_back(sequence.sampling):
                known = known or self._known()
                ids = [*ids, known[sequence]]
            rows.append(Row(sequence.sampling, sequence.key.choice, chunk.index, ids, sequence.prompt_tokens))
        return rows

    def _known(self) -> dict[Sequence, int]:
        """What the last launch drew. Waits for it."""
        if self._last is None:
            return {}
        return {self._last.plan.chunks[i].sequence: one.id for i, one in self._last.read().items()}


def _fetched(x: Tensor) -> Tensor:
    """A copy on the host, complete once the device has come so far."""
    if x.device.type == "cpu":
        return x.clone()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
