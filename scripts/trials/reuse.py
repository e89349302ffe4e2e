"""What a prompt whose beginning has been read already spares its client: TTFT of the second of two requests that begin alike."""

from __future__ import annotations

import asyncio
import random
import statistics
from dataclasses import dataclass

import httpx

from tests.integration.talk import body, listen

SHARED_TOKENS = 1024
OWN_TOKENS = 32
IDS = range(1000, 40_000)
"""Any text will do: what is drawn from it does not matter, and no pair begins like another."""


@dataclass(frozen=True)
class Reuse:
    """Medians over the pairs; in an idle system."""

    shared_tokens: int
    own_tokens: int
    first_ms: float
    second_ms: float
    ratio: float
    cached_tokens: int
    """That the second request was told of, at least."""


async def reuse(url: str, pairs: int) -> Reuse:
    draw = random.Random(1)
    rows = []
    async with httpx.AsyncClient() as client:
        for _ in range(pairs):
            shared = draw.choices(IDS, k=SHARED_TOKENS)
            one, two = [await listen(client, url, body([*shared, *draw.choices(IDS, k=OWN_TOKENS)], 4)) for _ in range(2)]
            first, second = one.timeline["ttft_ms"], two.timeline["ttft_ms"]
            rows.append((first, second, second / first, two.cached_tokens))
            await asyncio.sleep(0.2)
    first_ms, second_ms, ratio = (round(statistics.median(row[i] for row in rows), 3) for i in range(3))
    return Reuse(SHARED_TOKENS, OWN_TOKENS, first_ms, second_ms, ratio, min(row[3] for row in rows))
