"""A folder for one run, which goes with it; what killed runs have left goes at the next start: there are passwords in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

LOCK = ".lock"


class Scratch:
    """Removed by `cleanup`, or with the object. Its lock is held as long as this process lives."""

    def __init__(self, prefix: str) -> None:
        _tidy(prefix)
        self._folder = tempfile.TemporaryDirectory(prefix=prefix)
        self.path = Path(self._folder.name)
        made = self.path / f"{LOCK}.new"
        self._lock = made.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        made.replace(self.path / LOCK)  # seen by others only once it is held

    def cleanup(self) -> None:
        self._folder.cleanup()
        self._lock.close()


def _tidy(prefix: str) -> None:
    """Remove our folders whose locks nobody holds: a lock goes with its process, however that ends."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # it has no lock, somebody holds it, or it has gone meanwhile
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                with (folder / LOCK).open() as probe:
                    fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
