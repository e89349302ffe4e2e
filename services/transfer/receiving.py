"""The receiving half: posted receives by grant, checksums as pages complete, and when an abandoned grant has landed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from common.messages import GrantedRank, Shard
from services.transfer import environment
from services.transfer.checksum import checksum
from services.transfer.protocol import Arrived, Landed, Posted, TransferEvent, keyed, tag

environment.prepare()

import ucxx._lib.libucxx as ucx  # noqa: E402
from ucxx._lib.arr import Array  # noqa: E402


@dataclass(eq=False)
class _Grant:
    number: int
    waiting: deque[tuple[int, int, Any]]
    """(index in the sequence, page, request) not yet completed, in the order of the sequence."""
    sums: list[int] = field(default_factory=list)
    abandoned: bool = False
    failed: bool = False


class Receiver:
    """All grants to one peer, on one UCX worker."""

    def __init__(
        self, worker: ucx.UCXWorker, pages: Tensor, shard: Shard, emit: Callable[[TransferEvent], None], *, checksums: bool
    ) -> None:
        self.worker = worker
        self._rank = GrantedRank(shard, bytes(memoryview(worker.address)))
        self._shard = shard
        self._pages = pages
        self._emit = emit
        self._checksums = checksums
        self._grants: dict[int, _Grant] = {}
        self._received = [0, 0]

    def __contains__(self, grant: int) -> bool:
        return grant in self._grants

    @property
    def grants(self) -> list[int]:
        return list(self._grants)

    @property
    def busy(self) -> bool:
        return bool(self._grants)

    @property
    def counts(self) -> tuple[int, int]:
        """Whole pages received, and their bytes."""
        return (self._received[0], self._received[1])

    def expect(self, grant: int, pages: tuple[int, ...], indices: tuple[int, ...]) -> None:
        waiting: deque[tuple[int, int, Any]] = deque()
        for page, index in zip(pages, indices, strict=True):
            place = Array(_exposed(self._pages[page]))
            waiting.append((index, page, self.worker.tag_recv(place, ucx.UCXXTag(tag(grant, index, self._shard.rank)))))
        self._grants[grant] = _Grant(grant, waiting)
        self._emit(Posted(grant, self._rank))

    def abandon(self, number: int, told: bool) -> bool:
        """Whether the grant is one of ours."""
        grant = self._grants.get(number)
        if grant is None:
            return False
        grant.abandoned = True
        if not told:
            del self._grants[number]
            self._emit(Landed(number))
        return True

    def collect(self) -> None:
        """Take what has completed, page by page."""
        for grant in list(self._grants.values()):
            while grant.waiting and grant.waiting[0][2].completed:
                self._page(grant, *grant.waiting.popleft())
            if not grant.waiting:
                del self._grants[grant.number]
                lost = grant.abandoned or grant.failed
                self._emit(Landed(grant.number) if grant.abandoned else Arrived(grant.number, () if lost else tuple(grant.sums)))

    def _page(self, grant: _Grant, index: int, page: int, request: Any) -> None:
        try:
            request.check_error()
        except Exception:
            grant.failed = True
            return
        if grant.abandoned:
            return
        self._received[0] += 1
        self._received[1] += self._pages.shape[1]
        if self._checksums:
            grant.sums.append(checksum(self._pages[page], keyed(self._shard, index)))

    def ended(self) -> bool:
        """After a cancel: whether no posted receive can complete any more."""
        return all(request.completed for grant in self._grants.values() for _, _, request in grant.waiting)

    def land_all(self) -> None:
        for number in self.grants:
            del self._grants[number]
            self._emit(Landed(number))


def _exposed(page: Tensor) -> Any:
    """What UCXX's Array takes: a buffer on a CPU, the CUDA array interface on a GPU."""
    return page.numpy() if page.device.type == "cpu" else page
