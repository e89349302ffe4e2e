"""Pages over UCX (through UCXX): one thread that progresses everything, one receiving worker per peer, one endpoint per way out.

A peer's grants are received on a UCX worker of their own. Closing the peer cancels what that worker still expects and destroys it, so
nothing it might yet send can land in pages that are granted again. Sends go out by rendezvous with the receiver reading
(`get_zcopy`), from endpoints with error handling: a killed peer fails them within about a second.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from common.errors import TransferError
from common.logs import get_logger
from common.messages import GrantedRank, Incarnation, Shard
from services.transfer import environment, faults
from services.transfer.protocol import Landed, PushFailed, TransferCounts, TransferEvent
from services.transfer.receiving import Receiver
from services.transfer.sending import Sender, WayOut

environment.prepare()

import ucxx._lib.libucxx as ucx  # noqa: E402  (after its environment)

log = get_logger(__name__)

BUSY_WAIT_S = 0.001
"""While something is in flight the thread looks again after this long at the latest, event or not."""
IDLE_WAIT_S = 1.0
CLOSE_S = 3.0
"""A closed peer's receives must have ended by then; pages of those that have not are never used again."""


class UcxTransfer:
    """The Transfer of one rank over `pages` (uint8 `[pages, page_bytes]`, never moved)."""

    def __init__(
        self,
        pages: Tensor,
        shard: Shard,
        on_event: Callable[[TransferEvent], None],
        *,
        checksums: bool = True,
        fault: faults.Fault = faults.Fault(),  # noqa: B008  (frozen)
    ) -> None:
        self._pages = pages
        self._shard = shard
        self._on_event = on_event
        self._checksums = checksums
        self._fault = fault
        self._context = ucx.UCXContext(feature_flags=(ucx.Feature.TAG, ucx.Feature.WAKEUP))
        self._commands: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._poll = select.epoll()
        self._poll.register(self._wake_fd, select.EPOLLIN)
        self._receivers: dict[Incarnation, Receiver] = {}
        self._closing: list[tuple[Receiver, float]] = []
        self._sender_worker = self._new_worker()
        self._ways: dict[Incarnation, dict[bytes, WayOut]] = {}
        self._sender = Sender(pages, shard, self._emit, checksums=checksums, fault=fault)
        self._counts = TransferCounts()
        self._transport = ""
        self._stopping = False
        self._thread = threading.Thread(target=self._live, name="transfer", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------------------------------------------- from any thread

    @property
    def counts(self) -> TransferCounts:
        received = [receiver.counts for receiver in list(self._receivers.values())]
        return replace(
            self._sender.counts,
            received_pages=self._counts.received_pages + sum(pages for pages, _ in received),
            received_bytes=self._counts.received_bytes + sum(size for _, size in received),
            failures=self._sender.counts.failures + self._counts.failures,
        )

    @property
    def transport(self) -> str:
        return self._transport

    def expect(self, peer: Incarnation, grant: int, pages: tuple[int, ...], indices: tuple[int, ...]) -> None:
        self._command(self._expect, peer, grant, pages, indices)

    def abandon(self, grant: int, *, told: bool) -> None:
        self._command(self._abandon, grant, told)

    def push(self, peer: Incarnation, to: GrantedRank, handoff: int, grant: int, pages: tuple[int, ...], indices: tuple[int, ...]) -> None:
        self._command(self._push, peer, to, handoff, grant, pages, indices)

    def finish_push(self, handoff: int, grant: int) -> None:
        self._command(self._sender.finish, handoff, grant)

    def flush(self, peer: Incarnation, to: GrantedRank, handoff: int, grant: int, indices: tuple[int, ...]) -> None:
        self._command(self._flush, peer, to, handoff, grant, indices)

    def close_peer(self, peer: Incarnation) -> None:
        self._command(self._close_peer, peer)

    def close(self) -> None:
        self._stopping = True
        os.eventfd_write(self._wake_fd, 1)
        self._thread.join(2 * CLOSE_S)

    def _command(self, command: Callable[..., None], *arguments: object) -> None:
        self._commands.append((command, arguments))
        os.eventfd_write(self._wake_fd, 1)

    # -------------------------------------------------------------------------------------------------- on its own thread

    def _live(self) -> None:
        while not self._stopping:
            try:
                self._turn()
            except Exception as error:
                log.exception("the transfer stumbled", error)
                self._counts = replace(self._counts, failures=self._counts.failures + 1)
        self._shut()

    def _turn(self) -> None:
        """Commands, progress, completions; then sleep until an event, briefly if something is in flight."""
        while self._commands:
            command, arguments = self._commands.popleft()
            command(*arguments)
        self._progress()
        self._settle_closing()
        if self._commands or self._stopping:
            return
        workers = self._workers()
        if all([worker.arm() for worker in workers]):
            busy = self._sender.busy or self._closing or any(receiver.busy for receiver in self._receivers.values())
            for fd, _ in self._poll.poll(BUSY_WAIT_S if busy else IDLE_WAIT_S):
                if fd == self._wake_fd:
                    os.eventfd_read(self._wake_fd)

    def _workers(self) -> list[ucx.UCXWorker]:
        receivers = [*self._receivers.values(), *(receiver for receiver, _ in self._closing)]
        return [self._sender_worker, *(receiver.worker for receiver in receivers)]

    def _progress(self) -> None:
        self._sender_worker.progress()
        self._sender.collect()
        for receiver in self._receivers.values():
            receiver.worker.progress()
            receiver.collect()

    def _new_worker(self) -> ucx.UCXWorker:
        worker = ucx.UCXWorker(self._context)
        worker.init_blocking_progress_mode()
        self._poll.register(worker.epoll_file_descriptor, select.EPOLLIN)
        return worker

    def _emit(self, event: TransferEvent) -> None:
        self._on_event(event)

    # ------------------------------------------------------------------------------------------------------- receiving

    def _expect(self, peer: Incarnation, grant: int, pages: tuple[int, ...], indices: tuple[int, ...]) -> None:
        receiver = self._receivers.get(peer)
        if receiver is None:
            receiver = Receiver(self._new_worker(), self._pages, self._shard, self._emit, checksums=self._checksums)
            self._receivers[peer] = receiver
        receiver.expect(grant, pages, indices)

    def _abandon(self, grant: int, told: bool) -> None:
        for receiver in self._receivers.values():
            if receiver.abandon(grant, told):
                return
        if not any(grant in receiver for receiver, _ in self._closing):
            self._emit(Landed(grant))

    # --------------------------------------------------------------------------------------------------------- sending

    def _way(self, peer: Incarnation, address: bytes) -> WayOut:
        ways = self._ways.setdefault(peer, {})
        way = ways.get(address)
        if way is None:
            way = ways[address] = WayOut(self._sender_worker, address)
            if not self._transport:
                self._transport = transports(self._sender_worker.info)
                log.info("transfer open", peer=peer, transport=self._transport)
        return way

    def _push(self, peer: Incarnation, to: GrantedRank, handoff: int, grant: int, pages: tuple[int, ...], indices: tuple[int, ...]) -> None:
        try:
            self._sender.push(self._way(peer, to.address), peer, to, handoff, grant, pages, indices)
        except TransferError as error:
            self._emit(PushFailed(handoff, grant, str(error)))

    def _flush(self, peer: Incarnation, to: GrantedRank, handoff: int, grant: int, indices: tuple[int, ...]) -> None:
        try:
            self._sender.flush(self._way(peer, to.address), peer, to, handoff, grant, indices)
        except TransferError as error:
            self._emit(PushFailed(handoff, grant, str(error)))

    # --------------------------------------------------------------------------------------------------------- closing

    def _close_peer(self, peer: Incarnation) -> None:
        for way in self._ways.pop(peer, {}).values():
            way.close()
        self._sender.close_peer(peer)
        receiver = self._receivers.pop(peer, None)
        if receiver is not None:
            receiver.worker.cancel_inflight_requests()
            self._closing.append((receiver, time.monotonic() + CLOSE_S))

    def _settle_closing(self) -> None:
        """Closed receivers end when nothing they posted can complete any more; their grants land then."""
        for entry in list(self._closing):
            receiver, give_up_at = entry
            receiver.worker.progress()
            over = receiver.ended()
            if not over and time.monotonic() < give_up_at:
                continue
            self._closing.remove(entry)
            pages, size = receiver.counts
            self._counts = replace(
                self._counts,
                received_pages=self._counts.received_pages + pages,
                received_bytes=self._counts.received_bytes + size,
            )
            self._poll.unregister(receiver.worker.epoll_file_descriptor)
            if over:
                receiver.land_all()
            else:
                log.error("receives of a closed peer do not end: their pages are not used again", grants=receiver.grants)
                self._counts = replace(self._counts, failures=self._counts.failures + 1)

    def _shut(self) -> None:
        for peer in {*self._ways, *self._receivers}:
            self._close_peer(peer)
        give_up = time.monotonic() + CLOSE_S
        while self._closing and time.monotonic() < give_up:
            self._settle_closing()
        self._poll.close()
        os.close(self._wake_fd)


@dataclass(frozen=True, slots=True)
class _Known:
    """What a UCX resource name stands for."""

    word: str
    label: str


_TRANSPORTS = [_Known("cuda_ipc", "cuda_ipc"), _Known("rc_", "rdma"), _Known("dc_", "rdma"), _Known("cma", "cma"),
               _Known("posix", "posix"), _Known("sysv", "sysv"), _Known("tcp", "tcp")]  # fmt: skip


def transports(info: str) -> str:
    """The carriers that UCX's own report on a worker names."""
    found = [known.label for known in _TRANSPORTS if known.word in info]
    return "+".join(dict.fromkeys(found))
