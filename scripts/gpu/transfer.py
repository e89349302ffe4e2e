"""Pages between two processes of one GPU over UCX: 64 MiB at once and many times over, and a prompt of 2,048 tokens of Llama-3-8B."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from services.transfer.bench import MEMCPY_BYTES, MIB, Work, measure
from services.transfer.runs import RUN_BYTES, most_pages

REPEATS = 7
STAGED_GB_S = 100.0
"""More than pages could do that go through the host's memory, whatever lanes there are."""
WORKS = {
    "64 MiB": Work(1, 64 * MIB, REPEATS),
    "16 x 64 MiB": Work(16, 64 * MIB, REPEATS),
    "32 pages of 2 MiB": Work(32, 2 * MIB, REPEATS),
    "2048 tokens, 128 pages of 2 MiB": Work(128, 2 * MIB, REPEATS),
    "2048 tokens, the same in runs": Work(128, 2 * MIB, REPEATS, most_pages(2 * MIB, RUN_BYTES["cuda"])),
}


def results(model: str | None) -> Iterator[tuple[str, Any]]:
    os.environ.setdefault("UCX_PROTO_INFO", "y")  # UCX's own report of how each kind of message goes
    os.environ.setdefault("UCX_LOG_LEVEL", "warn")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # what stands in a pipe's buffer would be lost with a process that hangs
    found = measure(list(WORKS.values()), "cuda")
    fastest = max((of.bytes / seconds["plain"] / 1e9 for of, seconds in found.medians.items()), default=0.0)
    yield "transport", {"ok": "cuda_ipc" in found.transport and fastest > STAGED_GB_S, "lanes": found.transport, "fastest_gb_s": fastest}
    for name, of in WORKS.items():
        seconds = found.medians.get(of)
        if seconds is None:
            yield name, {"ok": False, "failure": found.error}
            continue
        rates = {f"{kind}_gb_s": of.bytes / seconds[kind] / 1e9 for kind in ("plain", "checked")}
        times = {f"{kind}_us": 1e6 * seconds[kind] for kind in ("plain", "checked")}
        yield name, {**rates, **times, "copy_gb_s": MEMCPY_BYTES["cuda"] / seconds["memcpy"] / 1e9}
