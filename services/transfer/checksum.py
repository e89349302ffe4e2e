"""A page's checksum, keyed by what the page is: two pages that changed places do not verify."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)


def checksum(page: Tensor, key: int) -> int:
    """64 bits over the bytes of `page` (uint8, contiguous), computed where it lies: xxh3 on a CPU, a keyed sum on a GPU."""
    if page.device.type == "cpu":
        return xxhash.xxh3_64_intdigest(page.numpy().data, key)
    return keyed_sum(page, key)


def keyed_sum(page: Tensor, key: int) -> int:
    """Sum over 8-byte words of (word ^ position-and-key weight) * odd weight, modulo 2**64: order and key matter."""
    words = page.view(torch.int64)
    weights = torch.arange(1, words.numel() + 1, device=page.device, dtype=torch.int64) * _PRIME
    signed = key - (1 << 64) if key >= 1 << 63 else key
    return int(((words ^ (weights + signed)) * (weights | 1)).sum().item()) & 0xFFFFFFFFFFFFFFFF
