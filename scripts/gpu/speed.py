"""Decode and prefill in the shape of Llama-3-8B, random bf16 weights, against products, reads and copies of the same run."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from common.messages import Key, Layout, Sampling, Token
from scripts.gpu.guard import guarded
from services.engine.bench import launches, work
from services.engine.bench.work import Shapes
from services.engine.cuda.forward import Body, CudaForward
from services.engine.cuda.graphs import Step, sizes
from services.engine.cuda.operators import Heads
from services.engine.cuda.runner import runner
from services.engine.cuda.splits import splits
from services.engine.cuda.triton_operators import TritonOperators, Ways
from services.engine.cuda.weights import Layer, Weights
from services.engine.pages import PagePool
from services.engine.plan import Plan
from services.engine.policies import Limits
from services.engine.pool import Pool
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCABULARY = 32, 4096, 14336, 32, 8, 128, 128256
CONTEXT = 8192
GRID = launches.Grid(prompts=((2048,), (8192,)), steps=((1, 1024), (64, 1024), (256, 1024)))
PRODUCT = 8192
STREAM_BYTES = 4 << 30
MOST_BATCH = 256
REPEATS = 10
STEPS, WARM_UP = 32, 4
PROCESSES = 8
AHEAD_CYCLES = 1_000_000
"""Half a millisecond in which the device waits: the host's launch is over by the time that it is timed."""
WAYS = {
    "the library's products": Ways(products=False, overlap=False),
    "as it is": Ways(),
    "without overlap": Ways(overlap=False),
    "torch's attention of prompts": Ways(library=True),
}
"""The first draws the ids that the others are held against."""
AS_IT_IS = "as it is"
PROMPTS = (AS_IT_IS, "torch's attention of prompts")
"""Ways in which prompts differ: all others compute them alike, eagerly and through the library's products."""
LEAST_EQUAL = 0.8
"""Of the ids that a way draws: logits of random weights lie close, and rounding decides between some."""


@torch.inference_mode()
def results(model: str | None) -> Iterator[tuple[str, Any]]:
    products, reads, copies = ceilings()
    yield "ceilings", {"flops_per_s": products, "read_bytes_per_s": reads, "copied_bytes_per_s": copies}
    pool = Pool(Layout(LAYERS, KV_HEADS, launches.PAGE_TOKENS, DIM, "bfloat16"), GRID.pages, "cuda")
    pool.tensor.normal_()
    began = time.monotonic()
    compile_all()
    yield "compiled", {"seconds": time.monotonic() - began}
    weights, drawn = random_weights(), dict[str, list[int]]()
    for way in WAYS:
        yield from guarded(way, _timed(way, weights, pool, products, reads, drawn))


