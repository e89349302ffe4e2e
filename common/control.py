"""The control sockets: every worker binds a ROUTER, gateways and prefills connect DEALERs. Sends never block.

A letter names the incarnation it is meant for, and another one does not open it: a successor on the same address does receive its
predecessor's mail.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import zmq

from common.errors import MessageError
from common.faults import NONE, MessageFault
from common.logs import get_logger, worth_saying
from common.messages import Incarnation, Letter, ToPeer, ToWorker, decode, encode
from common.pump import Pump, bind, connected, new_socket
from common.refusals import Refusals
from common.seal import Seal

log = get_logger(__name__)

HIGH_WATER = 10_000
MAX_LETTER_BYTES = 32 << 20
MAX_FRAME_BYTES = 2 * MAX_LETTER_BYTES
"""A longer one ends its connection, before anybody could count it."""


class ControlServer:
    """A worker's ROUTER."""

    def __init__(
        self, incarnation: Incarnation, host: str, on_letter: Callable[[Letter], None], seal: Seal | None = None, fault: MessageFault = NONE
    ) -> None:
        self._incarnation = incarnation
        self._on_letter = on_letter
        socket = new_socket(zmq.ROUTER, HIGH_WATER, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if seal is not None:
            seal.serve(socket)
        self.address = bind(socket, host)
        self.refusals = Refusals(log, "a letter")
        """Letters that were not for this incarnation, or not what they should be."""
        self._pump = Pump(socket, self._received, fault)

    def send(self, to: Incarnation, body: ToPeer) -> bool:
        """False if it could not be queued: the peer is not connected or its queue is full. True is no receipt."""
        return self._pump.send([to.encode(), encode(Letter(self._incarnation, to, body))])

    def close(self) -> None:
        self._pump.close()

    def _received(self, frames: list[bytes]) -> None:
        letter = _opened(frames, self._incarnation, self.refusals)
        if letter is None:
            return
        if letter.sender.encode() != frames[0]:
            self.refusals.note("false sender")
            return
        self._on_letter(letter)


class ControlClient:
    """One DEALER per worker that this process talks to."""

    def __init__(
        self, incarnation: Incarnation, on_letter: Callable[[Letter], None], seal: Seal | None = None, fault: MessageFault = NONE
    ) -> None:
        self._incarnation = incarnation
        self._on_letter = on_letter
        self._seal = seal
        self._fault = fault
        self._pumps: dict[Incarnation, Pump] = {}
        self._failures = 0
        """To connect to a peer."""
        self.refusals = Refusals(log, "a letter")

    @property
    def peers(self) -> set[Incarnation]:
        return set(self._pumps)

    def connect(self, peer: Incarnation, address: str) -> bool:
        """A second call for the same peer changes nothing: an incarnation keeps its address. False if it cannot be connected (now)."""
        if peer in self._pumps:
            return True
        try:
            socket = connected(zmq.DEALER, HIGH_WATER, MAX_FRAME_BYTES, address, self._prepare)
        except zmq.ZMQError as error:
            self._failures += 1
            if worth_saying(self._failures):
                log.warning("a peer cannot be connected to", peer=peer, address=address, reason=error, so_far=self._failures)
            return False
        self._pumps[peer] = Pump(socket, partial(self._received, peer), self._fault)
        return True

    def disconnect(self, peer: Incarnation) -> None:
        pump = self._pumps.pop(peer, None)
        if pump is not None:
            pump.close()

    def send(self, peer: Incarnation, body: ToWorker) -> bool:
        """False if the peer is not connected or its queue is full."""
        pump = self._pumps.get(peer)
        return pump is not None and pump.send([encode(Letter(self._incarnation, peer, body))])

    def close(self) -> None:
        for peer in list(self._pumps):
            self.disconnect(peer)

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.ROUTING_ID, self._incarnation.encode())
        if self._seal is not None:
            self._seal.trust(socket)

    def _received(self, peer: Incarnation, frames: list[bytes]) -> None:
        letter = _opened(frames, self._incarnation, self.refusals)
        if letter is None:
            return
        if letter.sender != peer:
            self.refusals.note("false sender", peer=peer)
            return
        self._on_letter(letter)


def _opened(frames: list[bytes], reader: Incarnation, refusals: Refusals) -> Letter | None:
    if len(frames[-1]) > MAX_LETTER_BYTES:
        refusals.note("oversized", bytes=len(frames[-1]))
        return None
    try:
        letter = decode(frames[-1], Letter)
    except MessageError as error:
        refusals.note("malformed", error=error)
        return None
    if letter.to != reader:
        refusals.note("for another")
        return None
    return letter
