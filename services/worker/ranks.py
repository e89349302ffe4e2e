"""The other ranks of a worker, as processes of rank 0: started, told what to compute and to transfer, and watched.

A rank that ends takes the worker with it: its part of every page and every launch is gone. The others notice that rank 0 has ended by
their wires.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from common.errors import MessageError, StartError
from common.logs import get_logger
from common.messages import decode
from common.service import leave
from common.settings import WorkerSettings
from services.engine.grid import Grid
from services.engine.launch import Launch
from services.transfer.protocol import TransferCounts
from services.worker.orders import Assignment, Command, Failed, Heard, Loaded, Order, Ready, Report, Take, Told, packed
from services.worker.wire import HEAD, MOST_BYTES, M, Wire, framed

log = get_logger(__name__)

START_S = 600.0
"""Loading a large model from a slow disk takes minutes."""
END_S = 10.0
"""A rank that has not ended so long after its wires were closed is killed."""
LAUNCH_S = 60.0
"""A rank that takes no launch for so long is stuck: the worker ends."""


@dataclass(eq=False)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    launches: Wire
    words: socket.socket
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    counts: TransferCounts = TransferCounts()


class Ranks:
    """Ranks 1 and up of a worker; with a grid of one rank there are none, and nothing here does anything."""

    def __init__(self, settings: WorkerSettings, grid: Grid, model: Path, cores: list[list[int]], name: str) -> None:
        """Start them. `cores`: of each rank, rank 0's included."""
        self.grid = grid
        self._folder: Path | None = None
        self._ranks: list[_Rank] = []
        self._closing = False
        for number in range(1, grid.ranks):
            rank = _start(number)
            self._ranks.append(rank)
            assignment = Assignment(
                name=f"{name} rank {number}",
                rank=number,
                tp=grid.tp,
                pp=grid.pp,
                model=str(model),
                device=settings.device,
                dtype=settings.dtype,
                page_tokens=settings.page_tokens,
                cores=cores[number],
                checksums=settings.checksums,
                fault=settings.fault,
                log_level=settings.log_level,
                log_format=settings.log_format,
            )
            rank.launches.send(Order(assignment))

    @property
    def pids(self) -> list[int]:
        """Of the processes, in order of rank from 1."""
        return [rank.process.pid for rank in self._ranks]

    @property
    def store(self) -> Path:
        """The file at which the ranks meet."""
        assert self._folder is not None, "the ranks have not been told to meet"
        return self._folder / "mesh"

    # ----------------------------------------------------------------------------------------------------------- start

    def loaded(self) -> list[int]:
        """Wait until every rank has its weights; the free bytes of each one's device. Raises StartError."""
        return [self._answer(rank, Loaded).free_bytes for rank in self._ranks]

    def take(self, pages: int) -> None:
        """Have them make their pools and meet; rank 0 must meet them now, then wait for `ready`.

        Only now is there a folder to meet in: from here on each of them removes it at its end, should this process be killed.
        """
        if self.grid.ranks > 1:
            self._folder = Path(tempfile.mkdtemp(prefix="baton-ranks-"))
        for rank in self._ranks:
            rank.launches.send(Order(Take(pages, str(self.store))))

    def ready(self) -> None:
        """Wait until every rank waits for launches. Raises StartError."""
        for rank in self._ranks:
            self._answer(rank, Ready)
            rank.launches.deadline(LAUNCH_S)

    def _answer(self, rank: _Rank, kind: type[M]) -> M:
        rank.launches.deadline(START_S)
        try:
            body = rank.launches.receive(Report).body
        except TimeoutError:
            raise StartError(f"rank {rank.number} has not answered within {START_S:g} s") from None
        except (EOFError, OSError, MessageError) as error:
            raise StartError(f"rank {rank.number} ended while starting: {error}") from None
        if isinstance(body, Failed):
            raise StartError(f"rank {rank.number}: {body.reason}")
        if not isinstance(body, kind):
            raise StartError(f"rank {rank.number} says {type(body).__name__} where {kind.__name__} was due")
        return body

    # --------------------------------------------------------------------------------------------------------- serving

    def launch(self, launch: Launch) -> None:
        """To all of them, on the engine's thread. Raises OSError if one is gone."""
        frame = framed(packed(launch))
        for rank in self._ranks:
            rank.launches.send_frame(frame)

    def command(self, command: Command) -> None:
        """To the transfers of all of them, on the event loop."""
        frame = framed(Told(command))
        for rank in self._ranks:
            self._write(rank, frame)

    def command_one(self, number: int, command: Command) -> None:
        self._write(self._ranks[number - 1], framed(Told(command)))

    @property
    def counts(self) -> list[TransferCounts]:
        """Of the transfers of each, as they were at its last event."""
        return [rank.counts for rank in self._ranks]

    async def connect(self) -> None:
        """Before anything is told to their transfers."""
        for rank in self._ranks:
            rank.reader, rank.writer = await asyncio.open_connection(sock=rank.words)

    async def watch(self, heard: Callable[[int, Heard], None]) -> None:
        """Pass on what their transfers say, until cancelled. Ends this process if one of them ends."""
        async with asyncio.TaskGroup() as tasks:
            for rank in self._ranks:
                assert rank.reader is not None, "watched before connected"
                tasks.create_task(self._listen(rank, rank.reader, heard))

    async def _listen(self, rank: _Rank, reader: asyncio.StreamReader, heard: Callable[[int, Heard], None]) -> None:
        while True:
            try:
                (size,) = HEAD.unpack(await reader.readexactly(HEAD.size))
                if size > MOST_BYTES:
                    raise MessageError(f"a frame of {size} bytes")
                word = decode(await reader.readexactly(size), Heard)
            except (asyncio.IncompleteReadError, OSError, MessageError) as error:
                if self._closing:
                    return
                self.lost(RuntimeError(f"rank {rank.number} has ended: {error}"))
            rank.counts = TransferCounts(*word.counts)
            heard(rank.number, word)

    def _write(self, rank: _Rank, frame: bytes) -> None:
        assert rank.writer is not None, "the ranks are not watched yet"
        rank.writer.write(frame)

    # --------------------------------------------------------------------------------------------------------- the end

    def lost(self, error: BaseException) -> NoReturn:
        """From any thread: one rank cannot go on, and so cannot any. No drain: gateways and peers hear no more beats, as if all had been
        killed."""
        log.error("a rank is lost, the worker ends", reason=f"{type(error).__name__}: {error}")
        self._kill()
        self._forget()
        leave(1)

    def close(self) -> None:
        """After the engine has ended: the ranks close their transfers and end by themselves."""
        self._closing = True
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.words.shutdown(socket.SHUT_RDWR)
        for rank in self._ranks:
            _reap(rank)
            rank.launches.close()
            if rank.writer is not None:
                rank.writer.close()
            else:
                rank.words.close()
        self._forget()

    def abort(self) -> None:
        """The start has failed."""
        self._kill()
        self.close()

    def _forget(self) -> None:
        """The others have, unless they were killed."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()


def _reap(rank: _Rank) -> None:
    """Wait for its end, and kill it if that takes too long. One that survives even that, inside a driver, is left: nobody can do more."""
    try:
        rank.process.wait(END_S)
    except subprocess.TimeoutExpired:
        rank.process.kill()
        try:
            rank.process.wait(END_S)
        except subprocess.TimeoutExpired:
            log.error("a rank has been killed and does not end: going on without it", rank=rank.number, pid=rank.process.pid)


def _start(number: int) -> _Rank:
    here, there = socket.socketpair()
    words_here, words_there = socket.socketpair()
    ends = (there.fileno(), words_there.fileno())
    process = subprocess.Popen(
        [sys.executable, "-m", "services.worker", *map(str, ends)], stdin=subprocess.DEVNULL, pass_fds=ends, env=dict(os.environ)
    )
    there.close()
    words_there.close()
    return _Rank(number, process, Wire(here), words_here)


def share_cores(own: list[int], ranks: int) -> list[list[int]]:
    """Disjoint sets for each rank, as even as they come; with more ranks than cores they take turns."""
    return [own[rank::ranks] or [own[rank % len(own)]] for rank in range(ranks)]
