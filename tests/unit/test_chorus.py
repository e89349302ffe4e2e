"""Answers spoken at once: errors, endings, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common.errors import Unavailable
from common.messages import Sampling, Token
from gateway.ask import Ask, Timeline, Update
from gateway.chorus import Chorus
from gateway.prompts import Model
from gateway.speech import Speech

ASK = Ask([1, 2, 3], Sampling(), 100, n=2)


class Told:
    """An answer of as many tokens as wanted, or an error; without an end if `endless`."""

    def __init__(self, order: list[int], number: int, tokens: int, *, error: bool = False, endless: bool = False) -> None:
        self.timeline = Timeline()
        self.cancelled = False
        self.tokens = len(ASK.prompt)
        self._order, self._number, self._tokens, self._error, self._endless = order, number, tokens, error, endless

    async def __aiter__(self) -> AsyncIterator[Update]:
        for index in range(self._tokens):
            await asyncio.sleep(0)
            self.tokens += 1
            yield Update([Token(index, 100)])
        if self._endless:
            await asyncio.Event().wait()
        yield Update([], error=Unavailable("gone")) if self._error else Update([], finish="stop")

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self._order.append(self._number)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return Model(smollm2, "m")


def chorus(model: Model, *told: Told) -> Chorus:
    return Chorus([Speech(one, ASK, [], model) for one in told], 2)


async def test_pieces_come_as_they_are_said(model: Model) -> None:
    order: list[int] = []
    found = chorus(model, Told(order, 0, 3), Told(order, 1, 5))
    said = [pair async for pair in found.pieces()]
    assert [sum(choice == wanted and bool(piece.text) for choice, piece in said) for wanted in (0, 1)] == [3, 5]
    assert sorted(choice for choice, piece in said if piece.finish) == [0, 1]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 8)


async def test_what_nobody_has_taken_was_computed_all_the_same(model: Model) -> None:
    told = [Told([], 0, 3), Told([], 1, 3)]
    found = chorus(model, *told)
    told[0].tokens, told[1].tokens = len(ASK.prompt) + 70, len(ASK.prompt) + 30
    assert (found.computed_tokens, found.usage.completion_tokens) == (3 + 100, 0)


async def test_one_that_fails_ends_them_all(model: Model) -> None:
    order: list[int] = []
    told = [Told(order, 0, 2, endless=True), Told(order, 1, 1, error=True)]
    found = chorus(model, *told)
    with pytest.raises(Unavailable):
        async for _ in found.pieces():
            pass
    found.cancel()
    assert all(one.cancelled for one in told)


async def test_leaving_early_leaves_no_task(model: Model) -> None:
    order: list[int] = []
    before = asyncio.all_tasks()
    pieces = chorus(model, Told(order, 0, 1, endless=True), Told(order, 1, 1, endless=True)).pieces()
    await anext(pieces)
    await pieces.aclose()
    assert asyncio.all_tasks() == before and order == [1, 0], "the others may travel with the first one"


def test_the_last_is_cancelled_first(model: Model) -> None:
    order: list[int] = []
    chorus(model, Told(order, 0, 1), Told(order, 1, 1)).cancel()
    assert order == [1, 0]
