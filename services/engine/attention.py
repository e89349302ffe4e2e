"""Attention over pages, as an attention function of transformers: packed prompts and batched decode in one call.

transformers calls `attend` once a layer with the packed `[1, heads, T, head_dim]`; a `Step` in the keyword `baton_step` says which
tokens are whose. New keys and values go into the pages first; then each prompt chunk attends to its earlier pages and causally to
itself, and all one-token chunks together attend to their pages. Plain torch on every device: the reference for faster kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.pool import Pool


@dataclass(frozen=True, slots=True)
class Segment:
    """A prompt chunk: rows `[first, first + tokens)` of the packed input, behind `context` tokens that lie in `pages` already."""

    first: int
    tokens: int
    context: int
    pages: Tensor
    """int64 `[pages of context + tokens]`."""


@dataclass(frozen=True, slots=True)
class Step:
    """One launch as attention sees it. One-token chunks are the rows behind all segments."""

    pool: Pool
    pages: Tensor
    """int64 `[T]`: the page that takes each token's KV."""
    offsets: Tensor
    """int64 `[T]`: its place in that page."""
    segments: tuple[Segment, ...]
    singles: int
    """Number of one-token chunks."""
    table: Tensor
    """int64 `[singles, most pages]`: their pages, padded with any valid page."""
    beyond: Tensor
    """bool `[singles, 1, 1, most pages * page_tokens]`: positions that are not theirs."""


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
    step = baton_step
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = step.pool.layer(module.layer_idx)
    rows_k, rows_v = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys[step.pages, :, step.offsets] = rows_k
    values[step.pages, :, step.offsets] = rows_v
    out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
    for segment in step.segments:
        rows = slice(segment.first, segment.first + segment.tokens)
        if segment.context:
            k, v = _gathered(keys, segment), _gathered(values, segment)
        else:
            k, v = key[0, :, rows], value[0, :, rows]
        out[rows] = prefill(query[0, :, rows], k, v, segment.context, scale).transpose(0, 1)
    if step.singles:
        first = query.shape[2] - step.singles
        out[first:] = decode(query[0, :, first:].transpose(0, 1), keys, values, step.table, step.beyond, scale)
    return out.unsqueeze(0), None


def prefill(q: Tensor, k: Tensor, v: Tensor, context: int, scale: float) -> Tensor:
    """q `[heads, T, d]`, k and v `[kv_heads, context + T, d]` → `[heads, T, d]`; row i sees `context + i + 1` positions."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    mask = None
    if context:
        rows, columns = q.shape[1], k.shape[1]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(context)
    return functional.scaled_dot_product_attention(
        q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask, is_causal=mask is None, scale=scale
    )[0]


def decode(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, beyond: Tensor, scale: float) -> Tensor:
    """q `[B, heads, d]`, keys and values `[pages, kv_heads, page_tokens, d]`, table `[B, n]` → `[B, heads, d]`.

    Grouped heads are one matrix product per KV head; softmax is in float32.
    """
    batch, heads, dim = q.shape
    kv_heads = keys.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    k = keys[table].transpose(1, 2).reshape(batch, kv_heads, -1, dim)
    scores = torch.matmul(grouped, k.transpose(2, 3)).float().mul_(scale)
    weights = scores.masked_fill_(beyond, float("-inf")).softmax(-1).to(q.dtype)
    v = values[table].transpose(1, 2).reshape(batch, kv_heads, -1, dim)
    return torch.matmul(weights, v).reshape(batch, heads, dim)


def _gathered(cache: Tensor, segment: Segment) -> Tensor:
    """A segment's keys or values from their pages: `[kv_heads, context + tokens, d]`."""
    pages = cache[segment.pages]
    return pages.transpose(0, 1).reshape(cache.shape[1], -1, cache.shape[3])[:, : segment.context + segment.tokens]
