"""The pool's pages as carriers and checksums take them: rows of numpy on a CPU, rows of the tensor on a GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from common.messages import Shard
from services.transfer.checksum import checksum
from services.transfer.protocol import keyed


class Places:
    """`pages` is uint8 `[pages, page_bytes]`, contiguous and never moved. Raises ValueError for anything else."""

    def __init__(self, pages: Tensor, shard: Shard) -> None:
        if pages.dtype is not torch.uint8 or pages.dim() != 2 or not pages.is_contiguous():
            raise ValueError(f"pages must be contiguous uint8 [pages, page_bytes], not {pages.dtype} {list(pages.shape)}")
        self._rows: Any = pages.numpy() if pages.device.type == "cpu" else pages
        self._device = pages.device
        self._shard = shard
        # On the engine's stream a checksum would wait for every step that is under way.
        self._stream = torch.cuda.Stream(pages.device) if pages.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.page_bytes = pages.shape[1]

    @property
    def rank(self) -> int:
        return self._shard.rank

    @property
    def shard(self) -> Shard:
        return self._shard

    def enter(self) -> None:
        """Make the device current in the calling thread: a CUDA context must exist there before UCX looks for it."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.cuda.synchronize(self._device)

    def row(self, page: int) -> Any:
        """The page's memory itself."""
        return self._rows[page]

    def checksum(self, page: int, index: int) -> int:
        """Of what lies in `page` now, keyed as the sequence's page `index`."""
        with self._own_stream():
            return checksum(self._rows[page], keyed(self._shard, index))

    def spoiled(self, page: int) -> Any:
        """A copy with one bit changed, for injected faults."""
        with self._own_stream():
            copy = torch.as_tensor(self._rows[page]).clone()
            copy[0] ^= 1
        if self._stream is not None:
            self._stream.synchronize()  # UCX does not know streams
        return copy.numpy() if self._device.type == "cpu" else copy

    def scratch(self, size: int) -> Any:
        """Memory of the same kind, for messages that nobody wants."""
        empty = torch.empty(max(size, 1), dtype=torch.uint8, device=self._device)
        return empty.numpy() if self._device.type == "cpu" else empty

    def _own_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
