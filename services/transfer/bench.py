"""How fast pages move between two processes, one core each, against memcpy of the same minute. Run by scripts/transfer_bench.

A transfer is timed from `push` in one process to `Arrived` in the other (one host, one monotonic clock). With checksums on that includes
both sides' checksums. memcpy copies 64 MiB (on a GPU 1 GiB) by one thread on the receiver's core: the bound, for each byte is copied once.
The kinds of measurement take turns, and medians are compared: a busy machine then slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from common.messages import Shard
from services.transfer.runs import RUN_BYTES, most_pages

KIB, MIB = 1 << 10, 1 << 20
PAGE_BYTES = 368_640
"""A page of SmolLM2-135M: 30 layers, keys and values, 3 heads, 16 tokens, 64 dimensions, bf16."""
SIZES = tuple(4 * KIB << shift for shift in range(0, 17, 2))
"""4 KiB to 256 MiB."""
MEMCPY_BYTES = {"cpu": 64 * MIB, "cuda": 1024 * MIB}
"""On a device so many that starting and awaiting a copy takes no part of it, and no cache holds them."""
SHARD = Shard(0, (0, 30), (0, 3))
ANSWER_S = {"cpu": 60.0, "cuda": 25.0}
"""The first answer comes after the imports, and the start of CUDA and UCX."""
END_S = 10.0
"""For processes that have reported all to end."""
SETTLE_S = 0.02
"""Between two transfers, so that each starts with both sides asleep, as in service."""


@dataclass(frozen=True, slots=True)
class Work:
    """A transfer of `pages` pages of `page_bytes`, `repeats` times each way of measuring; up to `run_pages` of them as one message."""

    pages: int
    page_bytes: int
    repeats: int
    run_pages: int = 1

    @property
    def bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def starts(self) -> tuple[int, ...]:
        """Where messages begin: all pages lie together."""
        return tuple(range(0, self.pages, self.run_pages))


def plan(sizes: tuple[int, ...], page_bytes: int, repeats: int, run_bytes: int) -> list[Work]:
    """Whole pages nearest to each size; a size below a page is one page of that size. Pages are multiples of 4 bytes."""
    sized = ((1, size) if size < page_bytes else (round(size / page_bytes), page_bytes) for size in sizes)
    return [Work(pages, each, repeats, most_pages(each, run_bytes)) for pages, each in sized]


def receive(core: int, works: list[Work], device: str, wire: Connection) -> None:
    """The receiving process: grants, `Arrived`, memcpy."""
    os.sched_setaffinity(0, {core})
    copy = _copying(device)
    grant = 0
    for work in works:
        ends = [_End(work, checksums, device) for checksums in (False, True)]
        for _ in range(work.repeats + 1):
            for end in ends:
                grant += 1
                order = tuple(range(work.pages))
                end.transfer.expect("sender", grant, order, order, (SHARD,), work.starts)
                wire.send(end.next()[1].ranks[0])
                at, arrived = end.next()
                wire.send((at, arrived.checksums))
                wire.recv()
            began = time.monotonic()
            copy()
            wire.send(time.monotonic() - began)
        for end in ends:
            end.transfer.close()


def _copying(device: str) -> Callable[[], None]:
    """Copies `MEMCPY_BYTES` of the device, and returns when it is done."""
    import numpy as np
    import torch

    if device == "cpu":
        source, target = (np.ones(MEMCPY_BYTES[device], dtype=np.uint8) for _ in range(2))
        return lambda: np.copyto(target, source)
    there, to = (torch.ones(MEMCPY_BYTES[device], dtype=torch.uint8, device=device) for _ in range(2))

    def copy() -> None:
        to.copy_(there)
        torch.cuda.synchronize()

    return copy


def send(core: int, works: list[Work], device: str, wire: Connection, results: Connection) -> None:
    """The sending process: pushes, and reports (work, kind, seconds); the first round of each work is not counted."""
    os.sched_setaffinity(0, {core})
    handoff = 0
    for work in works:
        ends = {"plain": _End(work, False, device), "checked": _End(work, True, device)}
        for end in ends.values():
            end.fill()
        for number in range(work.repeats + 1):
            for kind, end in ends.items():
                rank = wire.recv()
                handoff += 1
                order = tuple(range(work.pages))
                time.sleep(SETTLE_S)
                began = time.monotonic()
                end.transfer.push("receiver", rank, handoff, handoff, order, order, work.starts)
                end.transfer.finish_push(handoff, handoff)
                arrived_at, checksums = wire.recv()
                sent = end.next()[1]
                if kind == "checked" and sent.checksums != checksums:
                    raise AssertionError("what arrived is not what was sent")
                wire.send(None)
                if number:
                    results.send((work, kind, arrived_at - began, end.transfer.transport))
            copied_s = wire.recv()
            if number:
                results.send((work, "memcpy", copied_s, ""))
        for end in ends.values():
            end.transfer.close()
    results.send(None)


class _End:
    """One transfer over pages of its own, with its events in a queue."""

    def __init__(self, work: Work, checksums: bool, device: str) -> None:
        import torch

        from common.messages import Layout
        from services.engine.pool import Pool
        from services.transfer.ucx import UcxTransfer

        torch.set_num_threads(1)
        self._answer_s = ANSWER_S[device]
        self._events: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
        layout = Layout(layers=1, kv_heads=1, page_tokens=1, head_dim=work.page_bytes // 4, dtype="bfloat16")
        self._pages = Pool(layout, work.pages, device).bytes
        self._pages.fill_(1)
        self.transfer = UcxTransfer(self._pages, SHARD, lambda event: self._events.put((time.monotonic(), event)), checksums=checksums)

    def fill(self) -> None:
        self._pages.random_()
        if self._pages.is_cuda:
            import torch

            torch.cuda.synchronize()  # UCX does not know streams

    def next(self) -> tuple[float, Any]:
        """When it happened, and what."""
        return self._events.get(timeout=self._answer_s)


@dataclass(frozen=True)
class Measured:
    """Median seconds by work and kind, of the works that were measured whole; `error` if the processes stopped before all were."""

    medians: dict[Work, dict[str, float]]
    transport: str
    error: str | None


def measure(works: list[Work], device: str = "cpu") -> Measured:
    """Progress on stderr."""
    cores = sorted(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    results, reported = spawn.Pipe(duplex=False)
    processes = [
        spawn.Process(target=send, args=(cores[0], works, device, here, reported), daemon=True),
        spawn.Process(target=receive, args=(cores[-1], works, device, there), daemon=True),
    ]
    for process in processes:
        process.start()
    for end in (here, there, reported):
        end.close()
    seconds: dict[Work, dict[str, list[float]]] = {}
    transport, total, done = "", sum(3 * work.repeats for work in works), 0
    error: str | None = "the measuring processes have stopped answering"
    try:
        while results.poll(ANSWER_S[device]):
            report = _received(results)
            if report is None:
                error = None if done == total else "a measuring process has ended"
                break
            work, kind, taken_s, carrier = report
            seconds.setdefault(work, {}).setdefault(kind, []).append(taken_s)
            transport, done = carrier or transport, done + 1
            print(f"\r{done * 100 // total:3d} %  {work.bytes / MIB:8.3f} MiB", end="", file=sys.stderr, flush=True)
        for process in processes:
            process.join(END_S if error is None else 0)
    finally:
        print(file=sys.stderr)
        for process in processes:
            process.kill()
    whole = [work for work, kinds in seconds.items() if sum(map(len, kinds.values())) == 3 * work.repeats]
    medians = {work: {kind: statistics.median(times) for kind, times in seconds[work].items()} for work in whole}
    return Measured(medians, transport, error)


def _received(results: Connection) -> Any:
    """None at the end, also of a process that has died."""
    try:
        return results.recv()
    except EOFError:
        return None


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _number(least: int, multiple: int = 1) -> Callable[[str], int]:
    """Of an option: no less, and a multiple."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        if value % multiple:
            raise argparse.ArgumentTypeError(f"must be a multiple of {multiple}")
        return value

    return number


