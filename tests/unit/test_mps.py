"""Bounds for workers that share a card: when they hold, who starts the daemon, and that it ends with the system."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import SettingError, StartError
from scripts.launcher.cluster import Cluster, Shape
from scripts.launcher.mps import BINARY, Mps, wanted
from services.worker.mps import PERCENT, PIPES, bound, listening, pipes

DAEMON = f"""#!{sys.executable}
import os, socket, sys
place = os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/control"
if sys.argv[1:] == ["-f"]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(place)
        server.listen()
        while server.accept()[0].recv(10) != b"quit\\n":
            pass
else:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(place)
        client.send(sys.stdin.buffer.read())
"""
"""Behaves as NVIDIA's towards who starts it, asks whether it is there, and tells it to quit."""


def test_a_whole_card_needs_no_daemon() -> None:
    assert bound(100, "cuda", {}, False) == bound(100, "cpu", {}, False) == {}


def test_a_bound_that_holds_is_in_the_environment() -> None:
    assert bound(30, "cuda", {}, True) == {PERCENT: "30"}


def test_a_bound_that_would_not_hold_is_refused() -> None:
    with pytest.raises(StartError, match=r"gpu_percent is 50, but no MPS daemon listens in /run/mps: start nvidia-cuda-mps-control"):
        bound(50, "cuda", {PIPES: "/run/mps"}, False)
    with pytest.raises(SettingError, match="gpu_percent is 50, but device is cpu"):
        bound(50, "cpu", {}, True)


@pytest.mark.parametrize(("environ", "folder"), [({}, "/tmp/nvidia-mps"), ({PIPES: ""}, "/tmp/nvidia-mps"), ({PIPES: "/a"}, "/a")])
def test_pipes_are_where_the_driver_looks(environ: dict[str, str], folder: str) -> None:
    assert pipes(environ) == Path(folder)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_daemon_is_there_while_its_socket_is_listened_on(tmp_path: Path, kind: socket.SocketKind) -> None:
    assert not listening(tmp_path)
    with socket.socket(socket.AF_UNIX, kind) as server:
        server.bind(str(tmp_path / "control"))
        server.listen()
        assert listening(tmp_path)
    assert not listening(tmp_path), "what a dead daemon left is no daemon"


def test_a_worker_without_a_daemon_says_so_in_one_line(tmp_path: Path) -> None:
    words = ["--gpu-percent", "50", "--device", "cuda", "--gpu", "none", "--model", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "services.prefill", *words],
        env={**os.environ, PIPES: str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "no MPS daemon listens in" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("device", "flags", "needed"),
    [
        ("cuda", [{"gpu": "none", "gpu_percent": "50"}, {"gpu": "none"}], True),
        ("cuda", [{"gpu": "0", "gpu_percent": "50"}, {"gpu": "0"}], True),
        ("cuda", [{"gpu": "none"}, {"gpu": "none", "gpu_percent": "100"}], False),
        ("cuda", [{"gpu": "auto", "gpu_percent": "50"}, {"gpu": "auto"}], False),
        ("cuda", [{"gpu": "0", "gpu_percent": "50"}, {"gpu": "1"}], False),
        ("cuda", [{"gpu": "none", "gpu_percent": "50"}], False),
        ("cpu", [{"gpu_percent": "50"}, {}], False),
    ],
)
def test_a_daemon_is_started_for_bounded_workers_of_one_card_only(device: str, flags: list[dict[str, str]], needed: bool) -> None:
    assert wanted(device, flags) == needed


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "bin" / BINARY
    binary.parent.mkdir()
    binary.write_text(DAEMON)
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(binary.parent), prepend=":")


@pytest.mark.usefixtures("daemon")
def test_the_daemon_of_a_system_is_its_own_and_ends_with_it(tmp_path: Path) -> None:
    mps = Mps(tmp_path)
    assert mps.env == {}
    assert mps.start()
    assert mps.env == {PIPES: str(tmp_path / "mps")} and listening(tmp_path / "mps")
    mps.stop()
    assert not listening(tmp_path / "mps") and mps.env == {}
    mps.stop()


def test_a_daemon_that_does_not_start_is_done_without(tmp_path: Path, daemon: None) -> None:
    (tmp_path / "bin" / BINARY).write_text("#!/bin/sh\necho no device >&2\nexit 1\n")
    mps = Mps(tmp_path)
    assert not mps.start() and mps.env == {}
    assert mps.failure == f"{BINARY} does not start: no device"


def test_without_the_binary_a_system_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.launcher.mps.binary", lambda: None)
    said: list[str] = []
    launched: list[dict[str, str]] = []
    monkeypatch.setattr(Cluster, "launch", lambda self, child: launched.append({**child.flags, **self.env}))
    shape = Shape(tmp_path, device="cuda", redis_url="redis://127.0.0.1:1/0", role_flags={"prefill": {"gpu_percent": "50"}})
    with Cluster(shape, said.append) as cluster:
        cluster.begin()
    assert said == [f"no MPS, there is no {BINARY}: workers that share a GPU take turns, each with all of it"]
    assert len(launched) == 3 and not any("gpu_percent" in one or PIPES in one for one in launched)


@pytest.mark.usefixtures("daemon")
def test_all_workers_of_a_bounded_system_are_clients_of_its_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: dict[str, dict[str, str]] = {}
    monkeypatch.setattr(Cluster, "launch", lambda self, child: launched.update({child.role: {**child.flags, **self.env}}))
    shape = Shape(tmp_path, device="cuda", redis_url="redis://127.0.0.1:1/0", role_flags={"prefill": {"gpu_percent": "50"}})
    with Cluster(shape) as cluster:
        cluster.begin()
        folder = cluster.folder / "mps"
        assert {one[PIPES] for one in launched.values()} == {str(folder)} and listening(folder)
        assert launched["prefill"]["gpu_percent"] == "50" and "gpu_percent" not in launched["decode"]
    assert not listening(folder)
