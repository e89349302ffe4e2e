"""The Triton kernels without a GPU: Triton's own interpreter, program by program in numpy. Prints each case's worst error as JSON.

A process of its own, because Triton decides when it is first imported whether it interprets: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
from typing import Any

import numpy as np
import torch

from tests.kernel_cases import CASES, SHAPES

BRIEF = {torch.float32: ("decode", "prefill"), torch.bfloat16: ("decode", "prefill", "product", "gate")}


def mend(interpreter: Any, language: Any) -> None:
    """Two faults of Triton 3.6's interpreter: it wants an int of an array of one element, which numpy from 2.4 on refuses, and it
    multiplies matrices of bfloat16 by their bit patterns."""
    tensors, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch(kind: Any, scope: Any) -> None:
        tensors(kind, scope)
        scope.set_attr(kind, "__index__", lambda self: int(self.handle.data.item()))

    def wide(x: Any) -> Any:
        if x.dtype.scalar != language.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), language.float32)

    interpreter._patch_lang_tensor = patch
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)


def main() -> None:
    """All kernels on one shape, attention on an odd one, attention and products in bfloat16; with BATON_TEST_FULL everything."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    mend(importlib.import_module("triton.runtime.interpreter"), importlib.import_module("triton.language"))
    operators = importlib.import_module("services.engine.cuda.triton_operators").TritonOperators()
    full = bool(os.environ.get("BATON_TEST_FULL"))
    runs = [("grouped", torch.float32), ("odd", torch.float32), ("grouped", torch.bfloat16)]
    if full:
        runs = [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    found = []
    for shape, dtype in runs:
        for name, case in CASES.items():
            if not full and (shape, dtype) != ("grouped", torch.float32) and name not in BRIEF[dtype]:
                continue
            seed = secrets.randbits(40)
            error, bound = case(operators, SHAPES[shape], dtype, torch.device("cpu"), seed)
            found.append({"case": f"{name} {shape} {str(dtype).removeprefix('torch.')}", "error": error, "bound": bound, "seed": seed})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
