"""Into how many parts the keys of a sequence are divided in decode, so that a small batch keeps the whole device busy."""

from __future__ import annotations

import torch

from services.engine.cuda.device import about

MOST = 32
WAVES = 2
"""Programs for each multiprocessor, at least, while there are parts to be had."""


def splits(batch: int, kv_heads: int, device: torch.device) -> int:
    """A power of 2; it depends on nothing that changes from step to step."""
    due = WAVES * about(device).multiprocessors // max(1, batch * kv_heads)
    return min(MOST, 1 << max(0, due.bit_length() - 1))
