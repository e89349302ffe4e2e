"""The pool's pages as carriers and checksums take them: rows of numpy on a CPU, rows of the tensor on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.messages import Shard
from services.transfer.checksum import checksum, keyed_sums
from services.transfer.parts import common_part
from services.transfer.protocol import keyed

GPU_PAGES = 16


class Places:
    """`pages` is uint8 `[pages, page_bytes]`, contiguous and never moved. Raises ValueError for anything else."""

    def __init__(self, pages: Tensor, shard: Shard) -> None:
        if pages.dtype is not torch.uint8 or pages.dim() != 2 or not pages.is_contiguous():
            raise ValueError(f"pages must be contiguous uint8 [pages, page_bytes], not {pages.dtype} {list(pages.shape)}")
        self._rows: Any = pages.numpy() if pages.device.type == "cpu" else pages
        self._device = pages.device
        self._shard = shard
        # On the engine's stream a checksum would wait for every step that is under way; and it goes before their blocks.
        self._stream = torch.cuda.Stream(pages.device, priority=-1) if pages.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._layers = shard.layers[1] - shard.layers[0]
        self._heads = shard.kv_heads[1] - shard.kv_heads[0]
        self.page_bytes = pages.shape[1]
        self.at_once = 1 if self._stream is None else GPU_PAGES
        """Pages that are summed together, or one message more: a core sums them while they are in its cache."""

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

    def quiesce(self) -> None:
        """Return when no copy on the device is under way, whoever has started it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def part(self, other: Shard) -> Shard | None:
        """What this rank and a peer's hold in common of each page."""
        return common_part(self._shard, other)

    def size(self, part: Shard) -> int:
        """Bytes of this part of a page."""
        (first, last), (low, high) = part.layers, part.kv_heads
        return self.page_bytes * (last - first) * (high - low) // (self._layers * self._heads)

    def lies_whole(self, part: Shard) -> bool:
        """Whether this part of a page is one run of bytes: all of this rank's heads. Others are gathered and scattered by a copy."""
        return part.kv_heads == self._shard.kv_heads

    def run(self, pages: Sequence[int]) -> Any:
        """The memory of whole pages that lie together. Raises ValueError if they do not."""
        first, end = pages[0], pages[0] + len(pages)
        if list(pages) != list(range(first, end)):
            raise ValueError(f"pages {list(pages)} do not lie together")
        return self._rows[first:end].reshape(-1)

    def content(self, page: int, part: Shard) -> Any:
        """This part of the page: its memory itself where it lies whole, otherwise a copy in the order layers, keys and values, heads."""
        if self.lies_whole(part):
            first = (part.layers[0] - self._shard.layers[0]) * (self.page_bytes // self._layers)
            return self._rows[page][first : first + self.size(part)]
        with self._own_stream():
            copy = self._strided(page, part).reshape(-1)
            self._complete()
        return copy

    def fill(self, page: int, part: Shard, content: Any) -> None:
        """A part that does not lie whole, from a copy as `content` makes it."""
        with self._own_stream():
            strided = self._strided(page, part)
            strided[:] = content.reshape(strided.shape)
            self._complete()

    def checksum(self, page: int, index: int, part: Shard) -> int:
        """Of this part of what lies in `page` now, keyed as the sequence's page `index`."""
        content = self.content(page, part)
        with self._own_stream():
            return checksum(content, keyed(part, index))

    def checksums(self, pages: Sequence[int], indices: Sequence[int], part: Shard) -> list[int]:
        """Of several pages: on a GPU with one wait for `GPU_PAGES` instead of one for each."""
        if self._stream is None or not self.lies_whole(part):
            return [self.checksum(page, index, part) for page, index in zip(pages, indices, strict=True)]
        found: list[int] = []
        with self._own_stream():
            for first in range(0, len(pages), GPU_PAGES):
                some = slice(first, first + GPU_PAGES)
                found += keyed_sums(self._together(pages[some], part), [keyed(part, index) for index in indices[some]])
        return found

    def spoiled(self, content: Any, at: Sequence[int]) -> Any:
        """A copy of this with one bit of each of these bytes changed, for injected faults."""
        with self._own_stream():
            copy = torch.as_tensor(content).clone()
            copy[list(at)] ^= 1
            self._complete()
        return copy.numpy() if self._device.type == "cpu" else copy

    def _together(self, pages: Sequence[int], part: Shard) -> Any:
        """`[n, bytes]`, a copy unless whole pages are neighbours."""
        first, end = pages[0], pages[0] + len(pages)
        if self.size(part) == self.page_bytes and list(pages) == list(range(first, end)):
            return self._rows[first:end]
        return torch.stack([self.content(page, part) for page in pages])

    def _strided(self, page: int, part: Shard) -> Any:
        layers, heads = (
            slice(inner[0] - outer[0], inner[1] - outer[0])
            for inner, outer in ((part.layers, self._shard.layers), (part.kv_heads, self._shard.kv_heads))
        )
        return self._rows[page].reshape(self._layers, 2, self._heads, -1)[layers, :, heads]

    def _complete(self) -> None:
        """UCX does not know the stream on which a copy is made."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def scratch(self, size: int) -> Any:
        """Memory of the same kind, for messages that nobody wants."""
        empty = torch.empty(max(size, 1), dtype=torch.uint8, device=self._device)
        return empty.numpy() if self._device.type == "cpu" else empty

    def _own_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
