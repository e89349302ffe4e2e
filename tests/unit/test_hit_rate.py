"""How much of the Mooncake trace's prompts the engine finds again, against a plain LRU over the trace's own blocks of the same capacity.

`python -m tests.unit.test_hit_rate` replays the whole trace at several contexts and pool sizes and prints one JSON line for each.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import pytest

from common.messages import Key, Sampling, Token
from scripts.load.workloads import Shape, load
from services.engine import sequence as engine
from services.engine.pages import PagePool
from services.engine.plan import Draw, Granted, StepOutput
from services.engine.policies import Limits
from services.engine.scheduler import Scheduler

PAGE_TOKENS = 16
Side = Literal["prefill", "decode"]


def ids_of(shape: Shape, number: int) -> list[int]:
    """As `scripts/load/texts.py` writes them: equal blocks are equal ids, the last one is the prompt's own."""
    ids = [block * shape.block_tokens + at for block in shape.blocks[:-1] for at in range(shape.block_tokens)][: shape.input_tokens]
    return ids + [-1 - number] * (shape.input_tokens - len(ids))


def bound(shapes: Iterable[Shape], capacity_tokens: int, unit_tokens: int = 1) -> float:
    """Share of the prompts' tokens that an LRU of blocks would have had; nothing of the engine's is used. A prompt's last token is
    computed in any case. `unit_tokens`: only so many at a time can be shared."""
    kept: OrderedDict[int, None] = OrderedDict()
    hits = asked = 0
    for shape in shapes:
        blocks = shape.blocks[:-1]
        known = next((at for at, block in enumerate(blocks) if block not in kept), len(blocks))
        hits += min(known * shape.block_tokens, shape.input_tokens - 1) // unit_tokens * unit_tokens
        asked += shape.input_tokens
        for block in reversed(blocks):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) * shape.block_tokens > capacity_tokens:
            kept.popitem(last=False)
    return hits / asked


class Replay:
    """One worker's scheduler through which the prompts go, `at_once` of them side by side; the device draws the same token for all."""

    def __init__(self, pages: int, side: Side, most_tokens: int) -> None:
        self.pool = PagePool(pages, PAGE_TOKENS, keep_cached=True)
        self.scheduler = Scheduler(self.pool, "prefill_first", Limits(most_tokens, most_tokens, growth_pages=1), reuse="model")
        self._side = side
        self._under_way: list[Key] = []

    def run(self, shapes: Iterable[Shape], at_once: int = 1) -> float:
        """Share of the prompts' tokens that were found in the pool."""
        for number, shape in enumerate(shapes):
            self._ask(number, ids_of(shape, number))
            if len(self._under_way) >= at_once:
                self._end(self._under_way.pop(0))
        while self._under_way:
            self._end(self._under_way.pop(0))
        self.pool.check()
        assert self.pool.available == self.pool.total
        found = self.scheduler.snapshot()
        return found.reused / found.looked_up

    def _ask(self, number: int, ids: list[int]) -> None:
        key = Key(str(number), 0, 0, "x")
        asked = engine.Sequence(key, ids, len(ids), Sampling(), 2, order=float(number), parks=self._side == "prefill")
        if self._side == "prefill":
            self.scheduler.submit(asked)
        else:
            self.scheduler.reserve(("p", number), asked)
        self._under_way.append(key)
        self._step()

    def _step(self) -> None:
        plan = self.scheduler.next()
        for outcome in self.scheduler.take_outcomes():
            if isinstance(outcome, Granted):
                self.scheduler.admit(outcome.handoff, Token(0, -1))
        if plan is not None:
            self.scheduler.commit(plan, StepOutput(tuple(Draw(-1) if chunk.draws else None for chunk in plan.chunks)))

    def _end(self, key: Key) -> None:
        """Handed over by a prefill, finished by a decode."""
        for _ in range(1000):
            self._step()
            sequence = self.scheduler.find(key)
            if self._side == "prefill" and sequence is not None and sequence.index == 1:
                self.scheduler.release(key)
            if self.scheduler.find(key) is None and not self.scheduler.snapshot().inbound:
                return
        raise AssertionError(f"{key} does not end")


@dataclass(frozen=True)
class Row:
    """One replay: shares of the prompts' tokens."""

    context_tokens: int
    block_tokens: int
    pages: int
    side: Side
    at_once: int
    requests: int
    found: float
    bound: float
    bound_in_pages: float
    """What the same LRU gives if only whole pages can be shared: at 2,048 tokens a block of the trace is less than a page."""


def compare(context_tokens: int, pages: int, side: Side, requests: int | None = None, at_once: int = 1) -> Row:
    shapes: Sequence[Shape] = load("mooncake", context_tokens, seed=1).shapes[:requests]
    found = Replay(pages, side, context_tokens).run(shapes, at_once)
    capacity = pages * PAGE_TOKENS
    bounds = bound(shapes, capacity), bound(shapes, capacity, PAGE_TOKENS)
    return Row(context_tokens, shapes[0].block_tokens, pages, side, at_once, len(shapes), *(round(share, 4) for share in (found, *bounds)))


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize(("context_tokens", "pages", "at_once"), [(2048, 2048, 1), (4096, 8192, 1), (4096, 8192, 4), (4096, 60000, 1)])
def test_the_traces_hit_rate_is_near_that_of_an_lru_of_the_same_size(context_tokens: int, pages: int, at_once: int, side: Side) -> None:
    row = compare(context_tokens, pages, side, 2500, at_once)
    print(row)
    assert row.bound - row.found <= 0.05 and row.bound_in_pages - row.found <= 0.01, row


if __name__ == "__main__":
    for context, sizes in ((2048, (2048, 8192)), (8192, (2048, 8192, 32768, 131072)), (32768, (32768, 131072))):
        for size in sizes:
            print(json.dumps([asdict(compare(context, size, where)) for where in get_args(Side)]), flush=True)
