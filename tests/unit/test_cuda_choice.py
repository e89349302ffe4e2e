"""Which way a prompt's attention goes: by what was measured, and never one that fails. Where Triton is installed."""

from __future__ import annotations

import math

import pytest
import torch

from services.engine.cuda.operators import Heads

pytest.importorskip("triton", reason="the GPU kernels need Triton to be imported")
CPU, LIKE = torch.device("cpu"), Heads(4, 2, 32, 16, 0.1, 1e-5)


@pytest.mark.parametrize(
    ("own_s", "library_s", "library"),
    [(0.002, 0.001, True), (0.001, 0.002, False), (0.001, None, False), (None, 0.001, True), (None, None, False)],
)
def test_the_faster_is_taken_and_one_that_fails_is_not(
    own_s: float | None, library_s: float | None, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.engine.cuda import choose

    times = iter((own_s, library_s))

    def taken(run: object) -> float:
        if (seconds := next(times)) is None:
            raise RuntimeError("no kernel image is available for execution on the device")
        return seconds

    monkeypatch.setattr(choose, "_taken", taken)
    assert choose.ways(LIKE, torch.bfloat16, CPU).library is library
    assert next(times, math.inf) == math.inf, "both were tried"


def test_float32_stays_with_our_own_kernel() -> None:
    from services.engine.cuda import choose

    assert not choose.ways(LIKE, torch.float32, CPU).library
