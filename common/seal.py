"""The fleet's secret on ZeroMQ: CurveZMQ (https://rfc.zeromq.org/spec/26) between all its processes.

One secret stands for the fleet. The servers' key pair is made from it, so that whoever has the secret can serve and knows whom to trust,
and who has it not can do neither: a server's public key is never sent, and without it no handshake succeeds. Clients take a new pair
each time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from common.errors import SettingError

LEAST_CHARACTERS = 32
MOST_BYTES = 4096


@dataclass(frozen=True, slots=True, repr=False)
class Seal:
    """The servers' key pair, in Z85."""

    public: bytes
    secret: bytes

    def serve(self, socket: zmq.Socket[bytes]) -> None:
        """Before it binds: it will talk to nobody without the secret."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)

    def trust(self, socket: zmq.Socket[bytes]) -> None:
        """Before it connects: it will talk to nobody without the secret."""
        public, secret = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def read_seal(file: str | None) -> Seal | None:
    """None without a file. Raises SettingError, which never holds the secret."""
    if file is None:
        return None
    if not zmq.has("curve"):
        raise SettingError("fleet_secret_file is set, and this build of ZeroMQ has no CURVE")
    try:
        with Path(file).open("rb") as opened:
            secret = opened.read(MOST_BYTES).strip()
    except OSError as error:
        raise SettingError(f"fleet_secret_file is {file!r}; it cannot be read: {error.strerror}") from error
    if len(secret) < LEAST_CHARACTERS:
        raise SettingError(
            f"fleet_secret_file is {file!r}; it must hold {LEAST_CHARACTERS} random characters, as of `openssl rand -hex 32`"
        )
    return seal_of(secret)


def seal_of(secret: bytes) -> Seal:
    own = z85.encode(hashlib.blake2b(secret, digest_size=32, person=b"baton curve 1").digest())
    return Seal(zmq.curve_public(own), own)
