"""The tensor that holds a worker's KV: one allocation, `[pages, layers, 2, kv_heads, page_tokens, head_dim]`.

All layers of a page are one run of bytes, so a page, or a run of neighbours, is one message for the transfer. A layer's view is strided.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import StartError
from common.messages import Layout
from services.engine import huge

CGROUP = Path("/sys/fs/cgroup")
RESERVE_BYTES = 256 << 20
"""Left free on the device beside the pool, for activations and for what others allocate."""


class Pool:
    """Never freed and never moved: the transfer reads and writes it by address. Contents are finite from the start."""

    def __init__(self, layout: Layout, pages: int, device: torch.device | str) -> None:
        self.layout = layout
        self.pages = pages
        shape = (pages, layout.layers, 2, layout.kv_heads, layout.page_tokens, layout.head_dim)
        dtype = getattr(torch, layout.dtype)
        try:
            if torch.device(device).type == "cpu":
                self.tensor = huge.zeros(pages * layout.page_bytes).view(dtype).view(shape)
            else:
                refuse_expandable(os.environ)
                self.tensor = torch.zeros(shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            raise StartError(f"no memory for {pages} pages of {layout.page_bytes} bytes: {error}") from error

    @property
    def bytes(self) -> Tensor:
        """uint8 `[pages, page_bytes]`, the same memory."""
        return self.tensor.view(self.pages, -1).view(torch.uint8)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each `[pages, kv_heads, page_tokens, head_dim]`, strided."""
        return self.tensor[:, layer, 0], self.tensor[:, layer, 1]

    def runs(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pages `[..., n]` → `[2, ..., kv_heads, n]`: which rows hold the keys and the values of each KV head in layer 0, with the pool
        seen as rows of `page_tokens * head_dim`."""
        heads = self.layout.kv_heads
        first = pages[..., None, :] * (self.layout.layers * 2 * heads) + np.arange(heads)[:, None]
        return np.stack((first, first + heads))

    def slots(self, pages: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pages and places in them, each `[T]` → `[2, T * kv_heads]`: the same for tokens, with the pool seen as rows of `head_dim`."""
        return (self.runs(pages[:, None])[..., 0] * self.layout.page_tokens + offsets[:, None]).reshape(2, -1)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values `[kv_heads, T, head_dim]` of one layer into their slots."""
        rows = self.tensor.view(-1, self.layout.head_dim)
        shift = layer * 2 * self.layout.kv_heads * self.layout.page_tokens
        for places, new in zip(slots + shift, (keys, values), strict=True):
            rows.index_copy_(0, places, new.transpose(0, 1).reshape(-1, self.layout.head_dim))

    def read(self, layer: int, runs: Tensor) -> Tensor:
        """Runs `[2, ..., kv_heads, n]` → keys and values of one layer, `[2, ..., kv_heads, n * page_tokens, head_dim]`, a copy."""
        rows = self.tensor.view(-1, self.layout.page_tokens * self.layout.head_dim)
        found = rows.index_select(0, (runs + layer * 2 * self.layout.kv_heads).view(-1))
        return found.view(*runs.shape[:-1], -1, self.layout.head_dim)

    def clear(self, pages: list[int]) -> None:
        """Zeros into these pages: what a former owner left there, or a broken transfer, might be no number at all."""
        if pages:
            self.tensor[pages] = 0


def refuse_expandable(environ: Mapping[str, str]) -> None:
    """Raises StartError if torch is told to allocate in segments that grow: no other process can be given a handle of such memory, and
    UCX then copies every page through the host."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in environ.get(name, "").lower().replace(" ", ""):
            raise StartError(f"{name} has expandable_segments: pages in such memory cannot be handed to another process; leave it out")


def fit_pages(layout: Layout, free_bytes: int, fraction: float, needed: int) -> int:
    """Pages that `fraction` of the free memory holds after the reserve, at least `needed`. Raises StartError if those do not fit."""
    left = free_bytes - RESERVE_BYTES
    if left < needed * layout.page_bytes:
        raise StartError(
            f"{left >> 20} MiB are free for KV beside a reserve of {RESERVE_BYTES >> 20}, one request of the largest size needs "
            f"{needed * layout.page_bytes >> 20} MiB: lower max_request_tokens"
        )
    return max(needed, int(left * fraction) // layout.page_bytes)


def free_bytes(device: torch.device) -> int:
    """Of the device, or of the host or container as far as this process may use it. Raises StartError if nobody says."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of freed memory counts as used
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(min(int(line.split()[1]) << 10, _group_free_bytes(CGROUP)))
    raise StartError("free memory cannot be read; set pages")


def _group_free_bytes(group: Path) -> float:
    """What a container's limit (cgroup v2) leaves, the file cache counted as free; infinity without a limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return math.inf
    return math.inf if limit == "max" else int(limit) - used + (int(cached[1]) if cached else 0)
