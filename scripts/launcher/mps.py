"""NVIDIA's MPS daemon of one system, for workers that share a card within bounds; it ends with the system.

It runs in the foreground as a child of ours, with pipes and logs in the system's folder, so that it touches nobody else's. The card's
compute mode stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from scripts.launcher.child import die_with_parent
from services.worker.mps import PIPES, listening

BINARY = "nvidia-cuda-mps-control"
DRIVER = "/usr/local/nvidia/bin"
"""Where some hosts mount the driver's programs."""
LOGS = "CUDA_MPS_LOG_DIRECTORY"
START_S = 10.0
QUIT_S = 10.0


def wanted(device: str, flags: list[Mapping[str, str]]) -> bool:
    """Whether these workers need one: several share a card (they leave it to torch, or name the same one), and one of them is bounded.

    Not otherwise: under MPS the death of one process can be that of its neighbours.
    """
    places = [one.get("gpu", "none") for one in flags]
    shared = any(place != "auto" and places.count(place) > 1 for place in places)
    return device == "cuda" and shared and any(int(one.get("gpu_percent", "100")) < 100 for one in flags)


def binary() -> str | None:
    """The daemon's and its control's, where the driver brings it."""
    return shutil.which(BINARY, path=f"{os.environ.get('PATH', os.defpath)}:{DRIVER}")


class Mps:
    """The daemon. `failure` says why it does not run, where it does not."""

    def __init__(self, folder: Path) -> None:
        self.pipes, self._logs = folder / "mps", folder / "mps-logs"
        self.failure: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """Of the workers: none where it does not run."""
        return {} if self.failure is not None or self._process is None else {PIPES: str(self.pipes)}

    @property
    def _own(self) -> dict[str, str]:
        return {**os.environ, PIPES: str(self.pipes), LOGS: str(self._logs)}

    def start(self) -> bool:
        """Whether it runs. Start it from the main thread: it ends with the thread that started it."""
        found = binary()
        if found is None:
            self.failure = f"there is no {BINARY}"
            return False
        for folder in (self.pipes, self._logs):
            folder.mkdir(exist_ok=True)
        with (self._logs / "output.log").open("wb") as log:
            self._process = subprocess.Popen(
                [found, "-f"],
                env=self._own,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up and self._process.poll() is None:
            if listening(self.pipes):
                return True
            time.sleep(0.05)
        self.stop()
        self.failure = f"{BINARY} does not start: {self._last_words()}"
        return False

    def stop(self) -> None:
        """After its clients have ended: with its server, which a kill alone would leave."""
        if self._process is None:
            return
        if self._process.poll() is None:
            try:
                subprocess.run(
                    [binary() or BINARY],
                    input=b"quit\n",
                    env=self._own,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=QUIT_S,
                )
                self._process.wait(QUIT_S)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()
        self._process = None

    def _last_words(self) -> str:
        lines = (self._logs / "output.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
