"""A ZeroMQ socket on an asyncio loop, for sends that never block and receives that never miss an edge.

ZeroMQ's fd is edge-triggered and any call on the socket may swallow the edge; so the socket is drained when the fd says so *and* soon
after every send.
"""

from __future__ import annotations

import asyncio
import socket as sockets
from collections import deque
from collections.abc import Callable

import zmq

from common.errors import StartError
from common.faults import NONE, MessageFault

BURST = 1000
"""Messages handled before the loop gets a turn for others."""
MOST_HELD = 10_000
MOST_SOCKETS = 16_384
"""One for each peer: ZeroMQ's own 1,023 would bound the fleet."""


class Pump:
    """Owns a socket: received messages go to `on_frames`, in order. To be used on the event loop's thread only."""

    def __init__(self, socket: zmq.Socket[bytes], on_frames: Callable[[list[bytes]], None], fault: MessageFault = NONE) -> None:
        self._socket = socket
        self._on_frames = on_frames
        self._fault = fault
        self._number = 0
        """Of the latest message that was to be sent."""
        self._held: deque[list[bytes]] = deque()
        """By an injected delay."""
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self.drain)
        self._draining = False
        self._scheduled = False
        self._drain_soon()

    def send(self, frames: list[bytes]) -> bool:
        """False if the message could not be queued at once."""
        self._number += 1
        if self._fault.drops(self._number):
            return True
        if self._held or self._fault.delays(self._number):
            return self._hold(frames)
        return self._send(frames)

    def _hold(self, frames: list[bytes]) -> bool:
        if len(self._held) >= MOST_HELD:
            return False
        if not self._held:
            self._loop.call_later(self._fault.delay_s, self._release)
        self._held.append(frames)
        return True

    def _release(self) -> None:
        while self._held:
            self._send(self._held.popleft())

    def _send(self, frames: list[bytes]) -> bool:
        if self._socket.closed:
            return False
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        finally:
            self._drain_soon()
        return True

    def drain(self) -> None:
        """Receive all there is. A handler that sends does not nest; after one that raised, the rest is still received."""
        self._scheduled = False
        if self._draining:
            return
        self._draining = True
        empty = False
        try:
            for _ in range(BURST):
                if self._socket.closed:
                    empty = True
                    return
                try:
                    frames = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    empty = True
                    return
                self._on_frames(frames)
        finally:
            self._draining = False
            if not empty:
                self._drain_soon()

    def _drain_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.drain)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(0)


def new_socket(kind: int, high_water: int, most_bytes: int) -> zmq.Socket[bytes]:
    """A socket with bounded queues and messages that does not linger and reconnects fast. Raises ZMQError if no more can be opened."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)  # heeded before the first socket
    socket: zmq.Socket[bytes] = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, high_water)
    socket.setsockopt(zmq.RCVHWM, high_water)
    socket.setsockopt(zmq.MAXMSGSIZE, most_bytes)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    return socket


def connected(kind: int, high_water: int, most_bytes: int, address: str, prepare: Callable[[zmq.Socket[bytes]], None]) -> zmq.Socket[bytes]:
    """A new socket, prepared and then connected to `address`. Raises ZMQError, leaving none behind."""
    socket = new_socket(kind, high_water, most_bytes)
    try:
        prepare(socket)
        socket.connect(address)
    except zmq.ZMQError:
        socket.close(0)
        raise
    return socket


def bind(socket: zmq.Socket[bytes], host: str) -> str:
    """Bind to a free port of `host` (an address or a name of this machine) and give the address to announce. Raises StartError."""
    try:
        address = sockets.gethostbyname(host)
        if address == "0.0.0.0":  # noqa: S104
            raise OSError("others could not reach it: it must be one address of this machine")
        return f"tcp://{address}:{socket.bind_to_random_port(f'tcp://{address}')}"
    except (OSError, zmq.ZMQError) as error:
        socket.close(0)
        raise StartError(f"host {host!r} cannot be used: {error}") from error
