"""A whole system as child processes of this one: for the demo, the tests and the chaos runs."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from scripts.launcher.child import Child, raise_priority
from scripts.launcher.mps import Mps, wanted
from scripts.launcher.scratch import Scratch
from scripts.launcher.valkey import Valkey

READY_S = 120.0
STOP_S = 25.0
LOOK_S = 0.05


class ClusterError(Exception):
    """The system cannot be started: one line saying which process and why."""


@dataclass(frozen=True)
class Shape:
    """What runs. `colocated` workers serve both phases; with them prefill and decode are usually 0."""

    model: Path
    prefill: int = 1
    decode: int = 1
    colocated: int = 0
    gateways: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    port: int = 0
    """Of the first gateway; the others follow. 0: any free ones."""
    redis_url: str | None = None
    """None: an embedded Valkey."""
    model_name: str | None = None
    worker_flags: dict[str, str] = field(default_factory=dict)
    role_flags: dict[str, dict[str, str]] = field(default_factory=dict)
    """Further flags of one role's processes."""
    env: dict[str, str] = field(default_factory=dict)


class Cluster:
    """Use as a context manager: whatever happens, nothing is left running."""

    def __init__(self, shape: Shape, say: Callable[[str], None] = lambda words: None, valkey: Valkey | None = None) -> None:
        self.shape = shape
        self._say = say
        self._scratch = Scratch("baton-run-")
        self.folder = self._scratch.path
        self.secret = self.folder / "fleet-secret"
        self.secret.write_text(secrets.token_hex(32))
        self.valkey = (valkey or Valkey()) if shape.redis_url is None else None
        self.children = self._plan()
        self.mps = Mps(self.folder) if wanted(shape.device, [child.flags for child in self.workers]) else None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---------------------------------------------------------------------------------------------------------- parts

    @property
    def redis_url(self) -> str:
        return self.shape.redis_url or (self.valkey.fleet_url if self.valkey is not None else "")

    @property
    def gateways(self) -> list[Child]:
        return [child for child in self.children.values() if child.role == "gateway"]

    @property
    def workers(self) -> list[Child]:
        return [child for child in self.children.values() if child.role != "gateway"]

    def of(self, role: str) -> list[Child]:
        return [child for child in self.children.values() if child.role == role]

    @property
    def urls(self) -> list[str]:
        """Of every ready gateway."""
        return [f"http://127.0.0.1:{facts['http_port']}" for child in self.gateways if (facts := child.facts) is not None]

    @property
    def env(self) -> dict[str, str]:
        own = {"BATON_REDIS_URL": self.redis_url, "BATON_FLEET_SECRET_FILE": str(self.secret)}
        shared = self.mps.env if self.mps is not None else {}
        return {**own, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **shared, **self.shape.env}

    # ----------------------------------------------------------------------------------------------------------- life

    def start(self, timeout_s: float = READY_S) -> None:
        """Start everything and wait until it is ready. Raises ClusterError; nothing is left running then."""
        try:
            self.begin()
            self.wait_ready(timeout_s=timeout_s)
        except BaseException:
            self.stop()
            raise

    def begin(self) -> None:
        """Start everything and do not wait. Raises ClusterError."""
        if self.valkey is not None:
            try:
                self.valkey.start()
            except (TimeoutError, ImportError) as error:
                raise ClusterError(str(error)) from error
            raise_priority(self.valkey.pid)
        if self.mps is not None and not self.mps.start():
            self._say(f"no MPS, {self.mps.failure}: workers that share a GPU take turns, each with all of it")
            for child in self.workers:
                child.flags.pop("gpu_percent", None)
        for child in self.children.values():
            self.launch(child)

    def launch(self, child: Child) -> None:
        child.start(self.env)
        if child.role == "gateway":
            raise_priority(child.pid)

    def wait_ready(self, *names: str, timeout_s: float = READY_S) -> None:
        """Until these processes (or all) are ready. Raises ClusterError for one that ended or takes too long."""
        started = time.monotonic()
        waiting = {name: child for name, child in self.children.items() if not names or name in names}
        while waiting:
            for name, child in list(waiting.items()):
                if child.facts is not None:
                    del waiting[name]
                    self._say(f"{name} ready after {time.monotonic() - started:.1f} s")
                elif not child.alive:
                    raise ClusterError(child.ending())
            if waiting and time.monotonic() - started > timeout_s:
                raise ClusterError(f"{', '.join(waiting)} not ready within {timeout_s:.0f} s")
            time.sleep(LOOK_S)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Signal one process; a killed one is waited for."""
        child = self.children[name]
        child.signal(number)
        if number == signal.SIGKILL and child.process is not None:
            child.process.wait()

    def restart(self, name: str, *, wait: bool = True) -> None:
        self.launch(self.children[name])
        if wait:
            self.wait_ready(name)

    def drain(self) -> None:
        """Gateways end first, for at most `STOP_S`: what they serve can come to its end while workers live."""
        for child in self.gateways:
            child.signal(signal.SIGTERM)
        give_up = time.monotonic() + STOP_S
        while any(child.alive for child in self.gateways) and time.monotonic() < give_up:
            time.sleep(LOOK_S)

    def keep_logs(self) -> Path:
        """A copy of what every process has said, in a folder that stays."""
        kept = Path(tempfile.mkdtemp(prefix="baton-logs-"))
        for child in self.children.values():
            if child.log.exists():
                shutil.copy(child.log, kept)
        return kept

    def stop(self) -> None:
        """Workers and gateways drain together; what does not end in time is killed."""
        for child in self.children.values():
            child.signal(signal.SIGCONT)
            child.signal(signal.SIGTERM)
        give_up = time.monotonic() + STOP_S
        for child in self.children.values():
            if child.process is not None:
                try:
                    child.process.wait(max(0.0, give_up - time.monotonic()))
                except Exception:
                    child.process.kill()
                    child.process.wait()
        if self.mps is not None:
            self.mps.stop()
        if self.valkey is not None:
            self.valkey.stop()
        self._scratch.cleanup()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _plan(self) -> dict[str, Child]:
        shape = self.shape
        counts = {"prefill": shape.prefill, "decode": shape.decode, "colocated": shape.colocated}
        shares = share_cores(sum(counts.values())) if shape.device == "cpu" else None
        common = {"model": str(shape.model), "log_level": "info"}
        if shape.model_name is not None:
            common["model_name"] = shape.model_name
        children: list[Child] = []
        for role, count in counts.items():
            for number in range(count):
                flags = {**common, "device": shape.device, "dtype": shape.dtype, **shape.worker_flags, **shape.role_flags.get(role, {})}
                if shares is not None:
                    flags["cores"] = shares[len(children)]
                else:
                    flags.setdefault("gpu", "none")  # workers of one machine may share a card
                children.append(Child(f"{role}-{number}", role, f"services.{role}", flags, self.folder))
        for number in range(shape.gateways):
            flags = {**common, "http_port": str(shape.port + number if shape.port else 0), **shape.role_flags.get("gateway", {})}
            children.append(Child(f"gateway-{number}", "gateway", "gateway", flags, self.folder))
        return {child.name: child for child in children}


def share_cores(workers: int) -> list[str]:
    """Disjoint sets of this machine's cores, as even as they come; with more workers than cores they take turns."""
    own = sorted(os.sched_getaffinity(0))
    if workers > len(own):
        return [str(own[i % len(own)]) for i in range(workers)]
    return [",".join(str(core) for core in own[i::workers]) for i in range(workers)] if workers else []
