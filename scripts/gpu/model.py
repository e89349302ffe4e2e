"""A small model on the GPU, greedy, against transformers: packed prompts in chunks, then decode in company, by graphs and eagerly,
each launch made while the one before it is under way."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.messages import Key, Sampling
from common.settings import Kernels
from scripts.gpu.guard import attempt
from services.engine.cuda.runner import runner
from services.engine.forward import place
from services.engine.loading import load
from services.engine.pages import PagePool
from services.engine.plan import Plan
from services.engine.policies import Limits
from services.engine.pool import Pool
from services.engine.runner import Runner
from services.engine.sampler import Row, draw
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence

LENGTHS = (1, 15, 16, 17, 130, 333, 600)
OUTPUT = 48
PAGE_TOKENS = 16
NEAR = {"float32": 2e-3, "bfloat16": 0.5}
"""A drawn token's logit may lie so far below the largest: rounding alone decides between such two."""
LEAST_EQUAL = len(LENGTHS) - 2
"""Answers that are the same a launch ahead as without: other company rounds otherwise, and may decide in one or two."""


def results(model: str | None) -> Iterator[tuple[str, Any]]:
    with tempfile.TemporaryDirectory() as made:
        path = Path(model) if model else random_model(Path(made))
        for dtype in NEAR:
            for kernels in ("native", "torch"):
                yield attempt(f"greedy, {kernels}, {dtype}", partial(greedy, path, dtype, kernels))  # type: ignore[arg-type]
        yield attempt("a launch ahead", partial(ahead, path))
    yield attempt("draws", draws)


def random_model(folder: Path) -> Path:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    made = AutoModelForCausalLM.from_config(config)
    for tensor in made.parameters():
        if tensor.dim() == 2:
            tensor.data.normal_(std=0.08)
    made.save_pretrained(folder)
    return folder


@torch.inference_mode()
def greedy(path: Path, dtype: str, kernels: Kernels, device: str = "cuda") -> dict[str, Any]:
    """Every output token against the logits that transformers gives in float32, on the same rounded weights, for what precedes it."""
    loaded = load(path, device, dtype, PAGE_TOKENS)
    pages = sum(-(-(length + OUTPUT) // PAGE_TOKENS) for length in LENGTHS)
    over = place(loaded, kernels, most_batch=5)  # so that steps of 7 run eagerly, and those of 5 and fewer padded or not
    pool = Pool(loaded.layout, pages, device)
    pool.tensor.fill_(float("nan"))  # before it is written it is no number
    sequences = generate(runner(over(pool), PAGE_TOKENS), loaded.vocabulary, pages)
    reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="eager").float().to(device).eval()
    )
    equal, worst, count = 0, 0.0, 0
    for sequence in sequences:
        logits = reference(torch.tensor([sequence.ids], device=device)).logits[0, sequence.prompt_tokens - 1 : -1]
        chosen = torch.tensor(sequence.ids[sequence.prompt_tokens :], device=device)
        behind = logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]
        equal += int((behind == 0).sum())
        worst, count = max(worst, float(behind.max())), count + len(chosen)
    return {"ok": worst <= NEAR[dtype], "positions": count, "equal": equal, "worst_behind": worst, "allowed_behind": NEAR[dtype]}


@torch.inference_mode()
def ahead(path: Path, device: str = "cuda") -> dict[str, Any]:
    """Drawn answers with seeds, in float32: with a launch under way while the next is made, as without."""
    loaded = load(path, device, "float32", PAGE_TOKENS)
    pages = sum(-(-(length + OUTPUT) // PAGE_TOKENS) for length in LENGTHS)
    computes = runner(place(loaded, "auto", most_batch=5)(Pool(loaded.layout, pages, device)), PAGE_TOKENS)
    by_depth = []
    for depth in (1, computes.depth):
        sequences = generate(computes, loaded.vocabulary, pages, temperature=1.0, depth=depth)
        by_depth.append([sequence.ids for sequence in sequences])
    equal = sum(one == other for one, other in zip(*by_depth, strict=True))
    return {"ok": equal >= LEAST_EQUAL, "depth": computes.depth, "answers": len(LENGTHS), "equal": equal}


def generate(runner: Runner, vocabulary: int, pages: int, *, temperature: float = 0.0, depth: int | None = None) -> list[Sequence]:
    """Outputs through the scheduler, as many launches under way as the runner likes. Prompts go in chunks, the last ones beside the
    first ones' decode steps; every second one ends at half the length."""
    random = torch.Generator().manual_seed(11)
    limits = Limits(budget_tokens=128, chunk_tokens=128, max_batch=len(LENGTHS))
    scheduler = Scheduler(PagePool(pages, PAGE_TOKENS), "chunked", limits, depth=depth or runner.depth)
    sequences = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, vocabulary, (length,), generator=random).tolist()
        due = OUTPUT if number % 2 else OUTPUT // 2
        sequences.append(Sequence(Key(str(number), 0, 0, "e"), ids, length, Sampling(seed=number, temperature=temperature), due))
        scheduler.submit(sequences[-1])
    under_way: deque[tuple[Plan, Any]] = deque()
    while True:
        plan = scheduler.next()
        if plan is not None:
            under_way.append((plan, runner.launch(plan)))
        elif under_way:
            plan, ticket = under_way.popleft()
            scheduler.commit(plan, runner.collect(ticket))
        else:
            return sequences


def draws() -> dict[str, Any]:
    """The same ids on the GPU as on the CPU, whatever the sampling."""
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"top_k": 200, "top_p": 0.8},
    ]
    rows = [Row(Sampling(seed=n, **samplings[n % len(samplings)]), 0, n, [1, 2], 1) for n in range(96)]
    logits = 3 * torch.randn(len(rows), 32000, generator=torch.Generator().manual_seed(3))
    here, there = ([one.id for one in draw(where, rows)] for where in (logits, logits.cuda()))
    equal = sum(a == b for a, b in zip(here, there, strict=True))
    return {"ok": equal >= len(rows) - 1, "rows": len(rows), "equal": equal}
