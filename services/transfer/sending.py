"""The sending half: endpoints to peers, pages under way by handoff, and when all of a grant have left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from common.errors import TransferError
from common.messages import GrantedRank, Incarnation, Shard
from services.transfer import environment
from services.transfer.checksum import checksum
from services.transfer.faults import Fault
from services.transfer.protocol import PushFailed, Sent, TransferCounts, TransferEvent, keyed, tag

environment.prepare()

import ucxx._lib.libucxx as ucx  # noqa: E402
from ucxx._lib.arr import Array  # noqa: E402


class WayOut:
    """An endpoint to one address of a peer. Raises TransferError where UCX raises."""

    def __init__(self, worker: ucx.UCXWorker, address: bytes) -> None:
        try:
            self._endpoint = ucx.UCXEndpoint.create_from_worker_address(
                worker, ucx.UCXAddress.create_from_buffer(address), endpoint_error_handling=True
            )
        except Exception as error:
            raise TransferError(f"no endpoint: {error}") from error

    def send(self, page: Tensor, number: int) -> Any:
        try:
            self._endpoint.raise_on_error()
            return self._endpoint.tag_send(Array(page.numpy() if page.device.type == "cpu" else page), ucx.UCXXTag(number))
        except Exception as error:
            raise TransferError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._endpoint.close()


@dataclass(eq=False)
class _Push:
    peer: Incarnation
    handoff: int
    grant: int
    under_way: deque[Any] = field(default_factory=deque)
    sums: dict[int, int] = field(default_factory=dict)
    finished: bool = False
    held: list[Any] = field(default_factory=list)
    """Buffers that must outlive their sends."""


class Sender:
    """All pushes of one rank, by (handoff, grant)."""

    def __init__(self, pages: Tensor, shard: Shard, emit: Callable[[TransferEvent], None], *, checksums: bool, fault: Fault) -> None:
        self._pages = pages
        self._shard = shard
        self._emit = emit
        self._checksums = checksums
        self._fault = fault
        self._number = 0
        self._pushes: dict[tuple[int, int], _Push] = {}
        self._flushes: deque[Any] = deque()
        self._nothing = torch.zeros(1, dtype=torch.uint8, device=pages.device)
        self.counts = TransferCounts()

    @property
    def busy(self) -> bool:
        return bool(self._pushes) or bool(self._flushes)

    def push(
        self,
        way: WayOut,
        peer: Incarnation,
        to: GrantedRank,
        handoff: int,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
    ) -> None:
        push = self._pushes.setdefault((handoff, grant), _Push(peer, handoff, grant))
        for page, index in zip(pages, indices, strict=True):
            content = self._pages[page]
            if self._checksums:
                push.sums[index] = checksum(content, keyed(self._shard, index))
            self._number += 1
            struck = self._fault.strikes(self._number)
            if struck == "fail":
                self._fail(push, "an injected fault")
                return
            if struck == "stall":
                push.under_way.append(None)
                continue
            if struck == "corrupt":
                content = content.clone()
                content[0] ^= 1
                push.held.append(content)
            try:
                push.under_way.append(way.send(content, tag(grant, index, to.shard.rank)))
            except TransferError as error:
                self._fail(push, str(error))
                return
            self.counts = replace(self.counts, sent_pages=self.counts.sent_pages + 1, sent_bytes=self.counts.sent_bytes + content.numel())

    def finish(self, handoff: int, grant: int) -> None:
        push = self._pushes.get((handoff, grant))
        if push is not None:
            push.finished = True

    def flush(self, way: WayOut, peer: Incarnation, to: GrantedRank, handoff: int, grant: int, indices: tuple[int, ...]) -> None:
        """One byte for each receive that would otherwise wait for ever."""
        self._pushes.pop((handoff, grant), None)
        for index in indices:
            self._flushes.append(way.send(self._nothing, tag(grant, index, to.shard.rank)))

    def collect(self) -> None:
        """Take what has left; report pushes of which everything has, and those that failed."""
        while self._flushes and self._flushes[0].completed:
            self._flushes.popleft()
        for push in list(self._pushes.values()):
            while push.under_way and push.under_way[0] is not None and push.under_way[0].completed:
                request = push.under_way.popleft()
                try:
                    request.check_error()
                except Exception as error:
                    self._fail(push, f"{type(error).__name__}: {error}")
                    break
            else:
                if push.finished and not push.under_way:
                    del self._pushes[(push.handoff, push.grant)]
                    self._emit(Sent(push.handoff, push.grant, tuple(push.sums[index] for index in sorted(push.sums))))

    def close_peer(self, peer: Incarnation) -> None:
        for push in [push for push in self._pushes.values() if push.peer == peer]:
            self._fail(push, "the peer was closed")

    def _fail(self, push: _Push, reason: str) -> None:
        if self._pushes.pop((push.handoff, push.grant), None) is not None:
            self.counts = replace(self.counts, failures=self.counts.failures + 1)
            self._emit(PushFailed(push.handoff, push.grant, reason))
