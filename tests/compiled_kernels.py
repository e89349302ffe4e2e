"""The Triton kernels compiled for GPUs that are not there, as they are launched: Triton brings ptxas. Prints what each needs as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from services.engine.cuda import device
from services.engine.cuda.tiles import Device
from services.engine.cuda.triton_operators import TritonOperators
from tests.kernel_cases import CASES, SHAPES, Shape

KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
LLAMA = Shape(kv_heads=8, group=4, dim=128, page_tokens=16)
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""What a program may use, by compute capability (CUDA C programming guide, technical specifications)."""


class Compiler:
    """Stands in for the launch of a kernel."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | named
        options = {name: values.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in values}
        constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        signature = {name: "constexpr" if name in constant else _kind(value) for name, value in values.items()}
        aligned = [name for name, value in values.items() if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)]
        attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constant}
        ordered = {name: signature[name] for name in kernel.arg_names}
        source = ASTSource(kernel, ordered, {name: values[name] for name in constant}, attributes)
        made = triton.compile(source, target=self._target, options=options)
        spills = _spills(made.asm["ptx"], self._target.arch)
        half = not any(kind == "*fp32" for name, kind in signature.items() if name in ("queries", "x", "both", "qkv", "packed"))
        self.found[made.hash] = {"kernel": kernel.__name__, "half": half, "shared": made.metadata.shared, "spilt": spills}


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + KINDS[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def _spills(ptx: str, capability: int) -> int:
    """Bytes that one thread keeps in memory for want of registers."""
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={arch[1] if arch else f'sm_{capability}'}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))


def main() -> None:
    capability = int(sys.argv[1])
    compiler = Compiler(capability)
    triton.runtime.jit.JITFunction.run = lambda self, *args, **named: compiler.run(self, *args, **named)
    device.can_overlap = lambda on: capability >= 90
    device.about = lambda on: Device(132, SHARED_BYTES[capability])
    for shape in (SHAPES["grouped"], LLAMA):
        for dtype in (torch.bfloat16, torch.float32):
            for case in CASES.values():
                case(TritonOperators(), shape, dtype, torch.device("cpu"), 0)
    print(json.dumps({"allowed": SHARED_BYTES[capability], "kernels": list(compiler.found.values())}))


if __name__ == "__main__":
    main()
