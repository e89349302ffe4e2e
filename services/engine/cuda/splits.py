"""Into how many parts the keys of a sequence are divided in decode, so that a small batch keeps the whole device busy."""

from __future__ import annotations

from functools import cache

import torch

MOST = 32
WAVES = 2
"""Programs for each multiprocessor, at least, while there are parts to be had."""


def splits(batch: int, kv_heads: int, device: torch.device) -> int:
    """A power of 2; it depends on nothing that changes from step to step."""
    due = WAVES * multiprocessors(device) // max(1, batch * kv_heads)
    return min(MOST, 1 << max(0, due.bit_length() - 1))


@cache
def multiprocessors(device: torch.device) -> int:
    """1 where there is no GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
