"""Pages over UCX (through UCXX): one thread that progresses everything, one receiving worker per peer, one endpoint per way out.

A peer's grants are received on a UCX worker of their own. Closing the peer cancels what that worker still expects and destroys it,
together with receives that do not end: nothing it might yet send can land in pages that are granted again. Sends go out by rendezvous
with the receiver reading (`get_zcopy`), where the carrier can, from endpoints with error handling: a killed peer fails them within about
a second.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from common.errors import TransferError
from common.logs import get_logger
from common.messages import GrantedRank, Incarnation, Shard
from services.transfer import environment
from services.transfer.faults import Fault
from services.transfer.inbound import Inbound
from services.transfer.outbound import PUSH_S, Outbound
from services.transfer.places import Places
from services.transfer.protocol import NotPosted, Posted, TransferCounts, TransferEvent
from services.transfer.receiving import Received, Receiver
from services.transfer.sending import Sender

environment.prepare()

import ucxx._lib.libucxx as ucx  # noqa: E402  (after its environment)

log = get_logger(__name__)

SPIN_S = 0.0002
"""The thread looks again without sleeping until nothing has moved for this long: longer than a page takes in shared memory."""
IDLE_WAIT_S = 1.0
LOOK_S = 0.2
"""A thread that does not come to sleep looks after the deadlines this often: one way may be stuck while others are never quiet."""
BUSY_WAIT_S = 0.02
"""The longest sleep while something is on its way: a wake-up that does not come shows by what has moved meanwhile."""
DEAF_WAIT_S = 0.001
"""The same once that has happened. Between containers it always does: UCX wakes a peer in shared memory through a socket that stays inside
its network namespace."""
UNREADY_S = 30.0
CLOSE_S = 3.0
"""A closed peer's receives should have ended by then; those that have not are destroyed with their worker."""


@dataclass(eq=False)
class _Closing:
    receiver: Receiver
    peer: Incarnation
    deadline: float


