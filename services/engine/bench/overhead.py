"""What a step costs beside the model: the scheduler's and the runner's Python, with a stand-in for the model, and drawing tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.messages import Key, Sampling
from services.engine.bench.launches import PAGE_TOKENS
from services.engine.bench.rounds import Case
from services.engine.launch import Launch
from services.engine.pages import PagePool
from services.engine.policies import Limits
from services.engine.runner import Runner
from services.engine.sampler import Row, draw
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence

CONTEXT = 512
SEQUENCES = (1, 16, 64, 256)
STEP_S, SEQUENCE_S = 300e-6, 1e-6
"""The bound of a step, and what each sequence adds."""
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
}
SPREAD, LIKELY, LEAD = 3.0, 50, 10.0
"""Logits drawn from are like SmolLM2's on a chat prompt, where top-p 0.9 keeps some tokens to some tens: a normal distribution, and some
tokens that lead it."""


@dataclass(frozen=True)
class StandIn:
    """A model of two tokens that takes no time."""

    logits: Tensor

    def __call__(self, launch: Launch) -> Tensor:
        return self.logits[: len(launch.keep)]


class Steps:
    """`sequences` sequences that decode step after step through a real scheduler and a real runner."""

    def __init__(self, sequences: int) -> None:
        self._count = sequences
        self._renew()

    def _renew(self) -> None:
        pages = self._count * (CONTEXT // PAGE_TOKENS + 8)
        self._scheduler = Scheduler(PagePool(pages, PAGE_TOKENS), "prefill_first", Limits(1 << 30, 1 << 30, self._count, 2))
        self._runner = Runner(StandIn(torch.zeros(self._count, 2)), PAGE_TOKENS)
        for i in range(self._count):
            self._scheduler.submit(Sequence(Key(str(i), 0, 0, "e"), [5] * CONTEXT, CONTEXT, Sampling(temperature=0), 100))
        self.step()
        self._left = 90

    def prepare(self) -> None:
        if not self._left:
            self._renew()
        self._left -= 1

    def step(self) -> None:
        """What the engine's thread does for one launch."""
        plan = self._scheduler.next()
        assert plan is not None
        self._scheduler.commit(plan, self._runner.collect(self._runner.launch(plan)))
        self._scheduler.take_outcomes()
        self._scheduler.snapshot()


def step_cases(most: int) -> list[Case]:
    found = []
    for sequences in SEQUENCES:
        if sequences <= most:
            steps = Steps(sequences)
            found.append(Case(step_name(sequences), steps.step, before=steps.prepare, repeats=20))
    return found


def step_name(sequences: int) -> str:
    return f"python {sequences}"


def step_bound_s(sequences: int) -> float:
    return STEP_S + SEQUENCE_S * sequences


def sampling_cases(vocabulary: int, device: torch.device, batches: tuple[int, ...]) -> list[Case]:
    found = []
    for batch in batches:
        logits = torch.randn(batch, vocabulary, device=device) * SPREAD
        logits[:, :: max(1, vocabulary // LIKELY)] += LEAD
        for name, sampling in SAMPLINGS.items():
            rows = [Row(Sampling(seed=i, **sampling), 0, i, [1], 1) for i in range(batch)]
            found.append(Case(sampling_name(name, batch), _drawing(logits, rows), repeats=3))
    return found


def sampling_name(sampling: str, batch: int) -> str:
    return f"sampling {sampling} {batch}"


def sampling_bytes(vocabulary: int, batch: int) -> float:
    """Of float32 logits that must be read once at least."""
    return 4.0 * vocabulary * batch


def _drawing(logits: Tensor, rows: list[Row]) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> object:
        return draw(logits, rows)

    return run
