"""Memory for big things that are read again and again: zeros in huge pages, beginning where one begins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PAGE_BYTES = 2 << 20


def zeros(size: int) -> Tensor:
    """uint8 `[size]` that costs memory only where it is touched. Raises MemoryError.

    numpy asks the kernel for pages that are zero already (torch would write them), and for huge ones from 4 MiB on. They spare the processor
    most look-ups of addresses, and reads ahead do not stop at every 4 KiB. Without the alignment numpy's memory begins 16 bytes into a
    cache line, so that every vector and every row of a tile lies across two of them.
    """
    raw = np.zeros(size + PAGE_BYTES, dtype=np.uint8)
    skip = -raw.ctypes.data % PAGE_BYTES
    return torch.from_numpy(raw[skip : skip + size])
