"""How the ranks of one worker reach each other while they compute: torch.distributed, gloo on a CPU, NCCL on GPUs.

All ranks run on one host. Only tensors travel here; nothing is pickled.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from services.engine.grid import Grid

WAIT_S = 60.0
"""A rank that waits longer for another in the middle of a launch ends, and the worker with it."""


class Mesh:
    """One rank's view. Used on the thread that computes, after `join`."""

    def __init__(self, grid: Grid, rank: int) -> None:
        self.grid = grid
        self.rank = rank
        self.stage: dist.ProcessGroup | None = None
        """The ranks among which layers of this stage are divided."""
        self._back: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.rank < self.grid.tp

    @property
    def last(self) -> bool:
        """Whether this rank has the last layers."""
        return self.rank >= self.grid.last

    def join(self, store: Path, device: torch.device) -> None:
        """Meet the others, all of whom call this: at a file that none of them has made yet."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=store.as_uri(),
            rank=self.rank,
            world_size=self.grid.ranks,
            timeout=timedelta(seconds=WAIT_S),
        )
        for first in range(0, self.grid.ranks, self.grid.tp):
            group = dist.new_group(list(range(first, first + self.grid.tp)))
            if first <= self.rank < first + self.grid.tp:
                self.stage = group
        if self.grid.pp > 1:
            # Rows that come back must not wait behind hidden states that go forth: a communicator of their own.
            self._back = dist.new_group([0, self.grid.last])

    def receive(self, rows: Tensor) -> None:
        """From the rank with the same heads in the stage before."""
        dist.recv(rows, self.rank - self.grid.tp)

    def send(self, rows: Tensor) -> dist.Work:
        """To the rank with the same heads in the next stage; `rows` must live until the work is done."""
        return _under_way(dist.isend(rows, self.rank + self.grid.tp))

    def send_back(self, rows: Tensor) -> dist.Work:
        """From the last stage to rank 0."""
        return _under_way(dist.isend(rows, 0, group=self._back))

    def receive_back(self, rows: Tensor) -> None:
        dist.recv(rows, self.grid.last, group=self._back)


def _under_way(work: dist.Work | None) -> dist.Work:
    assert work is not None, "a rank sends to itself"
    return work
