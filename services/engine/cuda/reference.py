"""The operators in plain torch, sequence by sequence: what the kernels are held against, and what computes where there is no GPU.

Everything is computed in float32, or in float64 if the inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from services.engine.cuda.operators import Heads, Prompts, Rows, Singles


class ReferenceOperators:
    """See `Operators`."""

    packs = False

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return _norm(x, weight, epsilon).to(x.dtype)

    def add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x += delta if delta.dim() == x.dim() else delta.sum(0)
        return self.norm(x, weight, epsilon)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, whole: bool = False) -> Tensor:
        return linear(x, weight, bias)

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        left, right = _wide(linear(x, weight, bias)).chunk(2, -1)
        return (silu(left) * right).to(x.dtype)

    def put(self, qkv: Tensor, pages: Tensor, angles: tuple[Tensor, Tensor], norms: Tensor | None, rows: Rows, like: Heads) -> Tensor:
        every = _wide(qkv if qkv.dim() == 2 else qkv.sum(0)).reshape(qkv.shape[-2], -1, like.dim)
        q, k, v = torch.split(every, [like.heads, like.kv_heads, like.kv_heads], 1)
        if norms is not None:
            q, k = _norm(q, norms[0], like.epsilon), _norm(k, norms[1], like.epsilon)
        cosines, sines = (table[rows.positions.long()][:, None] for table in angles)
        q, k = _turned(q, cosines, sines), _turned(k, cosines, sines)
        there = rows.slots >= 0
        page, place = rows.slots[there].long() // like.page_tokens, rows.slots[there].long() % like.page_tokens
        pages[page, :, :, place] = torch.stack((k, v), 1)[there].to(pages.dtype)
        return q.to(pages.dtype)

    def prefill(self, queries: Tensor, pages: Tensor, prompts: Prompts, like: Heads, out: Tensor) -> None:
        for chunk, begin in prompts.blocks.tolist():
            if chunk >= 0:
                first, tokens, context, at = prompts.chunks[chunk].tolist()
                end = min(begin + prompts.block_rows, tokens)
                rows, seen = slice(first + begin, first + end), context + end
                keys, values = _read(pages, prompts.table[at:], seen, like.page_tokens)
                out[rows] = _attend(queries[rows], keys, values, like.scale).to(out.dtype)

    def decode(self, queries: Tensor, pages: Tensor, singles: Singles, like: Heads, out: Tensor) -> None:
        for row, (at, length) in enumerate(zip(singles.begins.tolist(), singles.lengths.tolist(), strict=True)):
            if length:
                keys, values = _read(pages, singles.table[at:], length, like.page_tokens)
                out[row] = _attend(queries[row : row + 1], keys, values, like.scale)[0].to(out.dtype)
            else:
                out[row] = 0

    def gather(self, pages: Tensor, ids: Tensor, layers: tuple[int, int], heads: tuple[int, int]) -> Tensor:
        return pages[ids.long(), slice(*layers), :, slice(*heads)].contiguous()

    def scatter(self, pages: Tensor, ids: Tensor, layers: tuple[int, int], heads: tuple[int, int], packed: Tensor) -> None:
        pages[ids.long(), slice(*layers), :, slice(*heads)] = packed


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * _wide(weight)


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding, the halves of a head being the two coordinates (as in Llama's checkpoints for transformers)."""
    low, high = x.chunk(2, -1)
    return torch.cat((low * cosines - high * sines, high * cosines + low * sines), -1)


def _read(pages: Tensor, table: Tensor, tokens: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence's first tokens, each `[kv_heads, tokens, dim]`."""
    mine = _wide(pages[table[: -(-tokens // page_tokens)].long()])
    keys, values = mine.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :tokens]
    return keys, values


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """queries `[T, heads, dim]`, the last of `[kv_heads, n, dim]` → `[T, heads, dim]`."""
    tokens, heads, dim = queries.shape
    seen = keys.shape[1]
    grouped = _wide(queries).transpose(0, 1).reshape(keys.shape[0], -1, dim)
    scores = (grouped @ keys.transpose(1, 2) * scale).view(-1, tokens, seen)
    later = torch.ones(tokens, seen, dtype=torch.bool, device=keys.device).triu(seen - tokens + 1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1).view(keys.shape[0], -1, seen)
    return (weights @ values).view(heads, tokens, dim).transpose(0, 1)
