"""A desk without a fleet: answers with given token ids, at a given pace, and fails when told to."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from common.errors import RequestError
from common.messages import Identity, Logprob, Token, WorkerBeat
from gateway.ask import Ask, Timeline, Update


@dataclass(frozen=True)
class Script:
    """What becomes of one ask."""

    ids: list[int] = field(default_factory=list)
    """Answered in this order; then comes `stop`. Empty: the prompt's own."""
    endless: bool = False
    """Begins anew with the first id for ever, up to max_tokens."""
    together: int = 1
    """Tokens in an update."""
    before_s: float = 0.0
    pause_s: float = 0.0
    """Before the first update, and before each other one."""
    refused: Exception | None = None
    """Raised by submit."""
    error: RequestError | None = None
    """The last update, instead of a reason to finish."""
    ahead: int = 0
    """Tokens that have come and wait to be taken."""
    breaks: bool = False
    """Raises what nobody expects, after the ids."""


class EchoAnswer:
    """One running answer."""

    def __init__(self, ask: Ask, script: Script) -> None:
        self.timeline = Timeline(0.001, 0.02, 0.003, 0.004, 0.05, 0.025, 0.0)
        self.cancelled = threading.Event()
        """Set when the gateway has let go, at the end or before."""
        self.given = 0
        """Tokens handed over so far."""
        self.complete = False
        self._ask = ask
        self._script = script

    async def __aiter__(self) -> AsyncIterator[Update]:
        script, most = self._script, self._ask.max_tokens
        await asyncio.sleep(script.before_s)
        ids = script.ids or self._ask.prompt
        source = itertools.cycle(ids) if script.endless else iter(ids)
        for number in itertools.count():
            if number and script.pause_s:
                await asyncio.sleep(script.pause_s)
            batch = list(itertools.islice(source, min(script.together, most - self.given)))
            ends = next((at for at, id in enumerate(batch) if id in self._ask.stop_ids), None)
            if ends is not None:
                batch = batch[: ends + 1]
            tokens = [self._token(self.given + at, id) for at, id in enumerate(batch)]
            self.given += len(tokens)
            self.timeline.total_s = self.timeline.total_s + 0.1
            over = ends is not None or len(batch) < script.together
            if over and script.breaks:
                raise ZeroDivisionError("as told")
            if over and script.error is not None:
                yield Update(tokens, error=script.error)
                return
            if over or self.given >= most:
                self.complete = True
                yield Update(tokens, finish="stop" if ends is not None or self.given < most else "length")
                return
            yield Update(tokens)

    @property
    def tokens(self) -> int:
        return len(self._ask.prompt) + min(self.given + self._script.ahead, self._ask.max_tokens)

    def cancel(self) -> None:
        self.cancelled.set()

    def _token(self, index: int, id: int) -> Token:
        wanted = self._ask.sampling.logprobs
        if wanted < 0:
            return Token(index, id)
        return Token(index, id, Logprob(-0.5, [(id + other, -0.5 - other) for other in range(wanted)]))


class EchoDesk:
    """What the HTTP side is tested against. `scripts` says what becomes of an ask; asks and answers are kept."""

    def __init__(self, identity: Identity | None) -> None:
        self.identity = identity
        self.draining = self.away = False
        self.most_running = 1024
        self.live: dict[str, int] = {"prefill": 1, "decode": 1}
        self.workers: dict[str, WorkerBeat] = {}
        self.running, self.queued, self.recoveries = 0, 0, 0
        self.scripts: Callable[[Ask], Script] = lambda ask: Script()
        self.asks: list[Ask] = []
        self.answers: list[EchoAnswer] = []

    def roles(self) -> dict[str, int]:
        return self.live

    def submit(self, ask: Ask) -> list[EchoAnswer]:
        script = self.scripts(ask)
        self.asks.append(ask)
        if script.refused is not None:
            raise script.refused
        answers = [EchoAnswer(ask, script) for _ in range(ask.n)]
        self.answers += answers
        return answers
