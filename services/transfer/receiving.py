"""The receiving half over UCX: one worker per peer, posted receives, and an end after which nothing can write any more.

UCXX cancels the requests of an endpoint, never those of a worker. So each receiving worker has an endpoint to itself, its *door*,
through which receives are posted; closing the door cancels them, and each is seen to complete. Not one that holds part of a message which
goes by copies (over TCP): UCX waits for the rest, whatever becomes of the sender. The worker is destroyed with it then.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.logs import get_logger
from common.messages import GrantedRank, Shard
from services.transfer import environment
from services.transfer.inbound import Inbound
from services.transfer.parts import alike
from services.transfer.places import Places
from services.transfer.protocol import TransferEvent, tag
from services.transfer.runs import messages

environment.prepare()

import ucxx._lib.libucxx as ucx  # noqa: E402  (after its environment)
from ucxx._lib.arr import Array  # noqa: E402

log = get_logger(__name__)

_ANY = ucx.UCXXTagMask(0)


@dataclass(slots=True)
class Received:
    """Whole pages of grants that were not given up, and their bytes."""

    pages: int = 0
    bytes: int = 0
    failures: int = 0


@dataclass(slots=True)
class _Receive:
    """What one rank of the peer has of a page, or of several that lie together, on its way; through `scratch` where it does not lie whole
    in ours."""

    indices: tuple[int, ...]
    pages: tuple[int, ...]
    source: int
    part: Shard
    scratch: Any
    request: Any


class Receiver:
    """All grants to one peer, on a UCX worker of their own. Used on the transfer's thread only."""

    def __init__(
        self,
        worker: ucx.UCXWorker,
        places: Places,
        book: Inbound,
        emit: Callable[[list[TransferEvent]], None],
        received: Received,
        *,
        checksums: bool,
    ) -> None:
        self.worker = worker
        self._places = places
        self._book = book
        self._emit = emit
        self._received = received
        self._checksums = checksums
        address = worker.address
        self._door = ucx.UCXEndpoint.create_from_worker_address(worker, address, endpoint_error_handling=False)
        self._closed: Any = None
        self._discarded: Any = None
        self._posted: dict[int, deque[_Receive]] = {}
        self.rank = GrantedRank(places.shard, bytes(memoryview(address)))

    def expect(
        self, grant: int, pages: tuple[int, ...], indices: tuple[int, ...], sources: tuple[Shard, ...], starts: tuple[int, ...]
    ) -> int:
        """Post a receive for every message of every source; returns how many. The requests hold their arrays."""
        found: list[tuple[int, int, _Receive]] = []
        for source in sources:
            part = self._places.part(source)
            cuts = messages(indices, starts if alike(self._places.shard, source) else ())
            found += [(cut.start, source.rank, self._post(grant, pages[cut], indices[cut], source.rank, part)) for cut in cuts if part]
        self._posted[grant] = deque(receive for _, _, receive in sorted(found, key=lambda one: one[:2]))
        return len(found)

    def _post(self, grant: int, pages: tuple[int, ...], indices: tuple[int, ...], source: int, part: Shard) -> _Receive:
        number = ucx.UCXXTag(tag(grant, indices[0], source))
        scratch = None if self._places.lies_whole(part) else self._places.scratch(self._places.size(part))
        memory = scratch
        if memory is None:
            memory = self._places.run(pages) if len(pages) > 1 else self._places.content(pages[0], part)
        return _Receive(indices, pages, source, part, scratch, self._door.tag_recv(Array(memory), number))

    def forget(self, grant: int) -> None:
        """Nobody was told of the grant: its receives go (a dropped request is cancelled)."""
        self._posted.pop(grant, None)

    def work(self) -> bool:
        """One step of UCX, then what has completed, checksummed while still in the cache. Whether anything moved."""
        moved = self.worker.progress_once()
        if self._closed is not None:
            self.worker.progress()  # more than a step: cancels what closing the door has only scheduled
        for grant, posted in tuple(self._posted.items()):
            while posted and posted[0].request.completed:
                moved = True
                self._pages(grant, self._completed(posted))
            if not posted:
                del self._posted[grant]
        return bool(moved)

    def close(self) -> None:
        """Cancel what is not matched yet; what is under way ends by itself."""
        if self._closed is None:
            self._closed = self._door.close()

    def destroy(self) -> None:
        """After `close`: the UCX worker goes with whatever has not ended, so nothing can write any more.

        UCXX would not let go of it: a request under way holds its worker, and the worker its requests. So it is destroyed beneath UCXX. The
        objects of both must never be, for they would touch it: they stay for good, a few KB and no file descriptor.
        """
        self._places.quiesce()
        under_way = [receive.request for posted in self._posted.values() for receive in posted]
        for kept in (self.worker, self._door, self._closed, self._discarded, under_way):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
        ctypes.CDLL("libucp.so.0", mode=os.RTLD_NOLOAD).ucp_worker_destroy(ctypes.c_void_p(self.worker.handle))
        os.close(self.worker.epoll_file_descriptor)
        for grant, posted in self._posted.items():
            for receive in posted:
                self._emit(self._book.completed(grant, {}, whole=False, source=receive.source))
        self._posted.clear()

    @property
    def ended(self) -> bool:
        """After `close`: no posted receive can write any more."""
        return not self._posted

    def drained(self) -> bool:
        """After `ended`: what has come for nobody is received into scratch, so that the worker can be destroyed and its sender goes on."""
        if self._discarded is not None and not self._discarded.completed:
            return False
        probe = self.worker.tag_probe(ucx.UCXXTag(0), _ANY, True)
        if not probe.matched:
            return bool(self._closed.completed)
        self._discarded = self.worker.tag_recv_with_handle(Array(self._places.scratch(probe.length)), probe)
        return False

    def _completed(self, posted: deque[_Receive]) -> list[_Receive]:
        """The next that have completed, of one source: as many as are summed at once."""
        found = [posted.popleft()]
        pages = len(found[0].pages)
        while posted and posted[0].request.completed and posted[0].part == found[0].part:
            pages += len(posted[0].pages)
            if pages > self._places.at_once:
                break
            found.append(posted.popleft())
        return found

    def _pages(self, grant: int, receives: list[_Receive]) -> None:
        wanted = self._book.wanted(grant)
        whole = [receive for receive in receives if receive.request.status == 0] if wanted else []
        for receive in whole:
            self._received.pages += len(receive.pages)
            self._received.bytes += self._places.size(receive.part) * len(receive.pages)
            if receive.scratch is not None:
                self._places.fill(receive.pages[0], receive.part, receive.scratch)
        sums: dict[int, int] = {}
        if whole and self._checksums:
            indices = [index for receive in whole for index in receive.indices]
            pages = [page for receive in whole for page in receive.pages]
            sums = dict(zip(indices, self._places.checksums(pages, indices, whole[0].part), strict=True))
        for receive in receives:
            status = receive.request.status
            if wanted and status != 0:
                self._received.failures += 1
                log.warning("pages did not arrive", grant=grant, pages=receive.indices, status=status)
            own = {index: sums[index] for index in receive.indices if index in sums}
            self._emit(self._book.completed(grant, own, whole=status == 0, source=receive.source))
