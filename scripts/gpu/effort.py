"""How much `scripts/gpu/system.py` measures, on a GPU and, to see that it runs, on a CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from scripts.gpu import checkpoint
from scripts.gpu.checkpoint import Size
from scripts.load.interference import Load
from scripts.load.trials import Plan

SEED = 1


@dataclass(frozen=True)
class Effort:
    """What is measured, how large and for how long."""

    size: Size
    device: str
    pages: int
    context: int
    load: Load
    warm_s: float
    handoff_tokens: int
    plan: Plan
    first_rate: float
    length_scale: float
    budget_tokens: int
    percents: tuple[int, ...]
    """The prefill's shares of the card, tried in this order."""
    goodput_s: float
    whole_s: float


GPU = Effort(
    size=checkpoint.LLAMA_3_8B,
    device="cuda",
    pages=6144,
    context=9216,
    load=Load(streams=16, half_s=8.0, every_s=1.0, long_tokens=(8192,), answer_tokens=16, written_tokens=320, settle_s=1.0),
    warm_s=2.0,
    handoff_tokens=2048,
    plan=Plan(seconds=5.0, least=40, most=150, cv=1.0, seed=SEED, restless_s=0.5),
    first_rate=16.0,
    length_scale=1.0,
    budget_tokens=512,
    percents=(50, 30),
    goodput_s=150.0,
    whole_s=345.0,
)
TINY = replace(
    GPU,
    size=checkpoint.TINY,
    device="cpu",
    pages=1024,
    context=1024,
    load=Load(streams=2, half_s=3.0, every_s=1.0, long_tokens=(512,), answer_tokens=8, written_tokens=64, settle_s=0.5),
    warm_s=1.5,
    handoff_tokens=256,
    plan=Plan(seconds=2.0, least=6, most=12, cv=1.0, seed=SEED, restless_s=0.5),
    first_rate=4.0,
    length_scale=0.1,
    budget_tokens=128,
    percents=(),
    goodput_s=20.0,
    whole_s=150.0,
)
