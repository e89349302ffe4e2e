"""Launches of the engine: whole prompts, alone and packed, and decode steps, through the runner as a worker has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.messages import Key, Sampling
from services.engine.bench.rounds import Case
from services.engine.bench.work import Shapes
from services.engine.cuda.runner import runner
from services.engine.forward import Forward
from services.engine.model import LoadedModel
from services.engine.plan import Chunk, Plan
from services.engine.pool import Pool
from services.engine.sequence import Sequence

PAGE_TOKENS = 16
GREEDY = Sampling(temperature=0)
STEPS = 3
"""Decode steps of a case in a round."""


@dataclass(frozen=True)
class Grid:
    """What is measured. `prompts`: lengths of the prompts of each launch. `steps`: (batch, context) of each decode step."""

    prompts: tuple[tuple[int, ...], ...]
    steps: tuple[tuple[int, int], ...]

    @property
    def pages(self) -> int:
        tokens = [sum(-(-n // PAGE_TOKENS) for n in lengths) for lengths in self.prompts]
        return max(tokens + [batch * -(-context // PAGE_TOKENS) for batch, context in self.steps])


def grid(device: str, longest: int, quick: bool) -> Grid:
    """`longest`: tokens that the model's context holds."""
    contexts: tuple[int, ...] = (256, 512, 1024, 2048) if device == "cpu" else (512, 1024, 2048, 4096, 8192)
    batches: tuple[int, ...] = (1, 4, 8, 16, 32) if device == "cpu" else (1, 4, 8, 16, 32, 64, 128, 256)
    prompts: tuple[tuple[int, ...], ...] = ((128,), (512,), (1024,), (2048,), (128,) * 4, (512,) * 4)
    if quick:
        contexts, batches, prompts = (512, 1024), (1, 8, 16), ((128,), (512,), (1024,), (2048,), (128,) * 4)
    return Grid(
        tuple(lengths for lengths in prompts if max(lengths) <= longest),
        tuple((batch, context) for context in contexts if context <= longest for batch in batches),
    )


def shapes(loaded: LoadedModel) -> Shapes:
    """Counted from the module, before its layers are packed or dropped."""
    config, layout = loaded.module.config, loaded.layout
    head = loaded.module.get_output_embeddings()
    linears = {name: part for name, part in loaded.module.named_modules() if type(part) is torch.nn.Linear and part is not head}
    joined = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    products: dict[str, tuple[int, int]] = {}
    for name, part in linears.items():
        if ".layers.0." in name:
            kind = name.rpartition(".")[2]
            group = next((group[0] for group in joined if kind in group), kind)
            products[group] = (products.get(group, (0, 0))[0] + part.out_features, part.in_features)
    return Shapes(
        layers=layout.layers,
        width=config.num_attention_heads * layout.head_dim,
        kv_width=layout.kv_heads * layout.head_dim,
        body_weights=sum(part.weight.numel() for part in linears.values()),
        head_weights=head.weight.numel(),
        vocabulary=loaded.vocabulary,
        element_bytes=4 if layout.dtype == "float32" else 2,
        products=tuple(products.values()),
    )


def fill(pool: Pool) -> None:
    """Numbers like those of keys and values, in memory of every page's own: pages nobody has written cost nothing to read."""
    page = torch.randn(pool.tensor.shape[1:], device=pool.tensor.device).to(pool.tensor.dtype)
    pool.tensor.copy_(page.expand_as(pool.tensor))


def cases(forward: Forward, wanted: Grid) -> list[Case]:
    """Named by `prompt_name` and `step_name`. From launch to collected, greedy."""
    computes = runner(forward, PAGE_TOKENS)

    def launched(plan: Plan) -> Callable[[], object]:
        return lambda: computes.collect(computes.launch(plan))

    found = [Case(prompt_name(lengths), launched(_prompts(lengths))) for lengths in wanted.prompts]
    return found + [Case(step_name(*step), launched(_step(*step)), repeats=STEPS) for step in wanted.steps]


def prompt_name(lengths: tuple[int, ...]) -> str:
    return f"prefill {lengths[0]}" if len(lengths) == 1 else f"prefill {len(lengths)} x {lengths[0]}"


def step_name(batch: int, context: int) -> str:
    return f"decode {batch} at {context}"


def _prompts(lengths: tuple[int, ...]) -> Plan:
    return Plan(1, tuple(Chunk(one, 0, len(one.ids), draws=True, index=0) for one in _sequences(lengths)))


def _step(batch: int, context: int) -> Plan:
    return Plan(1, tuple(Chunk(one, context - 1, 1, draws=True, index=0) for one in _sequences((context,) * batch)))


def _sequences(lengths: tuple[int, ...]) -> list[Sequence]:
    """Each with pages of its own and ids that differ."""
    made, page = [], 0
    for number, length in enumerate(lengths):
        sequence = Sequence(Key(str(number), 0, 0, ""), [100 + (7 * i + number) % 400 for i in range(length)], length, GREEDY, 1)
        sequence.pages = list(range(page, page + -(-length // PAGE_TOKENS)))
        page += len(sequence.pages)
        made.append(sequence)
    return made
