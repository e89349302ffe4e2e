"""Workers in network namespaces of their own, behind one bridge, so that one can be cut off and nobody hears it say goodbye.

Needs root and iproute2; `Network.lacking` says what is lacking. Everything is named after this process and taken down at the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence


class NetworkError(Exception):
    """The namespaces cannot be made: one line that says why."""


class Network:
    """Use as a context manager."""

    def __init__(self, names: Sequence[str]) -> None:
        self._id = os.getpid() % 100_000
        self._names = list(names)
        self._subnet = f"10.{200 + self._id // 256 % 50}.{self._id % 256}"
        self.host = f"{self._subnet}.254"
        """The address of everybody who is not in a namespace."""

    @staticmethod
    def lacking() -> str | None:
        """Why there can be none here, or None."""
        if os.geteuid() != 0:
            return "not root"
        return None if shutil.which("ip") else "no iproute2"

    def address(self, name: str) -> str:
        return f"{self._subnet}.{self._names.index(name) + 1}"

    def within(self, name: str) -> list[str]:
        """Words before a command that is to run in there; it keeps its process id."""
        return ["ip", "netns", "exec", self._space(name)]

    def __enter__(self) -> Network:
        try:
            _ip(f"link add {self._bridge} type bridge")
            _ip(f"addr add {self.host}/24 dev {self._bridge}")
            _ip(f"link set {self._bridge} up")
            for name in self._names:
                space, outside = self._space(name), self._outside(name)
                _ip(f"netns add {space}")
                _ip(f"link add {outside} type veth peer name eth0 netns {space}")
                _ip(f"link set {outside} master {self._bridge} up")
                _ip(f"-n {space} addr add {self.address(name)}/24 dev eth0")
                _ip(f"-n {space} link set eth0 up")
                _ip(f"-n {space} link set lo up")
        except NetworkError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            _ip(f"link del {self._outside(name)}", must=False)
            _ip(f"netns del {self._space(name)}", must=False)
        _ip(f"link del {self._bridge}", must=False)

    def cut(self, name: str) -> None:
        """Nothing comes in or out any more, and no connection is told."""
        _ip(f"link set {self._outside(name)} down")

    def heal(self, name: str) -> None:
        _ip(f"link set {self._outside(name)} up")

    @property
    def _bridge(self) -> str:
        return f"btn{self._id}"

    def _space(self, name: str) -> str:
        return f"baton{self._id}-{name}"

    def _outside(self, name: str) -> str:
        return f"btn{self._id}v{self._names.index(name)}"


def _ip(words: str, *, must: bool = True) -> None:
    try:
        done = subprocess.run(["ip", *words.split()], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkError(f"ip {words}: {error}") from error
    if must and done.returncode:
        raise NetworkError(f"ip {words}: {done.stderr.strip()}")
