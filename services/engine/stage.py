"""What each rank of a worker does with a launch, and how rank 0 leads them: the launch to all, hidden states from stage to stage, the
rows that are drawn from back to rank 0, which has the output head."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from services.engine.launch import Launch
from services.engine.mesh import Mesh
from services.engine.model import LoadedModel
from services.engine.torch_forward import TorchForward


class Stage:
    """One rank's layers."""

    def __init__(self, loaded: LoadedModel, forward: TorchForward, mesh: Mesh) -> None:
        config = loaded.module.config
        self.forward = forward
        self._mesh = mesh
        self._hidden = config.hidden_size
        self._drawn = getattr(config, "word_embed_proj_dim", config.hidden_size)
        """Width of what the output head takes."""
        self._dtype = loaded.dtype
        self._device = loaded.device
        self._leaving: deque[tuple[dist.Work, Tensor]] = deque()

    def run(self, launch: Launch) -> Tensor | None:
        """Its part of the launch; what is not for another stage is returned: rows for the output head."""
        mesh = self._mesh
        hidden = None
        if not mesh.first:
            hidden = self._empty(len(launch.ids), self._hidden)
            mesh.receive(hidden)
        hidden = self.forward.hidden(launch, hidden)
        if not mesh.last:
            self._leave(mesh.send, hidden)
            return None
        rows = hidden[torch.as_tensor(drawn(launch), device=self._device)]
        if mesh.first:
            return rows
        if mesh.rank == mesh.grid.last:
            self._leave(mesh.send_back, rows)
        return None

    def rows(self, launch: Launch) -> Tensor:
        """On rank 0: what the last stage has made of a launch, in the order of launches."""
        rows = self._empty(len(drawn(launch)), self._drawn)
        self._mesh.receive_back(rows)
        return rows

    def _empty(self, count: int, width: int) -> Tensor:
        return torch.empty(count, width, dtype=self._dtype, device=self._device)

    def _leave(self, send: Callable[[Tensor], dist.Work], rows: Tensor) -> None:
        """No more launches are under way than there are stages: what was sent as many launches ago has been received."""
        rows = rows.contiguous()
        self._leaving.append((send(rows), rows))
        if len(self._leaving) > self._mesh.grid.pp:
            self._leaving.popleft()[0].wait()


class Leader:
    """Rank 0: a forward pass over all ranks. A launch that raises anywhere leaves the ranks out of step: the worker ends, `lost` sees to
    it, as if it had been killed, and its requests go on elsewhere."""

    def __init__(self, stage: Stage, tell: Callable[[Launch], None], lost: Callable[[BaseException], NoReturn]) -> None:
        """`tell`: send a launch to every other rank."""
        self._stage = stage
        self._tell = tell
        self._lost = lost
        self._under_way: deque[tuple[Launch, Tensor | None]] = deque()

    def __call__(self, launch: Launch) -> Tensor:
        """Logits of the launch's `keep` rows `[draws, vocabulary]`."""
        self.start(launch)
        return self.finish()

    def start(self, launch: Launch) -> None:
        """Rank 0's own part; the stages behind it go on by themselves."""
        try:
            self._tell(launch)
            self._under_way.append((launch, self._stage.run(launch)))
        except Exception as error:
            self._lost(error)

    def finish(self) -> Tensor:
        """Logits of the oldest launch under way. Its KV is in place on all ranks then."""
        try:
            launch, rows = self._under_way.popleft()
            logits = self._stage.forward.logits(self._stage.rows(launch) if rows is None else rows)
        except Exception as error:
            self._lost(error)
        return logits[: len(launch.keep)]


def drawn(launch: Launch) -> np.typing.NDArray[np.int64]:
    """Rows that are drawn from, at least one: the last stage has to say when it is done."""
    return launch.keep if len(launch.keep) else np.zeros(1, dtype=np.int64)
