"""One child process with a log and a ready file, that never outlives its parent."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1
PRIORITY = -5
"""Gateways and Valkey are served first: they are what all requests share."""


def die_with_parent() -> None:
    """In the child, before exec: the kernel kills it when the parent's *thread* that started it ends, so start from the main thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def raise_priority(pid: int) -> None:
    """As far as permitted."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, PRIORITY)


@dataclass(eq=False)
class Child:
    """A process of the system, started by `start` and known by `name`."""

    name: str
    role: str
    module: str
    flags: dict[str, str]
    folder: Path
    within: list[str] = field(default_factory=list)
    """Words before its command, such as those that enter a network namespace; what they start must keep the process id."""
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def ready_file(self) -> Path:
        return self.folder / f"{self.name}.ready"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def facts(self) -> dict[str, Any] | None:
        """What the process says about itself once it is ready."""
        try:
            facts: dict[str, Any] = json.loads(self.ready_file.read_text())
        except (OSError, ValueError):
            return None
        return facts if self.process is not None and facts.get("pid") == self.process.pid else None

    def start(self, env: dict[str, str]) -> None:
        self.ready_file.unlink(missing_ok=True)
        own_path = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        words = [word for name, value in self.flags.items() for word in (f"--{name.replace('_', '-')}", value)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-m", self.module, *words, "--ready-file", str(self.ready_file)],
                env={**os.environ, **env, **self.env, "PYTHONPATH": os.pathsep.join([str(ROOT), *own_path])},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def ending(self) -> str:
        """How it ended, in words."""
        status = self.process.poll() if self.process is not None else None
        if status is not None and status < 0:
            return f"{self.name} was killed by signal {-status}"
        return f"{self.name} ended: {self.last_words()}"

    def last_words(self) -> str:
        """The last line of its log: why it ended."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1] if lines else "it said nothing"
