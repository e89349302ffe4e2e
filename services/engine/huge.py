"""Memory for big things that are read again and again: zeros in huge pages, beginning where one begins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PAGE_BYTES = 2 << 20


def zeros(size: int) -> Tensor:
    """uint8 `[size]` that costs memory only where it is touched. Raises MemoryError.

    numpy asks the kernel for pages that are zero already (torch would write them), and for huge ones from 4 MiB on, which spare most
    look-ups of addresses, let reads run ahead further than 4 KiB, and are what the transfer's reads from another process need for their
    speed. Not aligned, numpy's memory begins 16 bytes into a cache line: every vector and every row of a tile would lie across two.
    """
    raw = np.zeros(size + PAGE_BYTES, dtype=np.uint8)
    skip = -raw.ctypes.data % PAGE_BYTES
    return torch.from_numpy(raw[skip : skip + size])
