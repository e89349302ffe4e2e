"""The token socket: gateways bind SUB, each worker connects one XPUB per gateway. Sends never block (protocol rule 6).

An XPUB drops what it sends before the subscription has arrived; so a link counts as open only once that subscription was read, and
what was said before stays in the outbox until a beat reveals it. ZMQ_IMMEDIATE ends the queue with its connection: without it a
connecting XPUB keeps the subscription of a gateway that is gone, and the link would look open for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import zmq

from common.errors import MessageError
from common.faults import NONE, MessageFault
from common.logs import get_logger, worth_saying
from common.messages import Event, Incarnation, Parcel, decode, encode
from common.pump import Pump, bind, connected, new_socket
from common.refusals import Refusals
from common.seal import Seal

log = get_logger(__name__)

HIGH_WATER = 10_000
"""Messages a socket keeps for a slow reader."""
MAX_PARCEL_BYTES = 32 << 20
MAX_FRAME_BYTES = 2 * MAX_PARCEL_BYTES
"""A longer one ends its connection, before anybody could count it."""


class TokenSubscriber:
    """A gateway's end. Parcels come in order per worker."""

    def __init__(self, incarnation: Incarnation, host: str, on_parcel: Callable[[Parcel], None], seal: Seal | None = None) -> None:
        self._incarnation = incarnation
        self._on_parcel = on_parcel
        socket = new_socket(zmq.SUB, HIGH_WATER, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.SUBSCRIBE, incarnation.encode())
        if seal is not None:
            seal.serve(socket)
        self.address = bind(socket, host)
        self.refusals = Refusals(log, "a parcel")
        """Messages that were no parcels for us."""
        self._pump = Pump(socket, self._received)

    def close(self) -> None:
        self._pump.close()

    def _received(self, frames: list[bytes]) -> None:
        if len(frames[-1]) > MAX_PARCEL_BYTES:
            self.refusals.note("oversized", bytes=len(frames[-1]))
            return
        try:
            parcel = decode(frames[-1], Parcel)
        except MessageError as error:
            self.refusals.note("malformed", error=error)
            return
        if parcel.to != self._incarnation:
            self.refusals.note("for another")
            return
        self._on_parcel(parcel)


class _Link:
    """One gateway's XPUB, and whether its subscription is in force. Raises ZMQError if it cannot be connected (now)."""

    def __init__(
        self, gateway: Incarnation, address: str, on_change: Callable[[bool], None], seal: Seal | None, fault: MessageFault
    ) -> None:
        self.topic = gateway.encode()
        self.address = address
        self.open = False
        self._on_change = on_change
        self._seal = seal
        self.pump = Pump(connected(zmq.XPUB, HIGH_WATER, MAX_FRAME_BYTES, address, self._prepare), self._subscription, fault)

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.XPUB_NODROP, 1)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        if self._seal is not None:
            self._seal.trust(socket)

    def _subscription(self, frames: list[bytes]) -> None:
        """The gateway's side subscribed, or (as when it disconnects) does not any more."""
        if frames[0][1:] == self.topic:
            self.open = frames[0][:1] == b"\x01"
            self._on_change(self.open)


class TokenPublisher:
    """A worker's end: links to all gateways it knows. To be used on the event loop's thread only."""

    def __init__(
        self,
        incarnation: Incarnation,
        on_open: Callable[[Incarnation], None] | None = None,
        seal: Seal | None = None,
        fault: MessageFault = NONE,
    ) -> None:
        self._incarnation = incarnation
        self._seal = seal
        self._on_open = on_open
        self._fault = fault
        self._links: dict[Incarnation, _Link] = {}
        self._failures = 0
        """To connect to a gateway."""

    def open(self, gateway: Incarnation, address: str) -> None:
        """Connect to a gateway; a second call with the same address changes nothing, or repeats what did not succeed."""
        link = self._links.get(gateway)
        if link is not None and link.address == address:
            return
        if link is not None:
            self.close(gateway)
        try:
            self._links[gateway] = _Link(gateway, address, partial(self._changed, gateway), self._seal, self._fault)
        except zmq.ZMQError as error:
            self._failures += 1
            if worth_saying(self._failures):
                log.warning("a gateway cannot be connected to", gateway=gateway, address=address, reason=error, so_far=self._failures)

    def knows(self, gateway: Incarnation) -> bool:
        """Whether there is a link to it, in force or not yet."""
        return gateway in self._links

    def is_open(self, gateway: Incarnation) -> bool:
        """Whether the gateway's subscription is in force, so that what is sent can arrive."""
        link = self._links.get(gateway)
        return link is not None and link.open

    def send(self, gateway: Incarnation, events: Sequence[Event]) -> bool:
        """One parcel. False if the link is not open or its queue is full: the caller keeps what it said."""
        link = self._links.get(gateway)
        if link is None or not link.open:
            return False
        return link.pump.send([link.topic, encode(Parcel(self._incarnation, gateway, list(events)))])

    def close(self, gateway: Incarnation) -> None:
        link = self._links.pop(gateway, None)
        if link is not None:
            link.pump.close()

    def close_all(self) -> None:
        for gateway in list(self._links):
            self.close(gateway)

    def _changed(self, gateway: Incarnation, is_open: bool) -> None:
        if is_open and self._on_open is not None:
            self._on_open(gateway)
