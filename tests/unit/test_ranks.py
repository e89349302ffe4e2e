"""The end of a worker's other ranks, as rank 0 sees it."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.settings import WorkerSettings
from services.engine.grid import Grid
from services.worker import ranks as module
from services.worker.ranks import Ranks
from services.worker.wire import Wire


class Unkillable:
    """A process in an uninterruptible sleep, as behind a driver that does not answer."""

    pid = 1

    def __init__(self) -> None:
        self.kills = 0

    def kill(self) -> None:
        self.kills += 1

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is not None, "the event loop would wait for ever"
        raise subprocess.TimeoutExpired("rank", timeout)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unkillable]:
    """Of the one other rank that `Ranks` starts here; temporary files lie in `tmp_path`."""
    process = Unkillable()
    here, there = socket.socketpair()
    words_here, words_there = socket.socketpair()
    monkeypatch.setattr(module, "_start", lambda number: module._Rank(number, process, Wire(here), words_here))  # type: ignore[arg-type]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with there, words_there:
        yield process


def test_a_rank_that_survives_its_kill_does_not_hold_up_the_end(tmp_path: Path, process: Unkillable) -> None:
    ranks = Ranks(WorkerSettings(tp=2), Grid(2), tmp_path, [[0], [0]], "worker")
    ranks.take(1)
    assert len(list(tmp_path.iterdir())) == 1
    ranks.close()
    assert process.kills == 1 and list(tmp_path.iterdir()) == []


def test_there_is_no_store_before_the_ranks_know_of_it(tmp_path: Path, process: Unkillable) -> None:
    """A worker that is killed while it loads, which takes minutes, has nobody who could remove it."""
    ranks = Ranks(WorkerSettings(tp=2), Grid(2), tmp_path, [[0], [0]], "worker")
    assert list(tmp_path.iterdir()) == []
    ranks.abort()


def test_a_store_that_the_others_have_removed_already_is_no_error(tmp_path: Path, process: Unkillable) -> None:
    ranks = Ranks(WorkerSettings(tp=2), Grid(2), tmp_path, [[0], [0]], "worker")
    ranks.take(1)
    ranks.store.parent.rmdir()
    ranks.close()
