"""Wall clocks of single processes, to be stepped: a small library (clock.c) before their libc reads the step from a file."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.c")


class Clocks:
    """One clock for each process, all right at first. Nothing of the machine's own is touched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._library = folder / "clock.so"
        self.lacking = self._build()
        """Why clocks cannot be moved here, or None."""

    def env(self, name: str) -> dict[str, str]:
        """For the environment of the process."""
        if self.lacking is not None:
            return {}
        self.step(name, 0.0)
        return {"LD_PRELOAD": str(self._library), "CLOCK_STEP_FILE": str(self._file(name))}

    def step(self, name: str, seconds: float) -> None:
        """From now on that process' wall clock is this far from the machine's."""
        with self._file(name).open("r+b" if self._file(name).exists() else "wb") as file:
            file.write(struct.pack("d", seconds))

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.clock"

    def _build(self) -> str | None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            return "no C compiler"
        done = subprocess.run(
            [compiler, "-shared", "-fPIC", "-O2", "-o", str(self._library), str(SOURCE)], capture_output=True, text=True, timeout=60
        )
        return None if done.returncode == 0 else f"the compiler says {done.stderr.strip().splitlines()[-1:]}"