def _arguments() -> argparse.Namespace:
    options = Parser(prog="transfer_bench", description="Pages over UCX between two processes, against memcpy.")
    options.add_argument("--page-bytes", type=_number(4, 4), default=PAGE_BYTES, help="bytes of a page [%(default)s, SmolLM2-135M in bf16]")
    options.add_argument("--run-bytes", type=_number(0), help="most of a message of several pages; 0: each by itself [as in service]")
    options.add_argument("--sizes", type=_number(4), nargs="+", default=SIZES, metavar="BYTES", help="[4 KiB to 256 MiB]")
    options.add_argument("--repeats", type=_number(1), default=15, help="of each measurement [%(default)s]")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the pages lie [%(default)s]")
    chosen = options.parse_args()
    if chosen.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            options.error("device is cuda, but torch sees no CUDA device")
    return chosen


def main() -> None:
    chosen = _arguments()
    run_bytes = RUN_BYTES[chosen.device] if chosen.run_bytes is None else chosen.run_bytes
    found = measure(plan(tuple(chosen.sizes), chosen.page_bytes, chosen.repeats, run_bytes), chosen.device)
    if found.error is not None:
        sys.exit(f"transfer_bench: {found.error}")
    rows = []
    heads = ("bytes", "pages", "messages", "plain GB/s", "of memcpy", "checked GB/s", "of memcpy", "memcpy", "plain µs")
    print("{:>11} {:>6} {:>8} {:>11} {:>10} {:>13} {:>10} {:>7} {:>9}".format(*heads))
    for work, seconds in found.medians.items():
        memcpy = MEMCPY_BYTES[chosen.device] / seconds["memcpy"] / 1e9
        plain, checked = (work.bytes / seconds[kind] / 1e9 for kind in ("plain", "checked"))
        print(
            f"{work.bytes:11d} {work.pages:6d} {len(work.starts):8d} {plain:11.2f} {plain / memcpy:10.2f} {checked:13.2f}"
            f" {checked / memcpy:10.2f} {memcpy:7.2f} {seconds['plain'] * 1e6:9.0f}"
        )
        rows.append(
            {
                "bytes": work.bytes,
                "pages": work.pages,
                "messages": len(work.starts),
                "plain_gb_s": round(plain, 3),
                "checked_gb_s": round(checked, 3),
                "memcpy_gb_s": round(memcpy, 3),
                "plain_of_memcpy": round(plain / memcpy, 3),
                "checked_of_memcpy": round(checked / memcpy, 3),
                "plain_s": seconds["plain"],
                "checked_s": seconds["checked"],
            }
        )
    facts = {"page_bytes": chosen.page_bytes, "run_bytes": run_bytes, "transport": found.transport}
    print(json.dumps({"benchmark": "transfer", **facts, "rows": rows}))


if __name__ == "__main__":
    main()
