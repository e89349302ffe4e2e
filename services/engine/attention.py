"""Attention over pages, as an attention function of transformers: packed prompts and batched decode in one call.

transformers calls `attend` once a layer with the packed `[1, heads, T, head_dim]`; a `Step` in the keyword `baton_step` says which
tokens are whose. New keys and values go into the pages first; then each prompt chunk attends to its earlier pages and causally to
itself, and the one-token chunks attend to their pages in batches. Plain torch on every device: the reference for faster kernels.

Pages are read and written as rows of the pool seen flat. All KV heads of a page's keys are neighbours there, so one `index_select` of
whole runs brings keys and values in the order the matrix products want. Indexing a layer's strided view costs five times as much
(bf16, 16 sequences of 528 tokens, one core: 0.2 ms against 1 ms and a copy each for keys and values). Grouped heads are one batched
product per KV head: `scaled_dot_product_attention` takes four times as long for decode and 1.3 times for prompts on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from services.engine.pool import Pool

BLOCK_ROWS = {"cpu": 64, "cuda": 512}
"""Query rows of a prompt that are computed at a time: few, so that scores stay in a core's cache; many, where a launch costs more."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A prompt chunk: rows `[first, first + tokens)` of the packed input, behind `context` tokens that lie in pages already."""

    first: int
    tokens: int
    context: int
    runs: Tensor | None
    """int64 `[2, kv_heads, pages]`: see `Pool.runs`; of all its pages up to this chunk's end. None without context."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One-token chunks of about equal length: `count` rows of the packed input from `first` on."""

    first: int
    count: int
    runs: Tensor
    """int64 `[2, count, kv_heads, most pages]`, padded with pages of the same sequence."""
    mask: Tensor
    """float32 `[count, 1, 1, most pages * page_tokens]`: 0 at the positions of each, -inf beyond."""


@dataclass(frozen=True, slots=True)
class Step:
    """One launch as attention sees it."""

    pool: Pool
    slots: Tensor
    """int64 `[2, T * kv_heads]`: where the keys and the values of each token go, see `Pool.slots`."""
    segments: tuple[Segment, ...]
    batches: tuple[Batch, ...]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    baton_step: Step,
    **_: Any,
) -> tuple[Tensor, None]:
    """query `[1, heads, T, head_dim]`, key and value `[1, kv_heads, T, head_dim]` → `[1, T, heads, head_dim]`."""
    step, layer = baton_step, int(module.layer_idx)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query[0], key[0], value[0]
    step.pool.write(layer, step.slots, k, v)
    out = q.new_empty(q.shape[1], q.shape[0], q.shape[2])
    for segment in step.segments:
        rows = slice(segment.first, segment.first + segment.tokens)
        if segment.runs is None:
            keys, values = k[:, rows], v[:, rows]
        else:
            keys, values = step.pool.read(layer, segment.runs)[..., : segment.context + segment.tokens, :]
        out[rows] = prefill(q[:, rows], keys, values, segment.context, scale).transpose(0, 1)
    for batch in step.batches:
        rows = slice(batch.first, batch.first + batch.count)
        keys, values = step.pool.read(layer, batch.runs)
        out[rows] = decode(q[:, rows].transpose(0, 1), keys, values, batch.mask, scale)
    return out.unsqueeze(0), None


def prefill(q: Tensor, k: Tensor, v: Tensor, context: int, scale: float) -> Tensor:
    """q `[heads, T, d]`, k and v `[kv_heads, context + T, d]` → `[heads, T, d]`; row i sees `context + i + 1` positions.

    A block of rows at a time, over no more positions than its last row sees; softmax is in float32.
    """
    heads, tokens, dim = q.shape
    kv_heads = k.shape[0]
    out = torch.empty_like(q)
    block = BLOCK_ROWS[q.device.type]
    for first in range(0, tokens, block):
        rows = min(block, tokens - first)
        seen = context + first + rows
        grouped = q[:, first : first + rows].reshape(kv_heads, -1, dim)
        scores = torch.matmul(grouped, k[:, :seen].transpose(1, 2)).float().mul_(scale).view(kv_heads, -1, rows, seen)
        scores[..., seen - rows :] += _triangle(rows, q.device)
        weights = scores.softmax(-1).to(q.dtype).view(kv_heads, -1, seen)
        out[:, first : first + rows] = torch.matmul(weights, v[:, :seen]).view(heads, rows, dim)
    return out


def decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q `[B, heads, d]`, k and v `[B, kv_heads, n, d]`, mask float32 `[B, 1, 1, n]` → `[B, heads, d]`; softmax is in float32."""
    batch, heads, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, dim)
    scores = torch.add(mask, torch.matmul(grouped, k.transpose(2, 3)), alpha=scale)
    return torch.matmul(scores.softmax(-1).to(q.dtype), v).view(batch, heads, dim)


@lru_cache(maxsize=2048)
def _triangle(rows: int, device: torch.device) -> Tensor:
    """float32 `[rows, rows]`: -inf above the diagonal, 0 elsewhere."""
    return torch.full((rows, rows), float("-inf"), device=device).triu(1)