class UcxTransfer:
    """The Transfer of one rank over `pages` (uint8 `[pages, page_bytes]`, never moved). CUDA pages must be complete when they are pushed:
    UCX does not know streams."""

    def __init__(
        self,
        pages: Tensor,
        shard: Shard,
        on_event: Callable[[TransferEvent], None],
        *,
        checksums: bool = True,
        fault: Fault = Fault(),  # noqa: B008  (frozen)
        push_s: float = PUSH_S,
    ) -> None:
        self._places = Places(pages, shard)
        self._on_event = on_event
        self._checksums = checksums
        self._places.enter()
        self._context = _new_context()
        self._commands: deque[tuple[Callable[..., None], tuple[object, ...]]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._poll.register(self._wake_fd, select.EPOLLIN)
        self._inbound, self._outbound = Inbound(), Outbound(push_s)
        self._received = Received()
        self._receivers: dict[Incarnation, Receiver] = {}
        self._closing: list[_Closing] = []
        self._sender = Sender(self._new_worker(), self._places, self._outbound, self._emit, checksums=checksums, fault=fault)
        self._moved_at = 0.0
        self.looked_at = time.monotonic()
        """When the thread last came round: about once a second, however idle or busy it is."""
        self._asleep = False
        self._overslept = False
        """Whether the last sleep ended by its own time."""
        self._deaf = False
        self._unready_since: float | None = None
        """When a receiver could not be made, and none could since."""
        self._stopping = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name="transfer", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------------------------------------------- from any thread

    @property
    def counts(self) -> TransferCounts:
        received, sender = self._received, self._sender
        failures = received.failures + self._outbound.failures
        return TransferCounts(sender.sent_pages, sender.sent_bytes, received.pages, received.bytes, failures)

    @property
    def transport(self) -> str:
        """Known to a sender once its first page has left."""
        return self._sender.transport

    def expect(
        self,
        peer: Incarnation,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
        sources: tuple[Shard, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        self._command(self._expect, peer, grant, pages, indices, sources, starts)

    def abandon(self, grant: int, *, told: bool) -> None:
        self._command(self._abandon, grant, told)

    def push(
        self,
        peer: Incarnation,
        to: GrantedRank,
        handoff: int,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        self._command(self._sender.push, peer, to, handoff, grant, pages, indices, starts)

    def finish_push(self, handoff: int, grant: int) -> None:
        self._command(self._sender.finish, handoff, grant)

    def flush(
        self,
        peer: Incarnation,
        to: GrantedRank,
        handoff: int,
        grant: int,
        indices: tuple[int, ...],
        starts: tuple[int, ...] = (),
    ) -> None:
        self._command(self._sender.flush, peer, to, handoff, grant, indices, starts)

    def close_peer(self, peer: Incarnation) -> None:
        self._command(self._close_peer, peer)

    def close(self) -> None:
        """Waits for the thread, at most twice CLOSE_S. Raises TransferError if it has not ended by then: it may still write pages."""
        self._stopping = True
        if self._thread.is_alive():
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join(2 * CLOSE_S)
        if self._thread.is_alive():
            raise TransferError("the transfer's thread has not ended")

    def check(self) -> None:
        """Raises TransferError once the thread has died of an error: the worker must not live on without it."""
        if self._error is not None:
            raise TransferError(f"the transfer has ended: {self._error!r}")

    def _command(self, command: Callable[..., None], *arguments: object) -> None:
        self.check()
        if self._stopping:
            return
        self._commands.append((command, arguments))
        if self._asleep:
            os.eventfd_write(self._wake_fd, 1)

    # -------------------------------------------------------------------------------------------------- on its own thread

    def _live(self) -> None:
        try:
            self._places.enter()
            while not self._stopping:
                self._turn()
        except Exception as error:
            self._error = error
            log.exception("the transfer has ended", error)
        finally:
            self._shut()

    def _turn(self) -> None:
        """Commands, one step of everything; then sleep, unless something has moved just now."""
        while self._commands:
            command, arguments = self._commands.popleft()
            command(*arguments)
        moved = self._sender.work()
        for receiver in tuple(self._receivers.values()):
            moved |= receiver.work()
        for closing in tuple(self._closing):
            moved |= closing.receiver.work()
            self._settle(closing)
        now = time.monotonic()
        if moved:
            self._moved_at = now
            if self._overslept and not self._deaf:
                self._deaf = True
                log.info("no wake-ups from a peer, as between containers: looking every millisecond while pages are on their way")
        self._overslept = False
        if not moved and now - self._moved_at > SPIN_S:
            self._sleep(now)
        elif now - self.looked_at > LOOK_S:
            self._look(now)

    def _look(self, now: float) -> None:
        self.looked_at = now
        self._sender.look()

    def _sleep(self, now: float) -> None:
        self._look(now)
        self._asleep = True
        try:
            workers = [self._sender.worker, *(receiver.worker for receiver in self._receivers.values())]
            workers += [closing.receiver.worker for closing in self._closing]
            if self._commands or self._stopping or not all([worker.arm() for worker in workers]):
                return
            wait_s = IDLE_WAIT_S
            if len(self._inbound) or len(self._outbound):
                wait_s = DEAF_WAIT_S if self._deaf else BUSY_WAIT_S
            wait_s = min([wait_s, *(max(closing.deadline - now, 0.01) for closing in self._closing)])
            ready = self._poll.poll(wait_s)
            self._overslept = not ready
            if any(fd == self._wake_fd for fd, _ in ready):
                os.eventfd_read(self._wake_fd)
        finally:
            self._asleep = False

    def _new_worker(self) -> ucx.UCXWorker:
        """A context knows the network cards that were there when it was made: once one of them has gone, no worker can be made of it."""
        try:
            worker = ucx.UCXWorker(self._context)
        except ucx.UCXNoDeviceError as error:
            log.info("a network card has gone: UCX looks for them anew", reason=error)
            self._context = _new_context()  # the old one lives on with its workers
            worker = ucx.UCXWorker(self._context)
        worker.init_blocking_progress_mode()
        self._poll.register(worker.epoll_file_descriptor, select.EPOLLIN)
        return worker

    def _emit(self, events: list[TransferEvent]) -> None:
        for event in events:
            self._on_event(event)

    # ------------------------------------------------------------------------------------------------------- receiving

    def _expect(
        self,
        peer: Incarnation,
        grant: int,
        pages: tuple[int, ...],
        indices: tuple[int, ...],
        sources: tuple[Shard, ...],
        starts: tuple[int, ...],
    ) -> None:
        receiver = self._receivers.get(peer) or self._new_receiver(peer)
        if receiver is None:
            self._emit([NotPosted(grant)])
            return
        receives = receiver.expect(grant, pages, indices, sources, starts)
        self._emit([Posted(grant, (receiver.rank,)), *self._inbound.expect(peer, grant, receives)])

    def _new_receiver(self, peer: Incarnation) -> Receiver | None:
        """None if UCX cannot make one now, as when the process may open no more files. Raises what it raises if it could not for
        `UNREADY_S`: a worker that starts anew may do better."""
        try:
            worker = self._new_worker()
            receiver = Receiver(worker, self._places, self._inbound, self._emit, self._received, checksums=self._checksums)
        except Exception as error:  # UCXX raises bare RuntimeErrors besides its own
            log.warning("nothing can be received from a peer", peer=peer, reason=f"{type(error).__name__}: {error}")
            self._received.failures += 1
            self._unready_since = self._unready_since or time.monotonic()
            if time.monotonic() - self._unready_since > UNREADY_S:
                raise
            return None
        self._unready_since = None
        self._receivers[peer] = receiver
        return receiver

    def _abandon(self, grant: int, told: bool) -> None:
        if not told:
            for receiver in self._receivers.values():
                receiver.forget(grant)
        self._emit(self._inbound.abandon(grant, told=told))

    # --------------------------------------------------------------------------------------------------------- closing

    def _close_peer(self, peer: Incarnation) -> None:
        self._sender.close_peer(peer)
        receiver = self._receivers.pop(peer, None)
        if receiver is not None:
            receiver.close()
            self._emit(self._inbound.close(peer))
            self._closing.append(_Closing(receiver, peer, time.monotonic() + CLOSE_S))

    def _settle(self, closing: _Closing) -> None:
        """A closed receiver goes when nothing it posted can complete any more; its grants have landed by then."""
        receiver = closing.receiver
        gone = receiver.ended and receiver.drained()
        if not gone and time.monotonic() < closing.deadline:
            return
        self._closing.remove(closing)
        self._poll.unregister(receiver.worker.epoll_file_descriptor)
        if not gone:
            receiver.destroy()
            log.warning("receives of a closed peer did not end: destroyed", peer=closing.peer)

    def _shut(self) -> None:
        """Pages are left alone once nothing writes into them; what does not end by the deadline goes with the process."""
        self._sender.close()
        for peer in tuple(self._receivers):
            self._close_peer(peer)
        give_up = time.monotonic() + CLOSE_S
        while (self._closing or not self._sender.closed) and time.monotonic() < give_up:
            self._sender.work()
            self._sender.look()
            for closing in tuple(self._closing):
                closing.receiver.work()
                self._settle(closing)
            self._poll.poll(0.001)
        self._closing.clear()
        self._sender.release()
        del self._context
        self._poll.close()
        os.close(self._wake_fd)


def _new_context() -> ucx.UCXContext:
    return ucx.UCXContext(feature_flags=(ucx.Feature.TAG, ucx.Feature.WAKEUP))
