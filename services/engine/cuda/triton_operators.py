"""The operators as launches of Triton kernels: tile sizes and grids, which depend on nothing but shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from services.engine.cuda import device, flash, kernels
from services.engine.cuda.operators import Heads, Prompts, Rows, Singles
from services.engine.cuda.tiles import Cut, cut

GATE_COLUMNS = 1024
MOVE_ELEMENTS = 2048
WARPS = 4
LINE_BYTES = kernels.LINE.value


@dataclass(frozen=True, slots=True)
class Attention:
    """What one program of an attention kernel has under way."""

    keys: int
    """Of a tile: one of keys and one of values, `stages` times, fit into shared memory."""
    warps: int
    stages: int


FLOAT32 = Attention(32, 4, 2)


@dataclass(frozen=True, slots=True)
class Ways:
    """How launches are made; what was measured says which ways are the fastest."""

    products: bool = True
    """Products of few rows by our own kernel, not the library's."""
    overlap: bool = True
    """Launches begin while those before them end, where the device can."""
    ahead: int = 4
    """Lines of each row of weights that are fetched while a product still waits for the launch before it (with `overlap`)."""
    decode: Attention = Attention(64, 4, 3)
    prefill: Attention = Attention(64, 8, 3)
    """Two groups of four warps, each with half of a block's 128 rows: 64 is what a group's widest product takes (Hopper)."""
    library: bool = False
    """Attention of prompts in half precision by torch (`services/engine/cuda/flash.py`), not by our own kernel."""


class TritonOperators:
    """See `Operators`. Row counts reach the kernels as grids only."""

    def __init__(self, ways: Ways = Ways()) -> None:
        self._ways = ways

    @property
    def packs(self) -> bool:
        return self._ways.library

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return self._norm(x, None, weight, epsilon)

    def add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return self._norm(x, delta, weight, epsilon)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, whole: bool = False) -> Tensor:
        how = self._cut(x, weight, bias, gated=False, whole=whole)
        return linear(x, weight, bias) if how is None else self.multiplied(x, weight, how, gated=False)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        how = self._cut(x, weight, bias, gated=True, whole=True)
        return _gate(linear(x, weight, bias)) if how is None else self.multiplied(x, weight, how, gated=True)

    def multiplied(self, x: Tensor, weight: Tensor, how: Cut, *, gated: bool) -> Tensor:
        """`[T, outputs]`, or several parts of it in float32."""
        (rows, inputs), outputs = x.shape, len(weight) // (2 if gated else 1)
        shape = (how.parts, rows, outputs) if how.parts > 1 else (rows, outputs)
        out = x.new_empty(shape, dtype=torch.float32 if how.parts > 1 else x.dtype)
        overlap, tile, share = self._overlap(x), how.tile, inputs // how.parts
        ahead = self._ways.ahead if overlap["OVERLAP"] and self._ways.ahead * LINE_BYTES <= share * x.element_size() else 0
        kernels.product[(outputs // tile.outputs, how.parts)](
            x,
            weight,
            out,
            rows,
            outputs,
            inputs,
            share,
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            DEPTH=tile.depth,
            GATED=gated,
            AHEAD=ahead,
            num_warps=tile.warps,
            num_stages=tile.stages,
            **overlap,
        )
        return out

    def put(self, qkv: Tensor, pages: Tensor, angles: tuple[Tensor, Tensor], norms: Tensor | None, rows: Rows, like: Heads) -> Tensor:
        tokens, overlap = qkv.shape[-2], self._overlap(qkv)
        queries = pages.new_empty(tokens, like.heads, like.dim)
        kernels.put[(tokens, like.heads + 2 * like.kv_heads)](
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
            PARTS=len(qkv) if qkv.dim() == 3 else 1,
            num_warps=1,
            **overlap,
        )
        return queries

    def prefill(self, queries: Tensor, pages: Tensor, prompts: Prompts, like: Heads, out: Tensor) -> None:
        if self._ways.library and prompts.packed is not None and flash.takes(queries):
            out.copy_(flash.attend(queries, pages, prompts.packed, like))
            return
        tile = self._ways.prefill if queries.element_size() == 2 else FLOAT32
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
            BLOCK=tile.keys,
            PRECISION=_precision(queries),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def decode(self, queries: Tensor, pages: Tensor, singles: Singles, like: Heads, out: Tensor) -> None:
        tile = self._ways.decode if queries.element_size() == 2 else FLOAT32
        splits, group = singles.splits, like.heads // like.kv_heads
        batch, heads, overlap = len(queries), like.heads, self._overlap(queries)
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
            BLOCK=tile.keys,
            SPLITS=splits,
            PRECISION=_precision(queries),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **overlap,
        )
        if splits > 1:
            widths = {"DIM": like.dim, "WIDTH": _width(like), "SPLITS": splits}
            kernels.reduce[(batch * heads,)](parts, heights, out, **widths, num_warps=1, **overlap)

    def gather(self, pages: Tensor, ids: Tensor, layers: tuple[int, int], heads: tuple[int, int]) -> Tensor:
        packed = pages.new_empty(len(ids), layers[1] - layers[0], 2, heads[1] - heads[0], *pages.shape[4:])
        _move(pages, ids, layers, heads, packed, out=True)
        return packed

    def scatter(self, pages: Tensor, ids: Tensor, layers: tuple[int, int], heads: tuple[int, int], packed: Tensor) -> None:
        _move(pages, ids, layers, heads, packed, out=False)

    def _norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
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
            PARTS=0 if delta is None else 1 if delta.dim() == 2 else len(delta),
            num_warps=8 if block > 2048 else WARPS,
            **self._overlap(x),
        )
        return out

    def _cut(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool, whole: bool) -> Cut | None:
        """How our own kernel computes it, or None: the library does."""
        if not self._ways.products or bias is not None or x.element_size() != 2:
            return None
        outputs = len(weight) // (2 if gated else 1)
        return cut(len(x), outputs, x.shape[1], device.about(x.device), gated=gated, whole=whole)

    def _overlap(self, x: Tensor) -> dict[str, bool]:
        """Of a kernel that a decode step launches."""
        if self._ways.overlap and device.can_overlap(x.device):
            return {"OVERLAP": True, "launch_pdl": True}
        return {"OVERLAP": False}


def _gate(both: Tensor) -> Tensor:
    """`[T, 2 * inner]` → `silu(left half) * right half`."""
    inner = both.shape[1] // 2
    out = both.new_empty(len(both), inner)
    kernels.gate[(len(both), triton.cdiv(inner, GATE_COLUMNS))](both, out, WIDTH=inner, BLOCK=GATE_COLUMNS, num_warps=WARPS)
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
