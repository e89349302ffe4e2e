"""The engine's launches seen through HTTP: any server with OpenAI's completions, in turn with the engine itself and the other servers.

Prefill is the time to the answer of one token; prompts are random token ids, new for each request, so that no prefix is found. A decode
step is the median time between tokens of a number of streams, counted from when all of them have begun until the first one ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx
from msgspec import Struct

from scripts.load.client import Server, look
from services.engine.bench.launches import prompt_name, step_name
from services.engine.bench.rounds import Times

PROMPTS = (512, 1024)
BATCHES = (1, 8, 16)
CONTEXT = 512
STREAM_TOKENS = 48
"""Of a single stream; more streams write longer, so that all of them overlap."""
TIMEOUT_S = 300.0


class Peer(Struct, frozen=True):
    """Median seconds: `prefill` by prompt length, `decode` by batch at context 512; None where the streams never overlapped."""

    name: str
    url: str
    prefill: dict[int, float | None]
    decode: dict[int, float | None]


async def ask(client: httpx.AsyncClient, server: Server, prompt: list[int], tokens: int) -> list[float]:
    """When each piece of the answer came. Raises RuntimeError with the server's words."""
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    at: list[float] = []
    async with client.stream("POST", f"{server.url}/v1/completions", json=body, headers=server.headers) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"{server.url}: {reply.status_code} {(await reply.aread()).decode(errors='replace')[:200]}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(f"{server.url}: {chunk['error']}")
            if chunk.get("choices"):
                at.append(time.monotonic())
    if not at:
        raise RuntimeError(f"{server.url}: an answer without a token")
    return at


def overlap(streams: Sequence[Sequence[float]]) -> list[float]:
    """Gaps between tokens of each stream while all of them run."""
    begin, end = max(stream[0] for stream in streams), min(stream[-1] for stream in streams)
    return [b - a for stream in streams for a, b in pairwise(stream) if begin <= a and b <= end]


@dataclass(frozen=True)
class Through:
    """One launch through one server. `batch` 0: the first token of a prompt of `tokens`; otherwise a step of so many streams."""

    peer: str
    server: Server
    vocabulary: int
    tokens: int
    batch: int
    cores: frozenset[int]
    """Where this process waits meanwhile: not on the server's cores, if there are others."""

    @property
    def name(self) -> str:
        return f"{self.peer}: {step_name(self.batch, self.tokens) if self.batch else prompt_name((self.tokens,))}"

    def seconds(self) -> list[float]:
        """Raises httpx.HTTPError and RuntimeError."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            return asyncio.run(self.take())
        finally:
            os.sched_setaffinity(0, before)

    async def take(self, transport: httpx.AsyncBaseTransport | None = None) -> list[float]:
        async with httpx.AsyncClient(timeout=TIMEOUT_S, transport=transport) as client:
            if not self.batch:
                began = time.monotonic()
                return [(await ask(client, self.server, self._prompt(self.tokens), 1))[0] - began]
            written = STREAM_TOKENS + 16 * (self.batch - 1)
            streams = (ask(client, self.server, self._prompt(self.tokens - written // 2), written) for _ in range(self.batch))
            gaps = overlap(await asyncio.gather(*streams))
            return [statistics.median(gaps)] if gaps else []

    def _prompt(self, tokens: int) -> list[int]:
        """Low ids are often special ones."""
        return [random.randrange(min(1000, self.vocabulary // 2), self.vocabulary) for _ in range(tokens)]


def samples(servers: dict[str, str], vocabulary: int, cores: frozenset[int]) -> list[Through]:
    """Of servers by name and URL. Raises httpx.HTTPError and RuntimeError."""
    found = {name: asyncio.run(look(url)) for name, url in servers.items()}
    launches = [(length, 0) for length in PROMPTS] + [(CONTEXT, batch) for batch in BATCHES]
    return [Through(name, server, vocabulary, *launch, cores) for launch in launches for name, server in found.items()]


def result(name: str, url: str, times: Mapping[str, Times]) -> Peer:
    def of(launch: str) -> float | None:
        taken = times.get(f"{name}: {launch}")
        return None if taken is None else taken.median

    prefill = {length: of(prompt_name((length,))) for length in PROMPTS}
    return Peer(name, url, prefill, {batch: of(step_name(batch, CONTEXT)) for batch in BATCHES})


def table(peers: Sequence[Peer], times: Mapping[str, Times]) -> str:
    """Milliseconds; behind each, how many times the engine's own (in this process) and how many times the first server's it is."""
    own = result("", "", {f": {name}": taken for name, taken in times.items()})
    lines = ["", f"{'through HTTP':24} {'engine':>10}" + "".join(f" {peer.name[:12]:>12} {'÷engine':>8} {'÷first':>7}" for peer in peers)]
    for length in PROMPTS:
        lines.append(_line(prompt_name((length,)), own.prefill[length], [peer.prefill[length] for peer in peers]))
    for batch in BATCHES:
        lines.append(_line(step_name(batch, CONTEXT), own.decode[batch], [peer.decode[batch] for peer in peers]))
    return "\n".join(lines)


def _line(name: str, own: float | None, others: list[float | None]) -> str:
    cells = f"{name:24} {_cell(own, 1e3):>10}"
    for other in others:
        ratios = (_ratio(other, own), _ratio(other, others[0]))
        cells += f" {_cell(other, 1e3):>12} {_cell(ratios[0], 1):>8} {_cell(ratios[1], 1):>7}"
    return cells


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _cell(value: float | None, times: float) -> str:
    return "-" if value is None else f"{value * times:.2f}"
