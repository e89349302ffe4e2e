"""Angles of a model's rotary embedding, for every position at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary(module: Any, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the model's own rotary embedding, whatever its scaling: float32 `[positions, turned dimensions / 2]` each, where
    the model is."""
    device = module.model.rotary_emb.inv_freq.device
    places = torch.arange(positions, device=device)[None]
    cos, sin = module.model.rotary_emb(torch.empty(0, dtype=torch.float32, device=device), places)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
