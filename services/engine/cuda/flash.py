"""Attention of prompts by torch's own FlashAttention, which knows no pages: the tokens that a chunk sees are gathered first.

The copy is small beside the attention of a long prompt (2,048 tokens of Llama-3-8B: 8 MB beside 34 GFLOP a layer). Which of this and
our own kernel is faster is measured at the start (`services/engine/cuda/choose.py`). It takes half precision only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from services.engine.cuda.operators import Heads, Packed

CAUSAL = (-1, 0)
"""Everything before, nothing behind; with more keys than queries the last of both belong together (FlashAttention from 2.1 on)."""
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch 2.11 does not ask, and leaves it to the kernel."""


def takes(queries: Tensor) -> bool:
    return queries.dtype in (torch.bfloat16, torch.float16)


def attend(queries: Tensor, pages: Tensor, packed: Packed, like: Heads) -> Tensor:
    """queries `[T, heads, dim]`, one layer's pages `[pages, 2, kv_heads, page_tokens, dim]` → `[T, heads, dim]`."""
    keys, values = pages[packed.pages, :, :, packed.places].unbind(1)
    ends = packed.row_ends, packed.key_ends, packed.most_rows, packed.most_keys
    found = varlen_attn(queries, keys, values, *ends, scale=like.scale, window_size=CAUSAL, **GROUPED)
    assert isinstance(found, Tensor), "nothing besides was asked for"
    return found
