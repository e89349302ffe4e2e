"""Host memory that pools have been given and have not touched yet: workers of one host that start together must not count it twice.

A pool on a CPU costs memory only once its pages are written, so that a new worker sees as free what its neighbours will need. Each
worker therefore leaves a note with the size of its pool, in a file that it holds locked while it lives (the kernel unlocks it, however
the worker ends), and takes the notes of living neighbours off what it finds free. On CUDA the pool is real at once: taking turns is
enough, and there is nothing to note. Containers without a common /dev/shm do not see each other's notes; they have limits of their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import StartError
from common.logs import get_logger

log = get_logger(__name__)

TURN_S = 20.0
"""Longest wait for a neighbour that is just measuring; a stopped one must not hold up the host."""
LOOK_S = 0.02
PATTERN = "pool-*"


def notes() -> Path:
    """Where this host's workers of this user leave their notes."""
    shared = Path("/dev/shm")  # noqa: S108
    return (shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())) / f"baton-memory-{os.getuid()}"


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """One worker of the host at a time, from measuring what is free until its note is written.

    Raises StartError where somebody else has made the folder: who owns it could say what is free, or have our files written elsewhere.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    _check_own(folder)
    with open(folder / "turn", "w") as file:
        deadline = time.monotonic() + TURN_S
        while not _locked(file):
            if time.monotonic() > deadline:
                log.warning("another worker of this host has been measuring memory for too long: going on without it")
                break
            time.sleep(LOOK_S)  # a lock of the file system has no event, and a blocking call no deadline
        yield


def _check_own(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o22:
        raise StartError(f"{folder} is not a folder of this user alone: somebody else may have made it; remove it")


def leave(folder: Path, pool_bytes: int) -> IO[str] | None:
    """The note of this process: keep the file open as long as the pool is there. None: a pool that takes nothing later needs no note."""
    if not pool_bytes:
        return None
    file = tempfile.NamedTemporaryFile("w+", dir=folder, prefix="pool-", delete=False)  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(f"{os.getpid()} {pool_bytes} {_resident_bytes(os.getpid())}")
    file.flush()
    return file


def untouched_bytes(folder: Path) -> int:
    """What living workers' pools may still take, by their notes; notes of dead ones are removed, so ask at each start."""
    total = 0
    for path in folder.glob(PATTERN):
        try:
            with open(path) as file:
                if _locked(file):
                    path.unlink(missing_ok=True)
                    continue
                pid, pool, before = (int(word) for word in file.read().split())
        except (OSError, ValueError):
            continue
        total += max(0, pool - max(0, _resident_bytes(pid) - before))
    return total


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _resident_bytes(pid: int) -> int:
    """Of a process in the same PID namespace; 0 where it cannot be seen, as if it had touched nothing yet."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
