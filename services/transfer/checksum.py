"""A page's checksum, keyed by what the page is: two pages that changed places do not verify."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import xxhash
from torch import Tensor

_WORD = torch.int64
_MASK = 0xFFFFFFFFFFFFFFFF
_GOLDEN = 0x9E3779B97F4A7C15


def checksum(page: Any, key: int) -> int:
    """64 bits over the bytes of `page`, computed where it lies: xxh3 of a numpy row (CPU), a keyed sum of a CUDA tensor (uint8)."""
    if isinstance(page, Tensor):
        return keyed_sum(page, key)
    return xxhash.xxh3_64_intdigest(page, key)


def keyed_sum(page: Tensor, key: int) -> int:
    """Sum over words of `(word ^ mix(position)) * odd(position)` plus a share of the key, modulo 2**64: a multilinear hash
    (Carter and Wegman), so order counts. Words are 8 bytes where the page divides by 8, else single bytes."""
    return keyed_sums(page[None], [key])[0]


def keyed_sums(pages: Tensor, keys: Sequence[int]) -> list[int]:
    """`keyed_sum` of each row of `[n, bytes]`: a few launches and one wait for all."""
    words = pages.view(_WORD) if pages.shape[1] % 8 == 0 else pages.to(_WORD)
    mixes, odds = _weights(words.shape[1], pages.device)
    totals = ((words ^ mixes) * odds).sum(1).tolist()
    return [(total ^ (key * _GOLDEN)) & _MASK for total, key in zip(totals, keys, strict=True)]


@lru_cache(maxsize=8)
def _weights(words: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pseudo-random mixes and odd multipliers, one per word: the same in every process."""
    generator = torch.Generator().manual_seed(_GOLDEN >> 1)
    limits = torch.iinfo(_WORD)
    drawn = torch.randint(limits.min, limits.max, (2, words), generator=generator, dtype=_WORD)
    drawn[1] |= 1
    return drawn[0].to(device), drawn[1].to(device)
