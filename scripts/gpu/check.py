"""`./scripts/gpu_check`: everything that only a GPU can show, checked and timed on one GPU, within 8 minutes.

Kernels against float64; greedy ids of a small model (random, or --model) against transformers in float32; decode and prefill in the
shape of Llama-3-8B with random bf16 weights, against products, reads and copies of the same run; pages between two processes over UCX.
Instead of these, `--only system`: whole systems on the GPU, disaggregated, colocated and chunked (scripts/gpu/system.py), 7 minutes;
`--only sweep`: which tiles and ways of the kernels are the fastest (scripts/gpu/sweep.py).
Each section is a process of its own: one that fails or hangs loses nothing of the others. Progress on stderr; the last line is one JSON
object. Exit status: 0 all is well, 1 something is not (the JSON says what), 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

SECTIONS = {"kernels": 100, "model": 130, "speed": 170, "transfer": 70}
"""Seconds each may take: together less than 8 minutes."""
EXTRA = {"sweep": 150, "system": 420}
"""Those that run only when asked for by name."""
LIMITS = {**SECTIONS, **EXTRA}


def main() -> int:
    parser = argparse.ArgumentParser(prog="./scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a small model of the Llama family [a random one]")
    parser.add_argument("--only", choices=tuple(LIMITS), action="append", help="this section; may repeat [all but sweep and system]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line here, again after every section")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device on this machine", file=sys.stderr)
        return 2
    found: dict[str, Any] = {
        "benchmark": "gpu_check",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "made": time.strftime("%Y-%m-%d"),
    }
    well = True
    for name in chosen.only or SECTIONS:
        print(f"gpu_check: {name}, at most {LIMITS[name]} s", file=sys.stderr, flush=True)
        found[name] = run([sys.executable, "-m", "scripts.gpu.section", name, *([chosen.model] if chosen.model else [])], LIMITS[name])
        well &= found[name]["ok"]
        if chosen.json is not None:
            chosen.json.write_text(json.dumps({"ok": well, **found}) + "\n")
    print(json.dumps({"ok": well, **found}), flush=True)
    return 0 if well else 1


def run(command: list[str], limit_s: float) -> dict[str, Any]:
    """What a section has printed, line by line `["name", result]`, until it ended or its time was up; other lines go to stderr."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    overdue = threading.Event()

    def end() -> None:
        overdue.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, end)
    timer.start()
    results: dict[str, Any] = {}
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            named = _result(line)
            if named is None:
                print(line, end="", file=sys.stderr, flush=True)
            else:
                results[named[0]] = named[1]
                print(f"gpu_check:   {named[0]}: {json.dumps(named[1])}", file=sys.stderr, flush=True)
    status = process.wait()
    timer.cancel()
    if overdue.is_set():
        results["error"] = f"not done after {limit_s:g} s"
    elif status and "error" not in results:
        results["error"] = f"ended with status {status}"
    wrong = [name for name, value in results.items() if isinstance(value, dict) and value.get("ok") is False]
    return {"ok": "error" not in results and not wrong, "wrong": wrong, "seconds": round(time.monotonic() - began, 1), **results}


def _result(line: str) -> tuple[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
        return value[0], value[1]
    return None


if __name__ == "__main__":
    sys.exit(main())
