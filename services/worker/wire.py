"""Messages between the ranks of one worker: tagged structs, each behind its length, over a Unix socket pair that both inherit.

Where the other process ends, however it ends, the socket says so at once.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import TypeVar

import msgspec

from common.errors import MessageError
from common.messages import decode, encode

MOST_BYTES = 256 << 20
"""A longer frame is no message of ours."""
HEAD = struct.Struct("<I")
M = TypeVar("M", bound=msgspec.Struct)


class Wire:
    """One end. Any thread may send, one may receive."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._end.fileno()

    def deadline(self, seconds: float | None) -> None:
        """For each send and receive from now on: TimeoutError."""
        self._end.settimeout(seconds)

    def send(self, message: msgspec.Struct) -> None:
        """Blocks while the other end takes nothing. Raises OSError if it is gone."""
        self.send_frame(framed(message))

    def send_frame(self, frame: bytes) -> None:
        with self._sending:
            self._end.sendall(frame)

    def receive(self, kind: type[M]) -> M:
        """The next message. Raises EOFError if the other end is gone, MessageError for what is none."""
        (size,) = HEAD.unpack(self._exactly(HEAD.size))
        if size > MOST_BYTES:
            raise MessageError(f"a frame of {size} bytes")
        return decode(self._exactly(size), kind)

    def close(self) -> None:
        """Also from another thread than the one that waits for a message: it gets an EOFError."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()

    def _exactly(self, size: int) -> bytes:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            try:
                count = self._end.recv_into(view)
            except ConnectionError:
                count = 0
            if not count:
                raise EOFError("the other end is gone")
            view = view[count:]
        return bytes(buffer)


def framed(message: msgspec.Struct) -> bytes:
    """A message as it goes over the wire."""
    data = encode(message)
    return HEAD.pack(len(data)) + data
