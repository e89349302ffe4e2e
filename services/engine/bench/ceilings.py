"""What this machine gives at best: matrix products in the model's type and shapes, streaming reads, copies.

Each is the best of several ways: torch's own, oneDNN's packed weights, and this engine's kernels. Reads and copies stream over buffers
of 256 MiB in huge pages (numpy asks for them), which no cache of a core holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from services.engine.bench.rounds import Case, Times
from services.engine.bench.work import Shapes
from services.engine.native import build, library
from services.engine.packed import PackedLinear, packable

STREAM_BYTES = 256 << 20
ROWS = {"cpu": (512, 2048), "cuda": (2048, 8192)}
COLUMNS = 32
"""Outputs in a panel of the native kernels' weights."""


@dataclass(frozen=True)
class Ceilings:
    """Of the best way each; `ways` has the others."""

    flops_per_s: float
    read_bytes_per_s: float
    copy_bytes_per_s: float
    """Bytes copied; each is read and written."""
    ways: dict[str, float]


class Probe:
    """Cases to be measured in rounds beside others, and what their times say."""

    def __init__(self, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._device = device
        self._dtype = dtype
        self._native = _native(device, dtype, shapes)
        self._products: dict[str, list[tuple[str, float]]] = {}
        """By way and rows: names of its cases, one a shape, and their operations."""
        self.cases = [*self._gemms(), *self._streams()]

    def ceilings(self, times: Mapping[str, Times]) -> Ceilings:
        ways = {}
        for way, parts in self._products.items():
            ways[f"products, {way}"] = sum(flops for _, flops in parts) / sum(times[name].least for name, _ in parts)
        best: dict[tuple[str, int], float] = {}
        for way, parts in self._products.items():
            rows = way.rpartition(" ")[2]
            for number, (name, flops) in enumerate(parts):
                best[rows, number] = max(best.get((rows, number), 0.0), flops / times[name].least)
        due = [2.0 * outputs * inputs for outputs, inputs in self._shapes.products]
        mixed = [sum(due) / sum(one / best[rows, number] for number, one in enumerate(due)) for rows in {rows for rows, _ in best}]
        streams = {case.name: STREAM_BYTES / times[case.name].least for case in self.cases if case.name.startswith(("read", "copy"))}
        reads = [rate for name, rate in streams.items() if name.startswith("read")]
        return Ceilings(max(mixed), max(reads), streams["copy, torch"], {**ways, **streams})

    # ---------------------------------------------------------------------------------------------------------- inside

    def _gemms(self) -> list[Case]:
        cases = []
        for rows in ROWS[self._device.type]:
            for number, (outputs, inputs) in enumerate(self._shapes.products):
                weight = torch.randn(outputs, inputs, device=self._device).to(self._dtype)
                x = torch.randn(rows, inputs, device=self._device).to(self._dtype)
                for way, run in self._ways(x, weight, rows).items():
                    name = f"product {number}, {way}, {rows} x {inputs} x {outputs}"
                    self._products.setdefault(f"{way}, {rows}", []).append((name, 2.0 * rows * inputs * outputs))
                    cases.append(Case(name, self._finished(run)))
        return cases

    def _ways(self, x: Tensor, weight: Tensor, rows: int) -> dict[str, Callable[[], object]]:
        ways: dict[str, Callable[[], object]] = {"torch": lambda: linear(x, weight)}
        if packable(self._device, self._dtype):
            bare = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            bare.weight.data = weight
            packed = PackedLinear(bare)
            ways["oneDNN packed"] = lambda: packed(x)
        if self._native is not None:
            ways["native"] = native_product(self._native, x, weight)
        return ways

    def _streams(self) -> list[Case]:
        if self._device.type == "cuda":
            source, target = (torch.ones(STREAM_BYTES // 8, dtype=torch.int64, device=self._device) for _ in range(2))
        else:
            source, target = (torch.from_numpy(np.ones(STREAM_BYTES // 8, dtype=np.int64)) for _ in range(2))
        floats = source.view(torch.float32)
        ways: dict[str, Callable[[], object]] = {
            "read, torch's sum of int64": source.sum,
            "read, torch's product of float32 with itself": lambda: torch.dot(floats, floats),
            "copy, torch": lambda: target.copy_(source),
        }
        native = self._native
        if native is not None:
            ways["read, native"] = lambda: native.baton_read(floats.data_ptr(), floats.numel(), torch.get_num_threads())
        return [Case(name, self._finished(run)) for name, run in ways.items()]

    def _finished(self, run: Callable[[], object]) -> Callable[[], object]:
        if self._device.type != "cuda":
            return run

        def both() -> None:
            run()
            torch.cuda.synchronize()

        return both


def native_product(kernels: ctypes.CDLL, x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """x `[rows, inputs]` times weight `[outputs, inputs]` transposed, by our kernels → `[rows, outputs]`. Input and output are `arranged`,
    as they are inside a launch."""
    rows, (outputs, inputs), bf16 = len(x), weight.shape, weight.dtype is torch.bfloat16
    lanes = inputs * weight.element_size() // 4
    packed = np.empty(outputs * lanes, dtype=np.uint32)
    kernels.baton_pack(weight.data_ptr(), outputs, lanes, packed.ctypes.data)
    given = arranged(kernels, x)
    out = torch.empty(rows + COLUMNS, outputs, dtype=weight.dtype)

    def run() -> Tensor:
        threads = torch.get_num_threads()
        kernels.baton_gemm(int(bf16), given.data_ptr(), packed.ctypes.data, rows, outputs, inputs, threads, out.data_ptr())
        return out

    return run


def arranged(kernels: ctypes.CDLL, values: Tensor, back: int = 0) -> Tensor:
    """Rows `[rows, width]` in the order in which the kernels want them, with room for 32 more behind; or `back` that many of them."""
    rows, width = back or len(values), values.shape[1]
    found = torch.zeros(rows if back else rows + COLUMNS, width, dtype=values.dtype)
    kernels.baton_arrange(int(values.dtype is torch.bfloat16), values.contiguous().data_ptr(), rows, width, int(back > 0), found.data_ptr())
    return found


def _native(device: torch.device, dtype: torch.dtype, shapes: Shapes) -> ctypes.CDLL | None:
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return None
    if any(outputs % COLUMNS or inputs % COLUMNS for outputs, inputs in shapes.products):
        return None
    try:
        return library.functions(build.library())
    except (build.Unavailable, OSError):
        return None
