"""The clients of a chaos run: open-loop, each with a manner of reading, each with a reference to compare its answer with."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from scripts.faults.score import Answer, Manner
from scripts.load.client import lines
from scripts.load.workloads import Shape
from tests.references import references

MANNERS: dict[Manner, float] = {"plain": 0.8, "slow": 0.08, "stalled": 0.06, "leaving": 0.06}
NEAREST = 4
"""Prompts whose length is nearest to the wanted one, of which one is asked."""
SLOW_S = 0.15
"""Between two pieces that a slow client takes."""
STALLED_S = (2.0, 12.0)
"""A stalled client takes nothing for so long, once."""
SMALL_BUFFER = 4096
"""Bytes that the kernel keeps for a client that does not read."""
PATIENCE_S = 240.0
"""Whoever is not served by then is lost."""
AGAIN_S = 0.5
"""A client that was refused without being told when to come back."""


@dataclass(frozen=True)
class Question:
    """`text`: what each of `n` greedy answers must be."""

    prompt: list[int]
    tokens: int
    text: str
    manner: Manner
    n: int = 1

    @property
    def body(self) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": "smollm2", "prompt": self.prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True}
        asked |= {"stream": True, "stream_options": {"include_usage": True}, "timeline": True, "n": self.n}
        return asked | ({"logprobs": 5} if self.manner == "stalled" else {})


class Questions:
    """Questions of a workload's lengths, out of the prompts whose greedy answers are known."""

    def __init__(self, model: Path, shapes: Sequence[Shape], seed: int) -> None:
        from transformers import AutoTokenizer

        self._known = references()
        self._shapes = shapes
        self._seed = seed
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)

    def question(self, number: int) -> Question:
        rng = random.Random(f"{self._seed} {number}")
        shape = self._shapes[number % len(self._shapes)]
        near = sorted(self._known, key=lambda one: abs(len(one["prompt"]) - shape.input_tokens))[:NEAREST]
        manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
        return self._make(rng.choice(near), shape.output_tokens, manner, 2 if manner == "plain" and rng.random() < 0.1 else 1)

    def poison(self, token: int) -> Question:
        """Kills every worker that launches it, if workers die of this token."""
        one = self._known[0]
        return self._make({**one, "prompt": [token, *one["prompt"]]}, 16, "poison", 1)

    def _make(self, known: dict[str, Any], tokens: int, manner: Manner, n: int) -> Question:
        output = known["output"][:tokens]
        text = self._tokenizer.decode(output, skip_special_tokens=True)
        return Question(known["prompt"], len(output), text, manner, n)


@dataclass(frozen=True)
class Gateway:
    """One that serves. `life`: another after each start."""

    name: str
    url: str
    life: int


@dataclass
class Crowd:
    """Asks questions of whatever gateways `serving` names; `ended(gateway)` says that one was killed."""

    serving: Callable[[], list[Gateway]]
    ended: Callable[[Gateway], bool]
    seed: int
    _clients: dict[bool, httpx.AsyncClient] = field(default_factory=dict)

    async def __aenter__(self) -> Crowd:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        options = [(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)]
        for small in (False, True):
            transport = httpx.AsyncHTTPTransport(limits=limits, socket_options=options if small else None)
            self._clients[small] = httpx.AsyncClient(transport=transport, timeout=PATIENCE_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients.values():
            await client.aclose()

    async def ask(self, question: Question, number: int) -> Answer:
        """Its answer, however it ended. A client that is refused before the first byte asks the next gateway, as a front would."""
        answer = Answer(question.manner, [question.text] * question.n, question.tokens, [""] * question.n)
        rng = random.Random(f"{self.seed} client {number}")
        try:
            async with asyncio.timeout(PATIENCE_S):
                wait_s = await self._once(question, answer, rng)
                while wait_s is not None:
                    await asyncio.sleep(wait_s)
                    wait_s = await self._once(question, answer, rng)
        except TimeoutError:
            answer.error = "not served in time: " + (
                answer.refusals[-1] if answer.refusals else f"{sum(map(len, answer.texts))} characters"
            )
        return answer

    async def _once(self, question: Question, answer: Answer, rng: random.Random) -> float | None:
        """One try; how long to wait until the next one, or None if that was it."""
        gateways = self.serving()
        if not gateways:
            return AGAIN_S
        gateway = rng.choice(gateways)
        client = self._clients[question.manner in ("slow", "stalled")]
        try:
            async with client.stream("POST", f"{gateway.url}/v1/completions", json=question.body) as reply:
                if reply.status_code != 200:
                    return await _refused(reply, answer)
                await _read(reply, question, answer, rng)
        except (httpx.HTTPError, ValueError) as error:
            words = f"{type(error).__name__} {error}".strip()
            if isinstance(error, httpx.ConnectError):
                answer.refusals.append(type(error).__name__)
                return AGAIN_S
            answer.orphaned = self.ended(gateway)
            answer.error = words
        return None


async def _refused(reply: httpx.Response, answer: Answer) -> float | None:
    """Whether to come again, and when: 429 and 503 say so."""
    body = (await reply.aread()).decode(errors="replace")
    if reply.status_code in (429, 503):
        after = reply.headers.get("retry-after")
        answer.refusals.append(f"{reply.status_code} {'with' if after else 'without'} retry-after")
        return min(float(after), 5.0) if after else AGAIN_S
    answer.error = f"{reply.status_code} {body[:200]}"
    answer.code = _code(body)
    return None


def _code(body: str) -> str:
    try:
        return str(json.loads(body)["error"].get("code") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


async def _read(reply: httpx.Response, question: Question, answer: Answer, rng: random.Random) -> None:
    """Pieces as they come, in the client's manner."""
    last: float | None = None
    open_choices = question.n
    stall_at = leave_at = -1
    if question.manner == "stalled":
        stall_at = rng.randrange(1, max(2, question.tokens // 2))
    if question.manner == "leaving":
        leave_at = rng.randrange(1, max(2, question.tokens))
    pieces = 0
    async for line in lines(reply):
        if not line.startswith("data: {"):
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            answer.error, answer.code = str(chunk["error"]["message"])[:200], str(chunk["error"].get("code") or "")
            continue
        now = time.monotonic()
        if last is not None and open_choices:
            answer.worst_pause_s = max(answer.worst_pause_s, now - last)
        last = now
        for choice in chunk["choices"]:
            answer.texts[choice["index"]] += choice["text"]
            open_choices -= choice["finish_reason"] is not None
        answer.finished = open_choices == 0
        timeline = chunk.get("baton", {}).get("timeline")
        answer.attempts = max(answer.attempts, timeline.get("attempts", 1) if timeline else 1)
        if chunk.get("usage"):
            answer.got_tokens = chunk["usage"]["completion_tokens"]
        pieces += 1
        if pieces == leave_at:
            return
        if pieces == stall_at:
            await asyncio.sleep(rng.uniform(*STALLED_S))
        elif question.manner == "slow":
            await asyncio.sleep(SLOW_S)


async def arrive(due_s: Sequence[float], start: float, one: Callable[[int], Any]) -> None:
    """Start `one(number)` at each due time, whatever became of the earlier ones; ends when all have ended."""
    async with asyncio.TaskGroup() as tasks:
        for number, due in enumerate(due_s):
            await asyncio.sleep(max(0.0, start + due - time.monotonic()))
            tasks.create_task(one(number))
