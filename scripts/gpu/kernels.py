"""Every kernel on the GPU against the reference operators in float64, on fresh random inputs; several processes compile at a time."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from scripts.gpu.guard import attempt, failed
from tests.kernel_cases import CASES, SHAPES, Shape

LONG = Shape(kv_heads=8, group=4, dim=128, page_tokens=16, scale=30)
"""Heads like Llama-3-8B's, sequences of thousands of tokens."""
PROCESSES = 12
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def results(model: str | None) -> Iterator[tuple[str, Any]]:
    shapes = [(name, kind) for name in SHAPES for kind in ("float32", "bfloat16")] + [("long", "bfloat16"), ("long", "float16")]
    with ProcessPoolExecutor(min(PROCESSES, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        asked = {pool.submit(checked, case, *shape): f"{case}, {', '.join(shape)}" for case in CASES for shape in shapes}
        half = [shape for shape in shapes if shape[1] != "float32"]
        asked |= {pool.submit(checked, "prefill", *shape, library=True): f"torch's prefill, {', '.join(shape)}" for shape in half}
        for done in as_completed(asked):
            yield attempt(asked[done], done.result)


def checked(case: str, shape: str, kind: str, *, library: bool = False) -> dict[str, Any]:
    """In a process that others' faults on the device may have left without a context: then every case says so."""
    from services.engine.cuda.triton_operators import TritonOperators, Ways

    seed, device = secrets.randbits(40), torch.device("cuda", torch.cuda.current_device())
    try:
        error, bound = CASES[case](
            TritonOperators(Ways(library=library)), LONG if shape == "long" else SHAPES[shape], TYPES[kind], device, seed
        )
    except Exception as failure:  # one kernel that does not compile says nothing of the others
        return {**failed(failure), "seed": seed}
    return {"ok": error <= bound, "error": error, "bound": bound, "seed": seed}