def _timed(way: str, weights: Weights, pool: Pool, products: float, reads: float, drawn: dict[str, list[int]]) -> Iterator[tuple[str, Any]]:
    """Decode steps by this way, or prompts, or both; by what is in use also steps through the scheduler. `drawn`: ids by step, of the
    first way."""
    due, began = shapes(), time.monotonic()
    forward = CudaForward(weights, TritonOperators(WAYS[way]), pool, 0 if way == PROMPTS[1] else MOST_BATCH)
    torch.cuda.synchronize()
    yield f"capture, {way}", {"batches_up_to": MOST_BATCH, "seconds": time.monotonic() - began}
    equal = count = 0
    for case in launches.cases(forward, GRID):
        step = next((one for one in GRID.steps if launches.step_name(*one) == case.name), None)
        prompt = next((one for one in GRID.prompts if launches.prompt_name(one) == case.name), ())
        if (step is None and way not in PROMPTS) or (step is not None and way == PROMPTS[1]):
            continue
        for _ in range(3):
            output: Any = case.run()
        times = sorted(second for _ in range(REPEATS) for second in case.seconds())
        bound = work.bound(work.decode(due, *step) if step else work.prefill(due, prompt), products, reads)
        yield f"{case.name}, {way}", figures(times, bound)
        if step is not None:
            ids = [draw.id for draw in output.draws]
            expected = drawn.setdefault(case.name, ids)
            equal, count = equal + sum(a == b for a, b in zip(ids, expected, strict=True)), count + len(ids)
    yield f"ids, {way}", {"ok": equal >= LEAST_EQUAL * count, "rows": count, "equal": equal}
    if way == AS_IT_IS:
        for step in GRID.steps:
            bound = work.bound(work.decode(due, step[0], step[1] - STEPS // 2), products, reads)
            yield f"{launches.step_name(*step)}, one after the other", figures(steady(forward, *step), bound)


def figures(times: list[float], bound: work.Bound) -> dict[str, Any]:
    times = sorted(times)
    median = times[len(times) // 2]
    return {"ms": 1e3 * median, "least_ms": 1e3 * times[0], "bound_ms": 1e3 * bound.seconds, "by": bound.by, "over": median / bound.seconds}


def steady(forward: CudaForward, batch: int, context: int) -> list[float]:
    """Seconds between the ends of a worker's decode steps up to this context: through scheduler and runner, a launch ahead."""
    computes = runner(forward, launches.PAGE_TOKENS)
    book = PagePool(batch * -(-context // launches.PAGE_TOKENS), launches.PAGE_TOKENS)
    scheduler = Scheduler(book, "prefill_first", Limits(1 << 20, 1 << 20, batch, 2), depth=computes.depth)
    for number in range(batch):
        ids = [100 + (7 * i + number) % 400 for i in range(context - STEPS)]
        sequence = Sequence(Key(str(number), 0, 0, "e"), ids, len(ids), Sampling(temperature=0), STEPS)
        scheduler.reserve(("sender", number), sequence)
    under_way: deque[tuple[Plan, Any]] = deque()
    scheduler.next()
    for number in range(batch):
        scheduler.admit(("sender", number), Token(0, 100))
    ends: list[float] = []
    while (plan := scheduler.next()) or under_way:
        if plan is not None:
            under_way.append((plan, computes.launch(plan)))
            continue
        oldest, ticket = under_way.popleft()
        scheduler.commit(oldest, computes.collect(ticket))
        ends.append(time.perf_counter())
    gaps = [later - sooner for sooner, later in itertools.pairwise(ends)]
    return gaps[WARM_UP:-WARM_UP]


def ceilings() -> tuple[float, float, float]:
    """Products of bf16 per second as operations, bytes read and bytes copied per second: the best of ten each."""
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    products = 2.0 * PRODUCT**3 / least(lambda: a @ b)
    source, target = (torch.ones(STREAM_BYTES // 4, device="cuda") for _ in range(2))
    whole = source.view(torch.int64)
    reads = max(STREAM_BYTES / least(run) for run in (source.sum, whole.sum, source.amax))
    return products, reads, STREAM_BYTES / least(lambda: target.copy_(source))


def least(run: Callable[[], object]) -> float:
    """Seconds on the device."""
    times = []
    for number in range(13):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(AHEAD_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return float(min(times))


def compile_all(over: Iterable[Ways] = tuple(WAYS.values())) -> None:
    """The kernels of every graph, by several processes into Triton's cache: one would take minutes."""
    with (
        contextlib.suppress(BrokenProcessPool),
        ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool,
    ):
        list(pool.map(_compile, *zip(*[(ways, size) for ways in over for size in sizes(MOST_BATCH)], strict=True)))


@torch.inference_mode()
def _compile(ways: Ways, size: int) -> None:
    """A step of nothing but padding through one layer. What fails is met again where it is timed."""
    with contextlib.suppress(Exception):
        pool = Pool(Layout(1, KV_HEADS, launches.PAGE_TOKENS, DIM, "bfloat16"), 1, "cuda")
        step = Step(size, 1, pool.tensor.device)
        Body(random_weights(1), TritonOperators(ways), pool)(step.views(size, splits(size, KV_HEADS, pool.tensor.device)))
        torch.cuda.synchronize()


def random_weights(layers: int = LAYERS) -> Weights:
    def matrix(*size: int) -> Tensor:
        return torch.empty(*size, device="cuda", dtype=torch.bfloat16).normal_(std=size[-1] ** -0.5)

    def ones() -> Tensor:
        return torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)

    made = tuple(
        Layer(
            input_norm=ones(),
            qkv=matrix((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
            qkv_bias=None,
            norms=None,
            o=matrix(HIDDEN, HEADS * DIM),
            o_bias=None,
            output_norm=ones(),
            gate_up=matrix(2 * INNER, HIDDEN),
            gate_up_bias=None,
            down=matrix(HIDDEN, INNER),
            down_bias=None,
        )
        for _ in range(layers)
    )
    angle = torch.arange(CONTEXT, device="cuda")[:, None] / 500_000.0 ** (torch.arange(0, DIM, 2, device="cuda") / DIM)
    like = Heads(HEADS, KV_HEADS, DIM, launches.PAGE_TOKENS, DIM**-0.5, 1e-5)
    return Weights(like, matrix(VOCABULARY, HIDDEN), made, ones(), matrix(VOCABULARY, HIDDEN), (angle.cos(), angle.sin()))


def shapes() -> Shapes:
    products = ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), (HIDDEN, HEADS * DIM), (2 * INNER, HIDDEN), (HIDDEN, INNER)
    return Shapes(
        layers=LAYERS,
        width=HEADS * DIM,
        kv_width=KV_HEADS * DIM,
        body_weights=LAYERS * sum(outputs * inputs for outputs, inputs in products),
        head_weights=VOCABULARY * HIDDEN,
        vocabulary=VOCABULARY,
        element_bytes=2,
        products=products,
    )
