"""The launcher's decisions: options, shared cores, names of models, the bar table; and a child that does not outlive its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from scripts.launcher import __main__ as demo
from scripts.launcher.__main__ import options
from scripts.launcher.child import Child
from scripts.launcher.cluster import Cluster, ClusterError, share_cores
from scripts.launcher.model import name_of
from scripts.launcher.scratch import Scratch
from scripts.launcher.show import BAR, Credentials, Progress, credentials, timeline_table

STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other")


BAD = ["--port 0", "--port 65536", "--gateways 0", "--prefill 0", "--decode 0", "--colocated -1", "--max-tokens 0", "--redis here:6379"]
BAD += ["--device tpu", "--surprise", "--colocated 1 --decode 3"]


@pytest.mark.parametrize("words", BAD)
def test_a_bad_option_is_one_line_and_status_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        options(words.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    assert words.split()[0].removeprefix("--").removesuffix("s") in said


def test_colocated_workers_stand_instead_of_the_two_roles() -> None:
    chosen = options(["--colocated", "2"])
    assert (chosen.prefill, chosen.decode, chosen.colocated) == (0, 0, 2)


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 5])
def test_cores_are_shared_evenly_and_apart_while_they_last(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6, 7})
    shares = [{int(core) for core in share.split(",")} for share in share_cores(workers)]
    assert len(shares) == workers
    if 0 < workers <= 4:
        assert set().union(*shares) == {4, 5, 6, 7} and sum(map(len, shares)) == 4
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(share <= {4, 5, 6, 7} and share for share in shares)


def test_a_model_is_called_what_people_call_it(tmp_path: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.touch()
    assert name_of(None, Path("/models/Small")) == "Small"
    assert name_of(str(tmp_path), tmp_path) == tmp_path.name
    assert name_of(str(gguf), tmp_path / "tiny-1234abcd") == "tiny"
    assert name_of("someone/model", Path("/hub/snapshots/0123abcd")) == "someone/model"


def test_the_bars_of_the_timeline_fill_the_total() -> None:
    timeline = {f"{stage}_ms": 100.0 for stage in STAGES} | {"total_ms": 600.0, "ttft_ms": 200.0}
    lines = timeline_table(timeline).splitlines()
    assert len(lines) == 7 and "600.0 ms" in lines[-1]
    ends = [len(line.split(" ms  ")[1]) for line in lines[:-1]]
    assert ends == sorted(ends) and abs(ends[-1] - BAR) <= 1


PARENT = """
import subprocess, sys
from scripts.launcher.child import die_with_parent
child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); import signal; signal.pause()"], preexec_fn=die_with_parent)
print(child.pid, flush=True)
import signal; signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_killed_parent_takes_its_child_along() -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        assert b"up" in said
        parent.kill()
        # Both held the pipe: its end means that both are gone.
        assert parent.stdout.read() == b""


LEFT = """
import sys, time
from scripts.launcher.scratch import Scratch
made = Scratch(sys.argv[1])
print(made.path, flush=True)
time.sleep(60)
"""


def test_what_a_killed_run_has_left_goes_at_the_next_start_and_a_living_ones_stays() -> None:
    prefix, root = f"baton-test-{os.getpid()}-", Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", LEFT, prefix], stdout=subprocess.PIPE, cwd=root, text=True) as killed:
        assert killed.stdout is not None
        left = Path(killed.stdout.readline().strip())
        living = Scratch(prefix)
        assert left.is_dir() and living.path.is_dir()
        killed.kill()
    last = Scratch(prefix)
    assert not left.exists() and living.path.is_dir() and last.path.is_dir()
    for one in (living, last):
        one.cleanup()
        assert not one.path.exists()


def test_the_demo_asks_with_the_first_key_of_its_gateways(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the team\nalice:0123456789abcdef  # the first\nbob:fedcba9876543210\n")
    for environ in ({"BATON_API_KEYS": "0123456789abcdef,bob:fedcba9876543210"}, {"BATON_API_KEYS_FILE": str(file)}):
        assert credentials(environ) == Credentials(True, "0123456789abcdef")
    assert credentials({}) == Credentials(False, None)


DIGEST = f"alice:sha256:{'0' * 64}"


class Ended:
    """A cluster whose gateway has ended before it was ready, so that serving comes to its end."""

    urls = ("http://127.0.0.1:1",)
    valkey = None

    class Child:
        name, alive, pid, facts = "gateway-0", False, 7, None

        def ending(self) -> str:
            return "gateway-0 ended: bye"

    children = {"gateway-0": Child()}


def test_with_digests_only_the_demo_serves_and_asks_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/api.md's first example: `./scripts/key` writes digests, and nobody could show a key."""
    shown = credentials({"BATON_API_KEYS": DIGEST})
    assert shown == Credentials(True, None) and shown.hidden
    monkeypatch.setattr(demo, "wait_served", lambda url: None)
    said: list[str] = []
    with pytest.raises(ClusterError, match="bye"):
        demo.serve(cast(Cluster, Ended()), "m", shown, None, 1, cast(Progress, said.append))
    assert "stand as digests" in said[0] and "serving m" in said[1]
    captured = capsys.readouterr()
    assert "Authorization: Bearer KEY" in captured.err and "no answer" not in captured.err


SLEEPER = """
import json, os, sys, time
open(sys.argv[sys.argv.index("--ready-file") + 1], "w").write(json.dumps({"pid": os.getpid()}))
time.sleep(60)
"""


def test_what_is_killed_is_started_again_and_what_never_was_ready_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child, said, ready = Child("decode-1", "decode", "sleeper", {}, tmp_path), list[str](), set[int]()
    child.start({})
    cluster = SimpleNamespace(children={"decode-1": child}, valkey=None, restart=lambda name, wait: child.start({}))
    look = partial(demo.revive, cast(Cluster, cluster), ready, cast(Progress, said.append))
    try:
        for _ in range(2):
            while child.facts is None:
                time.sleep(0.01)
            look()
            child.signal(signal.SIGKILL)
            child.process.wait()  # type: ignore[union-attr]
            look()
        assert child.alive and said == ["decode-1 was killed by signal 9; starting it again"] * 2
    finally:
        child.process.kill()  # type: ignore[union-attr]
        child.process.wait()  # type: ignore[union-attr]
    child.process = subprocess.Popen([sys.executable, "-c", ""])
    child.process.wait()
    with pytest.raises(ClusterError, match="decode-1 ended"):
        look()


def test_with_digests_only_one_answer_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_API_KEYS", DIGEST)
    assert demo.run(options(["--once", "Hello"]), cast(Progress, lambda words: None)) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("no answer: all API keys stand as digests")
