"""`./scripts/gpu_check` where there is no GPU: it says so, and its own parts work."""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.gpu import check, model
from scripts.gpu.goodput import due
from scripts.gpu.model import ahead, greedy, random_model
from scripts.gpu.system import bounded
from scripts.load.curve import Curve
from scripts.load.targets import Hardware, variants


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-m", "scripts.gpu.check"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_check: torch sees no CUDA device on this machine\n"


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ('print(\'["a", {"ok": true}]\'); print(\'UCX says ["b", 1]\')', {"ok": True, "wrong": [], "a": {"ok": True}}),
        (
            'print(\'["a", {"ok": false}]\'); print(\'["c", {"ms": 1.5}]\')',
            {"ok": False, "wrong": ["a"], "a": {"ok": False}, "c": {"ms": 1.5}},
        ),
        ("print('[\"a\", 1]', flush=True); import os; os.abort()", {"ok": False, "wrong": [], "a": 1, "error": "ended with status -6"}),
        ("print('[\"a\", 1]', flush=True); import time; time.sleep(60)", {"ok": False, "wrong": [], "a": 1, "error": "not done after 3 s"}),
    ],
    ids=["well", "wrong", "dead", "hung"],
)
def test_a_section_that_fails_keeps_what_it_had(program: str, wanted: dict[str, object]) -> None:
    found = check.run([sys.executable, "-c", program], 3 if "sleep" in program else 60)
    assert found.pop("seconds") < 30
    assert found == wanted


def test_an_unknown_failure_is_a_result() -> None:
    """On a machine without Triton or without a GPU every section fails, and says of what."""
    found = check.run([sys.executable, "-m", "scripts.gpu.section", "nothing"], 60)
    assert not found["ok"] and "scripts.gpu.nothing" in found["error"]


def test_the_check_of_a_launch_ahead_sees_answers_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(tmp_path)
    assert ahead(tmp_path, "cpu") == {"ok": True, "depth": 1, "answers": 7, "equal": 7}
    drawn = count()
    monkeypatch.setattr(model, "generate", lambda *_, **__: [SimpleNamespace(ids=[next(drawn)]) for _ in model.LENGTHS])
    assert not ahead(tmp_path, "cpu")["ok"]


def test_the_greedy_check_passes_what_is_right_and_fails_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(tmp_path)
    found = greedy(tmp_path, "float32", "torch", "cpu")
    assert found["ok"] and found["equal"] == found["positions"] == 3 * 48 + 4 * 24
    from services.engine import torch_forward

    right = torch_forward.TorchForward.__call__
    monkeypatch.setattr(torch_forward.TorchForward, "__call__", lambda self, launch: right(self, launch).roll(1, -1))
    assert not greedy(tmp_path, "float32", "torch", "cpu")["ok"]


def test_whole_systems_are_measured_only_when_asked_for() -> None:
    assert not {"sweep", "system"} & set(check.SECTIONS) and sum(check.SECTIONS.values()) < 480
    assert set(check.LIMITS) == {*check.SECTIONS, "sweep", "system"}


def test_a_bound_is_the_prefills_alone() -> None:
    (apart,) = variants("disaggregated", Hardware(Path(), "cuda", "auto", 4000, 1024, share=1))
    one = bounded(apart, 30)
    assert one.name == "disaggregated 1+1, prefill 30 %"
    assert one.shape.role_flags["prefill"] == {"pages": "1000", "gpu_percent": "30"}
    assert one.shape.role_flags["decode"] == apart.shape.role_flags["decode"] == {"pages": "3000"}
    assert "gpu_percent" not in apart.shape.role_flags["prefill"]


def test_the_strict_search_goes_first_and_the_loose_one_on_when_it_is_done_or_its_time_is_up() -> None:
    curves = {name: {"a": Curve(16, 0.1, 200, 1.15)} for name in ("strict", "loose")}
    assert due(curves, True) == ("strict", {"a": 16}) and due(curves, False) == ("loose", {"a": 16})
    for rate, hits in ((16.0, 30), (18.0, 20)):
        curves["strict"]["a"].add(rate, hits, 30)
    assert due(curves, True) == ("loose", {"a": 16})
    for rate, hits in ((16.0, 30), (18.0, 20)):
        curves["loose"]["a"].add(rate, hits, 30)
    assert due(curves, True) is None
