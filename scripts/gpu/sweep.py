"""Which tiles and ways are the fastest for Llama-3-8B's shape: each candidate over all 32 layers' weights or pages, from a CUDA graph.

What it prints is what `services/engine/cuda/tiles.py` and the defaults of `Ways` are chosen by. Kernels are compiled beforehand by
several processes into Triton's cache.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from scripts.gpu.speed import DIM, HEADS, KV_HEADS, LAYERS, least, random_weights
from services.engine.cuda.operators import BLOCK_ROWS, Heads, Prompts, Singles
from services.engine.cuda.splits import MOST, splits
from services.engine.cuda.tiles import Cut, Tile
from services.engine.cuda.triton_operators import Attention, TritonOperators, Ways

PAGE_TOKENS = 16
BATCHES = (1, 64)
TILES = (
    (16, 256, 4, 4),
    (16, 512, 4, 3),
    (32, 128, 4, 5),
    (32, 256, 4, 4),
    (64, 64, 4, 6),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (64, 128, 8, 4),
    (128, 64, 4, 4),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
    (256, 64, 8, 4),
)
"""(outputs, depth, warps, stages) of a product."""
SHARED_BYTES = 220 << 10
DECODES = (Attention(32, 4, 3), Attention(64, 4, 2), Attention(64, 4, 3), Attention(64, 8, 3), Attention(128, 4, 2), Attention(128, 8, 2))
PREFILLS = (Attention(64, 8, 2), Attention(64, 8, 3), Attention(64, 4, 3), Attention(128, 8, 2), Attention(128, 8, 3))
PROCESSES = 12
KEPT = 4
"""Results of a kind that are printed."""
PLAIN = Ways(overlap=False)
LIKE = Heads(HEADS, KV_HEADS, DIM, PAGE_TOKENS, DIM**-0.5, 1e-5)


def tiles(batch: int, gated: bool) -> list[Tile]:
    height = max(16, batch)
    fits = [one for one in TILES if one[3] * (height + one[0] * (2 if gated else 1)) * one[1] * 2 <= SHARED_BYTES]
    return [Tile(height, outputs, depth, warps, stages) for outputs, depth, warps, stages in fits]


@torch.inference_mode()
def results(model: str | None) -> Iterator[tuple[str, Any]]:
    compile_all()
    weights = random_weights()
    kinds: dict[str, tuple[list[Tensor], bool]] = {
        "qkv": ([layer.qkv for layer in weights.layers], False),
        "o": ([layer.o for layer in weights.layers], False),
        "gate_up": ([layer.gate_up for layer in weights.layers], True),
        "down": ([layer.down for layer in weights.layers], False),
        "head": ([weights.head], False),
    }
    for batch in BATCHES:
        for kind, (matrices, gated) in kinds.items():
            yield f"{kind} of {batch}", products(batch, matrices, gated)
    del weights, kinds
    torch.cuda.empty_cache()
    for batch, context in ((1, 1024), (64, 1024), (64, 4096)):
        yield f"decode attention of {batch} at {context}", decodes(batch, context)
    for tokens in (2048, 8192):
        yield f"prefill attention of {tokens}", prefills(tokens)


def products(batch: int, matrices: list[Tensor], gated: bool) -> dict[str, Any]:
    """Microseconds for one matrix: the library's, and the fastest of ours by tile, parts and way."""
    x = torch.randn(batch, matrices[0].shape[1], device="cuda", dtype=torch.bfloat16)
    outputs = len(matrices[0]) // (2 if gated else 1)
    library = graph(partial(_each, partial(torch.nn.functional.linear, x), matrices)) / len(matrices)
    found = {}
    for tile in tiles(batch, gated):
        for parts in (1,) if gated or len(matrices) == 1 else (1, 2, 4, 8):
            programs = outputs // tile.outputs * parts
            if outputs % tile.outputs or x.shape[1] % (parts * tile.depth) or (parts > 1 and programs > 10 * 132):
                continue
            for ways in (PLAIN, Ways(ahead=0), Ways(ahead=4)):
                do, how = TritonOperators(ways), Cut(tile, parts)
                seconds = timed(graph, partial(_each, partial(do.multiplied, x, how=how, gated=gated), matrices))
                found[words(tile, parts, ways)] = seconds / len(matrices)
    size = sum(matrix.numel() for matrix in matrices) * 2 / len(matrices)
    return {"library_us": 1e6 * library, "gb": size / 1e9, **best(found, size)}


def words(tile: Tile, parts: int, ways: Ways) -> str:
    way = f"ahead {ways.ahead}" if ways.overlap else "plain"
    return f"outputs {tile.outputs} depth {tile.depth} warps {tile.warps} stages {tile.stages} parts {parts} {way}"


def best(found: dict[str, float], size: float) -> dict[str, Any]:
    order = sorted(found, key=lambda name: found[name])
    top = {name: round(1e6 * found[name], 2) for name in order[:KEPT]}
    plain = next((name for name in order if name.endswith("plain")), None)
    return {"tb_s": size / found[order[0]] / 1e12, "us": top, "plain": None if plain is None else {plain: round(1e6 * found[plain], 2)}}


