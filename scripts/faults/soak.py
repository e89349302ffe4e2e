"""`./scripts/soak`: a long run without faults, at a fraction of the goodput rate: does memory grow, do pages leak, do times drift?

Open-loop, with the arrivals, lengths and texts of ./scripts/goodput; every five minutes the same lengths come at the same times again, with
other text, so that any five minutes can be compared with any other. After the warm-up each process' memory gets a slope with the upper
bound of its one-sided 95 % interval; a pool's pages are touched one after the other at first, so the warm-up should fill it (--pages).
The last line is one JSON object; the exit status is 1 if a request failed, a page leaked or a process ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from scripts.faults.__main__ import settle
from scripts.faults.clients import arrive
from scripts.faults.system import System, running
from scripts.faults.watch import Watch
from scripts.launcher.__main__ import Parser
from scripts.launcher.cluster import ClusterError, Shape
from scripts.launcher.model import ModelError, obtain
from scripts.launcher.show import Progress
from scripts.load import arrivals
from scripts.load.client import Record, look, send
from scripts.load.results import quantile
from scripts.load.texts import Writer
from scripts.load.workloads import WorkloadError, load

PATIENCE_S = 300.0
LEAST_PAGES = 128
WINDOW_S = 300.0
"""The same lengths come at the same times again after so long: near the goodput the bursts that chance makes would decide otherwise."""
LEAST_WINDOWS = 4
"""In a run that is too short for them windows are shorter."""
SAY_S = 60.0


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="./scripts/soak", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--goodput", type=float, default=1.0, help="requests a second that ./scripts/goodput found")
    parser.add_argument("--fraction", type=float, default=0.7, help="of it that is asked")
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of the run before memory counts")
    parser.add_argument("--workload", default="chatbot", help="whose lengths are asked")
    parser.add_argument("--length-scale", type=float, default=0.25)
    parser.add_argument("--prefill", type=int, default=1)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--pages", type=int, default=512, help="of each worker's pool, 16 tokens each")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args(argv)
    if min(chosen.minutes, chosen.goodput, chosen.fraction, chosen.length_scale, chosen.prefill, chosen.decode, chosen.gateways) <= 0:
        parser.error("minutes, rates and counts must be above 0")
    if chosen.pages < LEAST_PAGES:
        parser.error(f"--pages must be at least {LEAST_PAGES}: the longest request needs them")
    if not 0 <= chosen.warm_up < 1:
        parser.error("--warm-up must be at least 0 and below 1")
    return chosen


def schedule(seconds: float, rate: float, seed: int) -> tuple[float, list[list[float]]]:
    """(length of a window, when its requests are due in each): Poisson arrivals within one, repeated."""
    window_s = min(WINDOW_S, seconds / LEAST_WINDOWS)
    times = arrivals.gamma(max(2, round(window_s * rate)), rate, 1.0, seed)
    fit = window_s / (times[-1] + 1 / rate)
    return window_s, [[number * window_s + at * fit for at in times] for number in range(round(seconds / window_s))]


def times(records: Sequence[Record], windows: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """TTFT in milliseconds of the requests due in each window."""
    found = []
    for window in windows:
        part = [record for record in records if window[0] <= record.due_s <= window[-1]]
        served = [record.served.ttft_s for record in part if record.error is None]
        found.append({"requests": len(part), "p50_ms": _ms(quantile(served, 0.5)), "p90_ms": _ms(quantile(served, 0.9))})
    return found


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else round(1000 * seconds, 1)


def numbers(windows: Sequence[Sequence[float]], shapes: int) -> list[int]:
    """Of the questions, in order: each window asks the same lengths, with other text (`Writer.question`)."""
    apart = shapes * -(-max(map(len, windows)) // shapes)
    return [window * apart + at for window, times in enumerate(windows) for at in range(len(times))]


async def play(
    system: System, writer: Writer, windows: Sequence[Sequence[float]], shapes: int, say: Progress
) -> tuple[list[Record], Watch]:
    due = [at for window in windows for at in window]
    questions = numbers(windows, shapes)
    servers = [await look(url) for url in system.cluster.urls]
    watch = Watch(system, lambda: 0.0)
    records: list[Record] = []
    start = time.monotonic()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=PATIENCE_S) as client:

        async def one(number: int) -> None:
            question = await asyncio.to_thread(writer.question, questions[number])
            records.append(await send(client, servers[number % len(servers)], question, due[number], start))
            if records[-1].error is not None:
                say(f"request {number}: {records[-1].error}")

        async def tell() -> None:
            while True:
                await asyncio.sleep(SAY_S)
                say(f"{len(records)} of {len(due)} answered")

        async with asyncio.TaskGroup() as tasks:
            aside = [tasks.create_task(watch.run()), tasks.create_task(tell())]
            await arrive(due, start, one)
            for task in aside:
                task.cancel()
    return records, watch


def main() -> int:
    chosen = options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say = Progress()
    try:
        model = obtain(None, say)
        workload = load(chosen.workload, 2048, chosen.seed, chosen.length_scale)
        writer = Writer(model, workload, chosen.seed)
        window_s, windows = schedule(60 * chosen.minutes, chosen.goodput * chosen.fraction, chosen.seed)
        shape = Shape(
            model=model,
            prefill=chosen.prefill,
            decode=chosen.decode,
            gateways=chosen.gateways,
            dtype=chosen.dtype,
            worker_flags={"max_request_tokens": "2048", "pages": str(chosen.pages)},
        )
        with (
            tempfile.TemporaryDirectory(prefix="baton-soak-") as scratch,
            running(shape, cut=False, clocks=False, persistent=False, folder=Path(scratch), say=say) as system,
        ):
            records, watch = asyncio.run(play(system, writer, windows, len(workload.shapes), say))
            left = settle(system)
            dead = [f"{child.name}: {child.last_words()}" for child in system.cluster.children.values() if not child.alive]
    except (ClusterError, ModelError, WorkloadError, httpx.HTTPError, RuntimeError) as error:
        print(f"./scripts/soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    errors = Counter(record.error for record in records if record.error is not None)
    result = {
        "minutes": chosen.minutes,
        "rate": chosen.goodput * chosen.fraction,
        "requests": len(records),
        "errors": dict(errors),
        "recovered": sum(record.attempts > 1 for record in records),
        "window_s": window_s,
        "ttft": times(records, windows),
        "leaked": left,
        "ended": dead,
        "memory_mib_an_hour": watch.memory(60 * chosen.minutes * chosen.warm_up),
    }
    print(json.dumps(result), flush=True)
    return int(bool(errors or left or dead or not records))


if __name__ == "__main__":
    sys.exit(main())
