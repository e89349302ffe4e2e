"""What a long prompt does to somebody else's tokens: time between tokens of running streams, without and with long prompts arriving.

Some streams write all the time (when one ends the next begins). In the quiet half nothing else happens; in the loud half long prompts (of
1,024 to 2,048 tokens by default) arrive at even times, each for a short answer. Gaps count by the moment they end; the first token's wait
is none.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass
from typing import Any

import httpx

from scripts.load.client import Record, send
from scripts.load.results import spread
from scripts.load.targets import Target
from scripts.load.texts import Writer
from scripts.load.workloads import Shape, Workload

LONG_TOKENS = (1024, 1365, 1706, 2048)
SHORT_TOKENS = 64
WRITTEN_TOKENS = 256
MOST_ASKED = 100_000
SETTLE_S = 2.0
"""Left out at the start of each half, while streams begin or the first long prompt is still queued (by default)."""


@dataclass(frozen=True)
class Load:
    """`every_s`: between two long prompts; it must be longer than one takes, or they pile up."""

    streams: int = 4
    half_s: float = 30.0
    every_s: float = 4.0
    long_tokens: tuple[int, ...] = LONG_TOKENS
    answer_tokens: int = 2
    """Of the long prompts: so few are written where the prompt was read; more than `short_tokens` are handed over."""
    written_tokens: int = WRITTEN_TOKENS
    """Of a stream's answer."""
    settle_s: float = SETTLE_S


def workload(context_tokens: int, load: Load) -> Workload:
    """The streams' shape, then those of the long prompts, cut to what the context holds."""
    long = (Shape(min(tokens, context_tokens - load.answer_tokens), load.answer_tokens) for tokens in load.long_tokens)
    streams = Shape(SHORT_TOKENS, max(2, min(load.written_tokens, context_tokens - SHORT_TOKENS)))
    return Workload("interference", (streams, *long), "arena_hard_prompts.jsonl.gz")


async def measure(target: Target, writer: Writer, load: Load, first: int) -> dict[str, Any]:
    """Both halves on one target. `first`: number of the first question, so that no text comes twice."""
    start = time.monotonic()
    until = start + 2 * load.half_s
    written: list[Record] = []
    numbers = itertools.count(first * MOST_ASKED)
    shapes = 1 + len(load.long_tokens)

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120.0) as client:

        async def write() -> None:
            while time.monotonic() < until:
                question = writer.question(next(numbers) * shapes)
                record = await send(client, target.server, question, 0.0, start)
                written.append(record)
                if record.error is not None:
                    await asyncio.sleep(0.5)

        async def interrupt() -> list[Record]:
            due = [load.half_s + load.every_s * n for n in range(int(load.half_s / load.every_s))]
            questions = [writer.question(next(numbers) * shapes + 1 + n % len(load.long_tokens)) for n in range(len(due))]
            return list(await asyncio.gather(*(send(client, target.server, q, at, start) for q, at in zip(questions, due, strict=True))))

        async with asyncio.TaskGroup() as tasks:
            loud = tasks.create_task(interrupt())
            for _ in range(load.streams):
                tasks.create_task(write())
    long = loud.result()
    halves = [between(written, load.settle_s, load.half_s), between(written, load.half_s + load.settle_s, 2 * load.half_s)]
    quiet, noisy = (spread(gaps) for gaps in halves)
    ratio = noisy["p99"] / quiet["p99"] if quiet["p99"] and noisy["p99"] else None
    return {
        "quiet_s": quiet,
        "loud_s": noisy,
        "longest_s": [round(max(gaps, default=0.0), 4) for gaps in halves],
        "p99_ratio": None if ratio is None else round(ratio, 3),
        "tokens": [len(gaps) for gaps in halves],
        "long_prompts": len(long),
        "long_ttft_s": spread([record.served.ttft_s for record in long if record.error is None]),
        "failed": sum(record.error is not None for record in (*long, *written)),
    }


def between(records: list[Record], low_s: float, high_s: float) -> list[float]:
    """Gaps between a stream's tokens that end in this time, seconds."""
    pairs = ((a, b) for record in records for a, b in zip(record.at_s, record.at_s[1:], strict=False))
    return [later - sooner for sooner, later in pairs if low_s <= later < high_s]
