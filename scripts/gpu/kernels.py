"""Every kernel on the GPU against the reference operators in float64, on fresh random inputs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import torch

from services.engine.cuda.triton_operators import TritonOperators
from tests.kernel_cases import CASES, SHAPES, Shape

LONG = Shape(kv_heads=8, group=4, dim=128, page_tokens=16, scale=30)
"""Heads like Llama-3-8B's, sequences of thousands of tokens."""


def results(model: str | None) -> Iterator[tuple[str, Any]]:
    device = torch.device("cuda", torch.cuda.current_device())
    halves = [(name, shape, dtype) for name, shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)]
    for shape_name, shape, dtype in [*halves, ("long", LONG, torch.bfloat16), ("long", LONG, torch.float16)]:
        for name, case in CASES.items():
            seed = secrets.randbits(40)
            words = f"{name}, {shape_name}, {str(dtype).removeprefix('torch.')}"
            try:
                error, bound = case(TritonOperators(), shape, dtype, device, seed)
            except Exception as failure:  # one kernel that does not compile says nothing of the others
                yield words, {"ok": False, "seed": seed, "failure": f"{type(failure).__name__}: {failure}"[:500]}
            else:
                yield words, {"ok": error <= bound, "error": error, "bound": bound, "seed": seed}
