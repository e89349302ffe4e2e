"""The GPU's kernels, where there is no GPU: interpreted against float64, and compiled for one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: its interpreter runs the GPU's kernels here"
)


def run(module: str, *words: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_interpreted_they_are_their_reference() -> None:
    """On fresh random inputs, pages in no order, what no sequence has written being no number."""
    found = json.loads(run("tests.interpreted_kernels", TRITON_INTERPRET="1"))
    assert len(found) == (84 if os.environ.get("BATON_TEST_FULL") else 13)
    assert not [one for one in found if not one["error"] <= one["bound"]]


@pytest.mark.skipif(not os.environ.get("BATON_TEST_FULL"), reason="a minute of compiling: BATON_TEST_FULL=1")
@pytest.mark.parametrize("capability", ["80", "90"])
def test_compiled_they_fit(capability: str) -> None:
    """For Ampere and Hopper: shared memory is enough, and in half precision all but a few words stay in registers."""
    found = json.loads(run("tests.compiled_kernels", capability))
    assert {one["kernel"] for one in found["kernels"]} == {"norm", "gate", "product", "put", "decode", "reduce", "prefill", "move"}
    assert all(one["shared"] <= found["allowed"] for one in found["kernels"])
    assert not [one for one in found["kernels"] if one["half"] and one["spilt"] > 128]
