"""What rank 0 of a worker and its other ranks say to each other: over one wire the start and the launches, over the other the transfer."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from msgspec import Struct

from common.messages import GrantedRank, Incarnation, Shard
from services.engine.launch import Ints
from services.engine.launch import Launch as Arrays
from services.transfer.protocol import Arrived, Landed, NotPosted, Posted, PushFailed, Sent

# ---------------------------------------------------------------------------------------------------- start and launches


class Assignment(Struct, frozen=True, tag=True):
    """To a new rank: who it is, and what to load."""

    name: str
    """In its log lines."""
    rank: int
    tp: int
    pp: int
    model: str
    device: str
    dtype: str
    page_tokens: int
    cores: list[int]
    checksums: bool
    fault: str
    log_level: str
    log_format: str


class Loaded(Struct, frozen=True, tag=True):
    """Its weights are in place."""

    free_bytes: int
    """Of its device."""


class Take(Struct, frozen=True, tag=True):
    """Make a pool of so many pages, and meet the other ranks at this file."""

    pages: int
    store: str


class Ready(Struct, frozen=True, tag=True):
    """It waits for launches."""


class Failed(Struct, frozen=True, tag=True):
    """It cannot start, in words; it has ended."""

    reason: str


class Launch(Struct, frozen=True, tag=True):
    """A launch's arrays (services/engine/launch.py), each as its int64 words."""

    ids: bytes
    positions: bytes
    chunks: bytes
    table: bytes
    keep: bytes


ToRank: TypeAlias = Assignment | Take | Launch
FromRank: TypeAlias = Loaded | Ready | Failed


class Order(Struct, frozen=True, tag=True):
    body: Assignment | Take | Launch


class Report(Struct, frozen=True, tag=True):
    body: Loaded | Ready | Failed


def packed(launch: Arrays) -> Order:
    arrays = (launch.ids, launch.positions, launch.chunks, launch.table, launch.keep)
    return Order(Launch(*(array.tobytes() for array in arrays)))


def unpacked(launch: Launch) -> Arrays:
    return Arrays(_ints(launch.ids), _ints(launch.positions), _ints(launch.chunks).reshape(-1, 4), _ints(launch.table), _ints(launch.keep))


def _ints(words: bytes) -> Ints:
    return np.frombuffer(bytearray(words), dtype=np.int64)


# ------------------------------------------------------------------------------------------------------------- transfer


class Expect(Struct, frozen=True, tag=True):
    peer: Incarnation
    grant: int
    pages: tuple[int, ...]
    indices: tuple[int, ...]
    sources: tuple[Shard, ...]
    starts: tuple[int, ...]


class Abandon(Struct, frozen=True, tag=True):
    grant: int
    told: bool


class Push(Struct, frozen=True, tag=True):
    peer: Incarnation
    to: GrantedRank
    handoff: int
    grant: int
    pages: tuple[int, ...]
    indices: tuple[int, ...]
    starts: tuple[int, ...]


class FinishPush(Struct, frozen=True, tag=True):
    handoff: int
    grant: int


class Flush(Struct, frozen=True, tag=True):
    peer: Incarnation
    to: GrantedRank
    handoff: int
    grant: int
    indices: tuple[int, ...]
    starts: tuple[int, ...]


class ClosePeer(Struct, frozen=True, tag=True):
    peer: Incarnation


Command: TypeAlias = Expect | Abandon | Push | FinishPush | Flush | ClosePeer


class Told(Struct, frozen=True, tag=True):
    """To a rank's transfer."""

    command: Expect | Abandon | Push | FinishPush | Flush | ClosePeer


class Heard(Struct, frozen=True, tag=True):
    """From a rank's transfer: an event, and its counts since the start (services/transfer/protocol.py)."""

    event: Posted | NotPosted | Arrived | Landed | Sent | PushFailed
    counts: tuple[int, int, int, int, int]
    transport: str
