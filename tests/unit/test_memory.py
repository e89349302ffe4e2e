"""Workers that start together on one host do not count the same memory twice."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.errors import StartError
from common.messages import Layout
from common.settings import WorkerSettings
from services.engine.grid import Grid
from services.engine.mesh import Mesh
from services.worker import memory, room
from services.worker.ranks import Ranks

LAYOUT = Layout(30, 3, 16, 64, "bfloat16")
MIB = 1 << 20
HOLDER = """
import sys, time
from pathlib import Path
from services.worker.memory import leave
note = leave(Path(sys.argv[1]), 1 << 30)
print("ready", flush=True)
block = bytearray(int(sys.argv[2])) if int(sys.argv[2]) else None
print("touched", flush=True)
sys.stdin.read()
"""


def holder(folder: Path, touched_bytes: int) -> subprocess.Popen[str]:
    """Another process that has left a note of 1 GiB and written to some of it."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(touched_bytes)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["ready", "touched"]
    return process


def test_what_a_neighbour_will_take_counts_until_it_is_taken_or_the_neighbour_dies(tmp_path: Path) -> None:
    assert memory.untouched_bytes(tmp_path) == 0
    with holder(tmp_path, 0) as idle, holder(tmp_path, 300 * MIB) as busy:
        assert memory.untouched_bytes(tmp_path) == pytest.approx(2048 * MIB - 300 * MIB, abs=30 * MIB)
        busy.kill()
        busy.wait()
        assert memory.untouched_bytes(tmp_path) == pytest.approx(1024 * MIB, abs=30 * MIB)
        assert len(list(tmp_path.glob(memory.PATTERN))) == 1
        idle.kill()
    assert memory.untouched_bytes(tmp_path) == 0 and not list(tmp_path.glob(memory.PATTERN))


def test_pools_of_workers_that_start_together_fit_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes half of what the ones before it have left, in whatever order their turns come."""
    free = 1024 * LAYOUT.page_bytes
    monkeypatch.setattr(room, "RESERVE_BYTES", 0)
    monkeypatch.setattr("services.engine.pool.RESERVE_BYTES", 0)
    monkeypatch.setattr(room, "free_bytes", lambda device: free)
    monkeypatch.setattr(room, "notes", lambda: tmp_path)
    monkeypatch.setattr(memory, "_resident_bytes", lambda pid: 0)
    settings = WorkerSettings(memory_fraction=0.5)
    facts = room.Facts(LAYOUT, LAYOUT, 1, torch.device("cpu"), Mesh(Grid(), 0))
    alone = Ranks(settings, Grid(), tmp_path, [[0]], "worker")
    with ThreadPoolExecutor(3) as threads:
        taken = list(threads.map(lambda _: room.allocate(facts, settings, 1, alone), range(3)))
    alone.close()
    assert sorted(pool.pages for pool, _ in taken) == [128, 256, 512]
    for _, found in taken:
        assert found.free_bytes == free and found.pool_bytes <= (free - found.promised_bytes) / 2
        assert found.note is not None
        found.note.close()


def test_a_pool_that_takes_nothing_later_leaves_no_note_and_notes_of_the_dead_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs each start left one more file in /dev/shm, and nobody removed any."""
    monkeypatch.setattr(room, "free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(room, "notes", lambda: tmp_path)
    monkeypatch.setattr(room, "Pool", lambda layout, pages, device: None)
    with holder(tmp_path, 0) as living:
        (tmp_path / "pool-dead").write_text("1 2 3")
        facts = room.Facts(LAYOUT, LAYOUT, 1, torch.device("cuda"), Mesh(Grid(), 0))
        alone = Ranks(WorkerSettings(), Grid(), tmp_path, [[0]], "worker")
        _, found = room.allocate(facts, WorkerSettings(pages=4), 1, alone)
        assert found.note is None and found.promised_bytes == 0
        assert len(list(tmp_path.glob(memory.PATTERN))) == 1, "the living one's"
        living.kill()


def test_a_worker_of_one_rank_leaves_nothing_behind_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one that was killed left an empty folder in the place for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ranks = Ranks(WorkerSettings(), Grid(), tmp_path, [[0]], "worker")
    assert list(tmp_path.iterdir()) == []
    ranks.close()


def test_a_worker_that_hangs_while_it_measures_does_not_hold_up_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TURN_S", 0.1)
    with memory.turn(tmp_path), memory.turn(tmp_path):
        pass


@pytest.mark.parametrize("trick", ["owner", "link", "open", "file"])
def test_a_stranger_s_folder_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trick: str) -> None:
    """/dev/shm is everybody's: who comes first could have made it."""
    folder, elsewhere = tmp_path / "notes", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if trick == "link":
        folder.symlink_to(elsewhere)
    elif trick == "file":
        folder.write_text("")
    else:
        folder.mkdir(mode=0o700)
    if trick == "open":
        folder.chmod(0o770)
    if trick == "owner":
        monkeypatch.setattr(memory.os, "getuid", lambda: 12345)
    with pytest.raises(StartError, match="not a folder of this user alone") as refused, memory.turn(folder):
        pass
    assert "\n" not in str(refused.value) and not list(elsewhere.iterdir())
