"""A rank that is not the first: it computes what rank 0 says, and moves its share of the pages. It ends when rank 0 does."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import assert_never

import torch

from common import logs
from common.errors import BatonError, MessageError, StartError, TransferError
from common.logs import get_logger
from common.messages import Layout
from common.names import BEAT_S
from common.service import leave
from services.engine.forward import place_rank
from services.engine.grid import Grid
from services.engine.mesh import Mesh
from services.engine.model import LoadedModel
from services.engine.pool import Pool, free_bytes
from services.engine.sharding import cut
from services.engine.stage import Stage
from services.transfer.faults import parse
from services.transfer.protocol import TransferEvent
from services.transfer.ucx import UcxTransfer
from services.worker import memory, orders
from services.worker.orders import Assignment, Command, Failed, Heard, Loaded, Order, Ready, Report, Take, Told
from services.worker.watch import Watch
from services.worker.wire import M, Wire

log = get_logger(__name__)


def serve(launches_fd: int, words_fd: int) -> int:
    """From the assignment to the end of rank 0. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends them to all; rank 0 drains
        signal.signal(number, signal.SIG_IGN)
    launches, words = Wire(socket.socket(fileno=launches_fd)), Words(Wire(socket.socket(fileno=words_fd)))
    threading.Thread(target=words.live, name="words", daemon=True).start()
    try:
        return _serve(launches, words)
    except (EOFError, OSError):
        return 0
    except (BatonError, RuntimeError, ValueError) as error:
        log.error("this rank cannot go on", reason=f"{type(error).__name__}: {error}")
        return 1
    finally:
        words.forget()


def _serve(launches: Wire, words: Words) -> int:
    assignment = _ordered(launches, Assignment)
    logs.set_up(assignment.name, assignment.log_level, assignment.log_format)
    os.sched_setaffinity(0, assignment.cores)
    torch.set_num_threads(len(assignment.cores))
    mesh = Mesh(Grid(assignment.tp, assignment.pp), assignment.rank)
    try:
        _, loaded = part(Path(assignment.model), assignment.device, assignment.dtype, assignment.page_tokens, mesh)
        launches.send(Report(Loaded(free_bytes(loaded.device))))
        take = _ordered(launches, Take)
        words.store = Path(take.store)
        pool = Pool(loaded.layout, take.pages, loaded.device)
        note = memory.leave(memory.notes(), take.pages * loaded.layout.page_bytes if loaded.device.type == "cpu" else 0)
        words.transfer = UcxTransfer(pool.bytes, loaded.shard, words.say, checksums=assignment.checksums, fault=parse(assignment.fault))
        threading.Thread(target=words.watch, args=(Watch(words.transfer),), name="watch", daemon=True).start()
        mesh.join(Path(take.store), loaded.device)
    except (BatonError, RuntimeError) as error:
        launches.send(Report(Failed(str(error))))
        return 1
    stage = stage_of(loaded, pool, mesh)
    launches.send(Report(Ready()))
    with torch.inference_mode(), note or contextlib.nullcontext():
        while True:
            stage.run(orders.unpacked(_ordered(launches, orders.Launch)))


def part(folder: Path, device: str, dtype: str, page_tokens: int, mesh: Mesh) -> tuple[Layout, LoadedModel]:
    """Load a model, keep what this rank computes, and put that on its device; with it the whole model's layout. Raises StartError."""
    from services.engine.loading import load  # transformers takes seconds, and a worker of one rank may do without

    if device == "cuda" and torch.cuda.device_count() < mesh.grid.ranks:
        raise StartError(f"{mesh.grid.ranks} ranks need as many GPUs, torch sees {torch.cuda.device_count()}")
    whole = load(folder, "cpu", dtype, page_tokens)
    loaded = cut(whole, mesh.grid, mesh)
    if device == "cuda":
        own = torch.device("cuda", mesh.rank)
        torch.cuda.set_device(own)
        loaded = replace(loaded, module=loaded.module.to(own), device=own)
    return whole.layout, loaded


def stage_of(loaded: LoadedModel, pool: Pool, mesh: Mesh) -> Stage:
    return Stage(loaded, place_rank(loaded)(pool), mesh)


def _ordered(launches: Wire, kind: type[M]) -> M:
    body = launches.receive(Order).body
    if not isinstance(body, kind):
        raise MessageError(f"{type(body).__name__} where {kind.__name__} was due")
    return body


class Words:
    """This rank's transfer at rank 0's command, which comes only once the rank is ready. Ends the process when rank 0 is gone, whatever
    loads or computes meanwhile."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.transfer: UcxTransfer | None = None
        self.store: Path | None = None
        """Where the ranks meet, once rank 0 has said it."""
        self._ending = False

    def live(self) -> None:
        status = 0
        try:
            while True:
                self._obey(self._wire.receive(Told).command)
        except (EOFError, OSError):
            self._ending = True
            if self.transfer is not None:
                with contextlib.suppress(TransferError):  # its thread ends with the process
                    self.transfer.close()
        except Exception as error:
            log.exception("this rank's transfer cannot go on", error)
            status = 1
        self.forget()
        sys.stderr.flush()
        leave(status)

    def watch(self, watch: Watch) -> None:
        """On a thread of its own. A rank whose transfer can do nothing ends, and the worker with it."""
        while not self._ending:
            time.sleep(BEAT_S)
            try:
                watch.look(time.monotonic())
            except TransferError as error:
                if self._ending:
                    return
                log.error("this rank's transfer cannot go on", reason=str(error))
                self.forget()
                leave(1)

    def forget(self) -> None:
        """Remove the store's folder: rank 0, which made it, may have been killed. From either thread, and again: the ranks end together,
        and whichever ends last has removed it."""
        if self.store is not None:
            shutil.rmtree(self.store.parent, ignore_errors=True)

    def _obey(self, command: Command) -> None:
        transfer = self.transfer
        assert transfer is not None, "a command for a rank that is not ready"
        match command:
            case orders.Expect(peer, grant, pages, indices, sources, starts):
                transfer.expect(peer, grant, pages, indices, sources, starts)
            case orders.Abandon(grant, told):
                transfer.abandon(grant, told=told)
            case orders.Push(peer, to, handoff, grant, pages, indices, starts):
                transfer.push(peer, to, handoff, grant, pages, indices, starts)
            case orders.FinishPush(handoff, grant):
                transfer.finish_push(handoff, grant)
            case orders.Flush(peer, to, handoff, grant, indices, starts):
                transfer.flush(peer, to, handoff, grant, indices, starts)
            case orders.ClosePeer(peer):
                transfer.close_peer(peer)
            case _:
                assert_never(command)

    def say(self, event: TransferEvent) -> None:
        """On the transfer's thread."""
        assert self.transfer is not None, "an event before any command"
        counts = self.transfer.counts
        numbers = (counts.sent_pages, counts.sent_bytes, counts.received_pages, counts.received_bytes, counts.failures)
        self._wire.send(Heard(event, numbers, self.transfer.transport))
