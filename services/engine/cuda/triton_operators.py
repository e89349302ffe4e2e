"""The operators as launches of Triton kernels: tile sizes and grids, which depend on nothing but shapes."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from services.engine.cuda import kernels
from services.engine.cuda.operators import Heads, Prompts, Rows, Singles

GATE_COLUMNS = 1024
MOVE_ELEMENTS = 2048
KEYS = {2: 64, 4: 32}
"""Keys of a tile, by bytes of an element: a tile of keys and one of values, twice or three times, fit into shared memory."""
WARPS, STAGES = 4, {2: 3, 4: 2}
PREFILL_WARPS = 8
"""Two groups of four, each with half of a block's 128 rows: 64 is what a group's widest product takes (Hopper)."""


class TritonOperators:
    """See `Operators`. Row counts reach the kernels as grids only."""

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return _norm(x, None, weight, epsilon)

    def add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return _norm(x, delta, weight, epsilon)

    def gate(self, both: Tensor) -> Tensor:
        inner = both.shape[1] // 2
        out = both.new_empty(len(both), inner)
        kernels.gate[(len(both), triton.cdiv(inner, GATE_COLUMNS))](both, out, WIDTH=inner, BLOCK=GATE_COLUMNS, num_warps=WARPS)
        return out

    def put(self, qkv: Tensor, pages: Tensor, angles: tuple[Tensor, Tensor], norms: Tensor | None, rows: Rows, like: Heads) -> Tensor:
        queries = qkv.new_empty(len(qkv), like.heads, like.dim)
        kernels.put[(len(qkv), like.heads + 2 * like.kv_heads)](
            qkv,
            queries,
            pages,
            *angles,
            qkv if norms is None else norms,
            rows.positions,
            rows.slots,
            pages.stride(0),
            like.epsilon,
            HEADS=like.heads,
            KV_HEADS=like.kv_heads,
            DIM=like.dim,
            HALF=triton.next_power_of_2(like.dim // 2),
            PAGE=like.page_tokens,
            NORMS=norms is not None,
            num_warps=1,
        )
        return queries

    def prefill(self, queries: Tensor, pages: Tensor, prompts: Prompts, like: Heads, out: Tensor) -> None:
        size = queries.element_size()
        kernels.prefill[(len(prompts.blocks), like.heads)](
            queries,
            pages,
            prompts.table,
            prompts.chunks,
            prompts.blocks,
            out,
            pages.stride(0),
            like.scale * math.log2(math.e),
            KV_HEADS=like.kv_heads,
            GROUP=like.heads // like.kv_heads,
            DIM=like.dim,
            WIDTH=_width(like),
            PAGE=like.page_tokens,
            ROWS=prompts.block_rows,
            BLOCK=KEYS[size],
            PRECISION=_precision(queries),
            num_warps=PREFILL_WARPS if size == 2 else WARPS,
            num_stages=STAGES[size],
        )

    def decode(self, queries: Tensor, pages: Tensor, singles: Singles, like: Heads, out: Tensor) -> None:
        size, splits, group = queries.element_size(), singles.splits, like.heads // like.kv_heads
        batch, heads = len(queries), like.heads
        parts = queries.new_empty(batch * heads * splits * like.dim if splits > 1 else 1, dtype=torch.float32)
        heights = queries.new_empty(batch * heads * splits if splits > 1 else 1, dtype=torch.float32)
        kernels.decode[(batch, like.kv_heads, splits)](
            queries,
            pages,
            singles.table,
            singles.begins,
            singles.lengths,
            out,
            parts,
            heights,
            pages.stride(0),
            like.scale * math.log2(math.e),
            KV_HEADS=like.kv_heads,
            GROUP=group,
            ROWS=max(16, triton.next_power_of_2(group)),
            DIM=like.dim,
            WIDTH=_width(like),
            PAGE=like.page_tokens,
            BLOCK=KEYS[size],
            SPLITS=splits,
            PRECISION=_precision(queries),
            num_warps=WARPS,
            num_stages=STAGES[size],
        )
        if splits > 1:
            kernels.reduce[(batch * heads,)](parts, heights, out, DIM=like.dim, WIDTH=_width(like), SPLITS=splits, num_warps=1)

    def gather(self, pages: Tensor, ids: Tensor, layers: tuple[int, int], heads: tuple[int, int]) -> Tensor:
        packed = pages.new_empty(len(ids), layers[1] - layers[0], 2, heads[1] - heads[0], *pages.shape[4:])
        _move(pages, ids, layers, heads, packed, out=True)
        return packed

    def scatter(self, pages: Tensor, ids: Tensor, layers: tuple[int, int], heads: tuple[int, int], packed: Tensor) -> None:
        _move(pages, ids, layers, heads, packed, out=False)


def _norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    kernels.norm[(len(x),)](
        x,
        x if delta is None else delta,
        weight,
        out,
        epsilon,
        WIDTH=x.shape[1],
        BLOCK=block,
        ADDS=delta is not None,
        num_warps=8 if block > 2048 else WARPS,
    )
    return out


def _move(pages: Tensor, ids: Tensor, layers: tuple[int, int], heads: tuple[int, int], packed: Tensor, *, out: bool) -> None:
    count, run = layers[1] - layers[0], packed[0, 0, 0].numel()
    kernels.move[(len(ids), 2 * count, triton.cdiv(run, MOVE_ELEMENTS))](
        pages[:, layers[0] :, :, heads[0] :],
        packed,
        ids,
        *pages.stride()[:3],
        run,
        LAYERS=count,
        BLOCK=MOVE_ELEMENTS,
        OUT=out,
        num_warps=WARPS,
    )


def _width(like: Heads) -> int:
    return max(16, int(triton.next_power_of_2(like.dim)))


def _precision(x: Tensor) -> str:
    """Products of float32 in float32: the tensor cores' tf32 has 11 bits."""
    return "ieee" if x.dtype is torch.float32 else "tf32"
