"""Each GPU kernel on random inputs, with its worst error against the reference operators in float64. On any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from services.engine.cuda.inputs import blocks, seen_by
from services.engine.cuda.operators import BLOCK_ROWS, Heads, Operators, Packed, Prompts, Rows, Singles
from services.engine.cuda.reference import ReferenceOperators

BOUND = {torch.float32: 4e-6, torch.bfloat16: 2.5e-2, torch.float16: 4e-3}
"""A few roundings of the type."""
REFERENCE = ReferenceOperators()
INPUTS, GATED_OUTPUTS = 256, 128
"""Of products: they divide into tiles."""


@dataclass(frozen=True)
class Shape:
    kv_heads: int
    group: int
    dim: int
    page_tokens: int
    scale: int = 1
    """Sequences are this much longer."""

    @property
    def heads(self) -> Heads:
        return Heads(self.kv_heads * self.group, self.kv_heads, self.dim, self.page_tokens, self.dim**-0.5, 1e-5)


SHAPES = {
    "grouped": Shape(2, 3, 64, 16),
    "wide": Shape(1, 4, 128, 16),
    "odd": Shape(2, 1, 96, 5),
    "many to one": Shape(1, 17, 32, 32),
}
Result: TypeAlias = tuple[float, float]
Case: TypeAlias = Callable[[Operators, Shape, torch.dtype, torch.device, int], Result]
"""Operators, shape, type, device, seed → the worst error, and the largest that is allowed."""


class Inputs:
    """Random pages: what no sequence has written is no number."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int, lengths: list[int]) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.shape = device, dtype, shape
        counts = [-(-length // shape.page_tokens) for length in lengths]
        total = sum(counts) + 2
        self.table = torch.randperm(total, generator=self.random)[: sum(counts)]
        self.begins = [0, *accumulate(counts)][:-1]
        pool = torch.full((total, 3, 2, shape.kv_heads, shape.page_tokens, shape.dim), float("nan"))
        for length, begin in zip(lengths, self.begins, strict=True):
            place = torch.arange(length)
            page = self.table[begin + place // shape.page_tokens]
            pool[page, 1, :, :, place % shape.page_tokens] = torch.randn(length, 2, shape.kv_heads, shape.dim, generator=self.random)
        self.pool = pool.to(dtype).to(device)
        self.pages = self.pool[:, 1]

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.random).to(self.dtype).to(self.device)

    def ints(self, values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)


def norm(do: Operators, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Result:
    given = Inputs(shape, dtype, device, seed, [])
    x, delta, weight = given.normal(7, 3 * shape.dim), given.normal(7, 3 * shape.dim), given.normal(3 * shape.dim)
    plain = do.norm(x, weight, 1e-5)
    error = _error(plain, REFERENCE.norm(x.double(), weight.double(), 1e-5))
    parts = torch.randn(3, *x.shape, generator=given.random).to(device)
    for more, sum in ((delta, delta.double()), (parts, parts.double().sum(0))):
        wanted = x.double() + sum
        found = do.add_norm(x, more, weight, 1e-5)
        error = max(error, _error(x, wanted), _error(found, REFERENCE.norm(x.double(), weight.double(), 1e-5)))
    return error, BOUND[dtype]


def gate(do: Operators, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Result:
    """Of few rows, and of many, which the library multiplies; in half precision one of numbers so large that the gate is open or shut."""
    given, error = Inputs(shape, dtype, device, seed, []), 0.0
    weight = given.normal(2 * GATED_OUTPUTS, INPUTS) / INPUTS**0.5
    for rows in (5, 17, 64, 70):
        x = given.normal(rows, INPUTS)
        x[0] *= 100 if dtype.itemsize == 2 else 1
        error = max(error, _error(do.gated(x, weight, None), REFERENCE.gated(x.double(), weight.double(), None)))
    return error, BOUND[dtype]


def product(do: Operators, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Result:
    """Of few rows and of many, in parts and whole, with a shape that divides and one that does not, with a bias and without."""
    given, error = Inputs(shape, dtype, device, seed, []), 0.0
    for outputs in (GATED_OUTPUTS, 40):
        weight, bias = given.normal(outputs, INPUTS) / INPUTS**0.5, given.normal(outputs)
        for rows in (1, 17, 64, 70):
            x = given.normal(rows, INPUTS)
            for added in (None, bias):
                wanted = REFERENCE.product(x.double(), weight.double(), None if added is None else added.double())
                for whole in (False, True):
                    found = do.product(x, weight, added, whole=whole)
                    error = max(error, _error(found if found.dim() == 2 else found.sum(0), wanted))
    return error, BOUND[dtype]


def put(do: Operators, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Result:
    """With norms (and in parts) and without; a token of padding writes nothing."""
    size, error = shape.page_tokens, 0.0
    for normed in (False, True):
        given = Inputs(shape, dtype, device, seed, [3 * size])
        tokens = 2 * size
        slots = given.table.repeat_interleave(size) * size + torch.arange(3 * size) % size
        slots = slots[torch.randperm(3 * size, generator=given.random)][:tokens]
        slots[1] = -1
        rows = Rows(given.ints(range(tokens)), given.ints(torch.randint(0, 50, (tokens,), generator=given.random)), given.ints(slots))
        angle = torch.rand(50, shape.dim // 2, generator=given.random).to(device) * 6
        angles, norms = (angle.cos(), angle.sin()), given.normal(2, shape.dim) if normed else None
        qkv = given.normal(tokens, (shape.heads.heads + 2 * shape.kv_heads) * shape.dim)
        if normed:
            qkv = torch.stack((qkv.float(), torch.randn(qkv.shape, generator=given.random).to(device)))
        wanted = given.pages.double()
        queries = REFERENCE.put(qkv.double(), wanted, angles, None if norms is None else norms.double(), rows, shape.heads)
        error = max(error, _error(do.put(qkv, given.pages, angles, norms, rows, shape.heads), queries), _error(given.pages, wanted))
    return error, BOUND[dtype]


def decode(do: Operators, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Result:
    """Lengths at the borders of pages and of tiles, and none."""
    size, error = shape.page_tokens, 0.0
    lengths = [1, size - 1, size, size + 1, 0, 64, 65, *(shape.scale * length for length in (2 * size, 137))]
    given = Inputs(shape, dtype, device, seed, lengths)
    queries = given.normal(len(lengths), shape.heads.heads, shape.dim)
    for splits in (1, 4):
        singles = Singles(given.ints(given.begins), given.ints(lengths), given.ints(given.table), splits)
        found, wanted = torch.full_like(queries, float("nan")), torch.empty_like(queries, dtype=torch.float64)
        do.decode(queries, given.pages, singles, shape.heads, found)
        REFERENCE.decode(queries.double(), given.pages.double(), singles, shape.heads, wanted)
        error = max(error, _error(found, wanted))
    return error, BOUND[dtype]


def prefill(do: Operators, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Result:
    """Chunks with and without context, longer than a tile and shorter; a block of padding is skipped."""
    size = shape.page_tokens
    chunks = [(2, 0), (shape.scale * 70, size), (size, 3 * size - 1), (64, 64), (shape.scale * 129, 0)]
    given = Inputs(shape, dtype, device, seed, [tokens + context for tokens, context in chunks])
    tokens = [tokens for tokens, _ in chunks]
    firsts = [0, *accumulate(tokens)][:-1]
    rows = [[first, *chunk, begin] for first, chunk, begin in zip(firsts, chunks, given.begins, strict=True)]
    block_rows = BLOCK_ROWS[dtype.itemsize]
    tiles = [*blocks(np.asarray(rows), block_rows).tolist(), [-1, 0]]
    keys = given.ints(seen_by(np.asarray(rows), given.table.numpy(), size)).long()
    seen = [tokens + context for tokens, context in chunks]
    row_ends, key_ends = given.ints([0, *accumulate(tokens)]), given.ints([0, *accumulate(seen)])
    packed = Packed(keys // size, keys % size, row_ends, key_ends, max(tokens), max(seen))
    prompts = Prompts(given.ints(rows), given.ints(tiles), block_rows, given.ints(given.table), packed)
    queries = given.normal(sum(tokens), shape.heads.heads, shape.dim)
    found, wanted = torch.full_like(queries, float("nan")), torch.empty_like(queries, dtype=torch.float64)
    do.prefill(queries, given.pages, prompts, shape.heads, found)
    REFERENCE.prefill(queries.double(), given.pages.double(), prompts, shape.heads, wanted)
    return _error(found, wanted), BOUND[dtype]


def move(do: Operators, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Result:
    """A slice of layers and heads of some pages out and in again, bit by bit."""
    given = Inputs(shape, dtype, device, seed, [6 * shape.page_tokens])
    pool = given.normal(*given.pool.shape)
    ids = given.ints(given.table[:4])
    layers, heads = (1, 3), (shape.kv_heads // 2, shape.kv_heads)
    packed = do.gather(pool, ids, layers, heads)
    fresh = torch.zeros_like(pool)
    do.scatter(fresh, ids, layers, heads, packed)
    wanted = torch.zeros_like(pool)
    REFERENCE.scatter(wanted, ids, layers, heads, REFERENCE.gather(pool, ids, layers, heads))
    return max(_error(packed, REFERENCE.gather(pool, ids, layers, heads).double()), _error(fresh, wanted.double())), 0.0


CASES: dict[str, Case] = {
    "norm": norm,
    "gate": gate,
    "product": product,
    "put": put,
    "decode": decode,
    "prefill": prefill,
    "move": move,
}


def _error(found: Tensor, wanted: Tensor) -> float:
    """The worst difference, as a share of what is wanted where that is above 1; infinite where only one of them is a number."""
    difference = (found.double() - wanted).abs() / wanted.abs().clamp(min=1)
    difference[found.isnan() & wanted.isnan()] = 0
    return float(difference.nan_to_num(float("inf")).max())
