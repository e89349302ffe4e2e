"""Decode steps as CUDA graphs: one for each padded batch size, over static inputs, with one memory pool for all.

A replay costs the host one launch where the same step eagerly costs eight to ten for each layer. Whatever differs between two steps
lies in the inputs: ids, positions, slots, lengths and page tables. Rows beyond the batch have length 0 and no slot: they compute, and touch
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.logs import get_logger
from services.engine.cuda.inputs import ALIGNED, Inputs, slots
from services.engine.cuda.operators import Rows, Singles
from services.engine.cuda.splits import splits
from services.engine.cuda.weights import Weights
from services.engine.launch import Launch
from services.engine.pool import Pool

log = get_logger(__name__)

FIELDS = 6
"""Arrays of one int for each row: ids, positions, slots, where pages begin, lengths, sources."""
PADDING = np.asarray([0, 0, -1, 0, 0, -1], dtype=np.int32)[:, None]
"""A row of no sequence: no slot, no length, no source."""
WARM_UPS = 2
"""Before a capture: kernels are compiled, and libraries allocate what they keep."""
TABLE_INTS = 1 << 22
"""Page ids that the static table holds at most; a step with more runs eagerly."""


def sizes(most: int) -> tuple[int, ...]:
    """Batch sizes to capture: powers of 2, and the largest batch."""
    return (*(1 << i for i in range((most - 1).bit_length())), most)


def padded(batch: int, captured: tuple[int, ...]) -> int:
    """The least captured size that holds the batch."""
    return next(size for size in captured if size >= batch)


class Step:
    """Static inputs of a decode step: pinned memory on the host, its twin on the device, and views of it for each size."""

    def __init__(self, most: int, table: int, device: torch.device) -> None:
        self.most, self.table = most, table
        self._stride = -(-most // ALIGNED) * ALIGNED
        ints = FIELDS * self._stride + table
        self._sent = torch.zeros(ints, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._here: NDArray[np.int32] = self._sent.numpy()
        self._fields = self._here[: FIELDS * self._stride].reshape(FIELDS, self._stride)
        self._fields[:] = PADDING
        self._there = self._sent.to(device, copy=True)

    def views(self, size: int, parts: int) -> Inputs:
        """The inputs of a batch of this size."""
        ids, positions, where, begins, lengths, sources = (self._there[i * self._stride :][:size] for i in range(FIELDS))
        table = self._there[FIELDS * self._stride :]
        return Inputs(Rows(ids, positions, where, sources), 0, None, Singles(begins, lengths, table, parts), None)

    def fill(self, launch: Launch, size: int, page_tokens: int) -> None:
        """Send what a batch padded to `size` reads. The last copy must have left the pinned memory."""
        batch = len(launch.chunks)
        begins, starts = launch.chunks[:, 3], launch.chunks[:, 2]
        sources = -1 if launch.sources is None else launch.sources
        values = launch.ids, launch.positions, slots(launch, page_tokens), begins, starts + 1, sources
        for row, value in zip(self._fields, values, strict=True):
            row[:batch] = value
        self._fields[:, batch:size] = PADDING
        used = FIELDS * self._stride + len(launch.table)
        self._here[FIELDS * self._stride : used] = launch.table
        self._there[:used].copy_(self._sent[:used], non_blocking=True)


class Graphs:
    """One graph for each of `sizes(most_batch)`, captured at once. Belongs to one thread, on whose current stream it replays."""

    def __init__(self, body: Callable[[Inputs], Tensor], weights: Weights, pool: Pool, most_batch: int) -> None:
        device = pool.tensor.device
        self._page_tokens = weights.like.page_tokens
        self._sizes = sizes(most_batch)
        pages = -(-len(weights.angles[0]) // self._page_tokens)
        self._step = Step(most_batch, min(most_batch * pages, TABLE_INTS), device)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        memory, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        began, free = time.monotonic(), torch.cuda.mem_get_info(device)[0]
        for done, size in enumerate(reversed(self._sizes)):  # the largest first: smaller ones fit into what it has allocated
            given = self._step.views(size, splits(size, weights.like.kv_heads, device))
            self._graphs[size] = _captured(body, given, memory, side)
            log.info("decode captured", batch=size, graphs=f"{done + 1}/{len(self._sizes)}", seconds=round(time.monotonic() - began, 1))
        log.info("CUDA graphs ready", mib=(free - torch.cuda.mem_get_info(device)[0]) >> 20, seconds=round(time.monotonic() - began, 1))

    def fits(self, launch: Launch) -> bool:
        """Whether it is a decode step: every chunk is one token and draws."""
        count = len(launch.chunks)
        return count == len(launch.ids) == len(launch.keep) and count <= self._step.most and len(launch.table) <= self._step.table

    def __call__(self, launch: Launch) -> Tensor:
        """Logits `[batch, vocabulary]`, good until the next call."""
        batch = len(launch.chunks)
        size = padded(batch, self._sizes)
        self._copied.synchronize()
        self._step.fill(launch, size, self._page_tokens)
        self._copied.record()
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:batch]


def _captured(body: Callable[[Inputs], Tensor], given: Inputs, memory: Any, side: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The inputs are all padding: warm-ups, on the stream `side`, write no page."""
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            body(given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        logits = body(given)
    return graph, logits
