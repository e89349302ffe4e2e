"""`./scripts/handoff_bench`: from the prefill's first token to the decode's next one, seen by a client, in an idle system.

The bound is the transfer of the last pages plus one decode step; what is above it is the overhead of handing over. Prompts of three
lengths, one request at a time; medians. Then the same system with prefix reuse: what a shared beginning spares.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import httpx

from scripts.launcher.__main__ import Parser, wait_served
from scripts.launcher.cluster import Cluster, Shape
from scripts.launcher.model import obtain
from scripts.launcher.show import Progress
from scripts.trials.reuse import reuse
from tests.integration.talk import MODEL, body, listen
from tests.references import references

TOKENS = 24
STEADY = slice(3, 20)
"""Gaps between later tokens: one decode step each."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds, medians over the repeats."""

    prompt_tokens: int
    first_to_next_ms: float
    transfer_ms: float
    decode_queue_ms: float
    decode_step_ms: float
    overhead_ms: float
    """first to next, less transfer and one decode step."""


async def measure(url: str, prompt: list[int], repeats: int, model: str = MODEL) -> Cost:
    rows = []
    async with httpx.AsyncClient() as client:
        for _ in range(repeats):
            heard = await listen(client, url, body(prompt, TOKENS, model=model))
            gaps = [1000 * (later - sooner) for sooner, later in zip(heard.at, heard.at[1:], strict=False)]
            step = statistics.median(gaps[STEADY])
            transfer = heard.timeline["transfer_ms"]
            rows.append((gaps[0], transfer, heard.timeline["decode_queue_ms"], step, gaps[0] - transfer - step))
    return Cost(len(prompt), *(round(statistics.median(column), 2) for column in zip(*rows, strict=True)))


def main() -> int:
    parser = Parser(prog="./scripts/handoff_bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    chosen = parser.parse_args()
    if chosen.repeats < 1:
        parser.error("--repeats must be at least 1")
    say = Progress()
    with served(say, prefix_reuse="false") as cluster:  # every repeat hands over the same prompt
        prompts = sorted((one["prompt"] for one in references()), key=len)
        asyncio.run(measure(cluster.urls[0], prompts[0], 2))
        found = []
        for prompt in (prompts[3], prompts[-10], prompts[-1]):
            found.append(asyncio.run(measure(cluster.urls[0], prompt, chosen.repeats)))
            say(str(found[-1]))
    with served(say, prefix_reuse="true") as cluster:
        spared = asyncio.run(reuse(cluster.urls[0], chosen.repeats))
        say(str(spared))
    print(json.dumps({"repeats": chosen.repeats, "costs": [asdict(cost) for cost in found], "reuse": asdict(spared)}), flush=True)
    return 0


@contextmanager
def served(say: Progress, **flags: str) -> Iterator[Cluster]:
    """A system of one prefill and one decode that serves."""
    pools = {"max_request_tokens": "2048", "pages": "640"}
    with Cluster(Shape(model=obtain(None, say), model_name="smollm2", worker_flags={**pools, **flags}), say) as cluster:
        cluster.start()
        wait_served(cluster.urls[0])
        yield cluster


if __name__ == "__main__":
    sys.exit(main())