def decodes(batch: int, context: int) -> dict[str, Any]:
    pages, table = _pages(batch * context)
    queries = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(queries)
    begins = torch.arange(batch, device="cuda", dtype=torch.int32) * (context // PAGE_TOKENS)
    lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    found = {}
    usual = splits(batch, KV_HEADS, queries.device)
    for tile in DECODES:
        for cuts in sorted({usual, min(MOST, 2 * usual), max(1, usual // 2)}):
            singles = Singles(begins, lengths, table, cuts)
            for ways in (PLAIN, Ways()):
                do = TritonOperators(replace(ways, decode=tile))
                seconds = timed(graph, partial(_each, partial(_decode, do, queries, singles, LIKE, out), pages.unbind(1)))
                found[f"{tile} splits {cuts} {'overlap' if ways.overlap else 'plain'}"] = seconds / LAYERS
    return {"splits": usual, **best(found, batch * context * 2 * KV_HEADS * DIM * 2)}


def prefills(tokens: int) -> dict[str, Any]:
    pages, table = _pages(tokens)
    queries = torch.randn(tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(queries)
    rows = BLOCK_ROWS[2]
    chunks = torch.tensor([[0, tokens, 0, 0]], device="cuda", dtype=torch.int32)
    firsts = torch.arange(tokens - rows, -1, -rows, device="cuda", dtype=torch.int32)
    prompts = Prompts(chunks, torch.stack((torch.zeros_like(firsts), firsts), 1).contiguous(), rows, table)
    found = {}
    for tile in PREFILLS:
        do = TritonOperators(replace(PLAIN, prefill=tile))
        found[f"{tile} plain"] = timed(least, partial(do.prefill, queries, pages[:, 0], prompts, LIKE, out))
    flops = 4 * tokens * (tokens + 1) / 2 * HEADS * DIM
    q, k, v = (torch.randn(1, n, tokens, DIM, device="cuda", dtype=torch.bfloat16) for n in (HEADS, KV_HEADS, KV_HEADS))
    attend = torch.nn.functional.scaled_dot_product_attention
    torchs = least(lambda: attend(q, k, v, is_causal=True, enable_gqa=True))
    return {"torch_us": 1e6 * torchs, "torch_tflops": flops / torchs / 1e12, "tflops": flops / min(found.values()) / 1e12, **best(found, 1)}


def _each(run: Callable[[Tensor], object], over: Iterable[Tensor]) -> None:
    for one in over:
        run(one)


def _decode(do: TritonOperators, queries: Tensor, singles: Singles, like: Heads, out: Tensor, pages: Tensor) -> None:
    do.decode(queries, pages, singles, LIKE, out)


def _pages(tokens: int) -> tuple[Tensor, Tensor]:
    """Pages of all layers, and a table that names them in no order."""
    count = tokens // PAGE_TOKENS
    pages = torch.randn(count, LAYERS, 2, KV_HEADS, PAGE_TOKENS, DIM, device="cuda", dtype=torch.bfloat16)
    return pages, torch.randperm(count, device="cuda").to(torch.int32)


def timed(measure: Callable[[Callable[[], object]], float], work: Callable[[], object]) -> float:
    """Infinite for a candidate that this device cannot run; why is printed."""
    try:
        return measure(work)
    except Exception as failure:
        print(f"{type(failure).__name__}: {failure}"[:300], flush=True)
        return math.inf


def graph(work: Callable[[], object]) -> float:
    """Least seconds of a replay."""
    work()
    torch.cuda.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        work()
    return least(made.replay)


# ---------------------------------------------------------------------------------------------------------- compiling


def compile_all() -> None:
    """Every kernel of this sweep, by several processes."""
    products = [partial(_product, batch, gated, tile) for batch in BATCHES for gated in (False, True) for tile in tiles(batch, gated)]
    todo = [*products, *(partial(_decoding, tile) for tile in DECODES), *(partial(_prefilling, tile) for tile in PREFILLS)]
    with (
        contextlib.suppress(BrokenProcessPool),
        ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool,
    ):
        list(pool.map(_compile, todo))


def _compile(run: Callable[[], None]) -> None:
    """What cannot be compiled is met again, and told, where it is timed."""
    with contextlib.suppress(Exception), torch.inference_mode():
        run()
        torch.cuda.synchronize()


def _product(batch: int, gated: bool, tile: Tile) -> None:
    x = torch.ones(batch, 8 * tile.depth, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones((2 if gated else 1) * tile.outputs, 8 * tile.depth, device="cuda", dtype=torch.bfloat16)
    for ways in (PLAIN, Ways(ahead=0), Ways(ahead=4)):
        for parts in (1,) if gated else (1, 2):
            TritonOperators(ways).multiplied(x, weight, Cut(tile, parts), gated=gated)


def _decoding(tile: Attention) -> None:
    pages, table = _pages(PAGE_TOKENS)
    queries = torch.ones(1, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    begins, lengths = table * 0, table * 0 + PAGE_TOKENS
    for cuts in (1, 2, 4, 8, 16, 32):
        for ways in (PLAIN, Ways()):
            do = TritonOperators(replace(ways, decode=tile))
            do.decode(queries, pages[:, 0], Singles(begins, lengths, table, cuts), LIKE, torch.empty_like(queries))


def _prefilling(tile: Attention) -> None:
    pages, table = _pages(PAGE_TOKENS)
    queries = torch.ones(PAGE_TOKENS, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    chunks = torch.tensor([[0, PAGE_TOKENS, 0, 0]], device="cuda", dtype=torch.int32)
    prompts = Prompts(chunks, torch.zeros(1, 2, device="cuda", dtype=torch.int32), BLOCK_ROWS[2], table)
    TritonOperators(replace(PLAIN, prefill=tile)).prefill(queries, pages[:, 0], prompts, LIKE, torch.empty_like(queries))
