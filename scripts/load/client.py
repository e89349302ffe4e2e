"""The open-loop generator: one task for each request, sent when it is due, whatever became of the others.

All times are seconds since the trial's start on this process's monotonic clock. TTFT counts from the moment a request was *due*, so a
server that stalls is charged for every request due meanwhile (no coordinated omission), and so is a generator that is late, which is
reported and makes the trial void.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from common.slo import Served, tpot_s
from scripts.load.texts import Question

STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other")


@dataclass
class Record:
    """One request. `at_s`: when each piece of text came. `stages_ms`: Baton's own timeline, where the server has one."""

    due_s: float
    input_tokens: int
    output_tokens: int
    sent_s: float = 0.0
    done_s: float = 0.0
    at_s: list[float] = field(default_factory=list)
    got_tokens: int = 0
    status: int = 0
    error: str | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    attempts: int = 1

    @property
    def late_s(self) -> float:
        return self.sent_s - self.due_s

    @property
    def served(self) -> Served:
        if self.error is not None or not self.at_s:
            return Served(float("inf"), float("inf"), self.got_tokens, ok=False)
        pace = tpot_s(self.at_s[0], self.at_s[-1], self.got_tokens)
        return Served(self.at_s[0] - self.due_s, pace, self.got_tokens, ok=self.got_tokens >= self.output_tokens)


@dataclass(frozen=True)
class Server:
    """Where to send, and as what. `key`: an API key. `timeline`: the server knows Baton's extension."""

    url: str
    model: str
    timeline: bool
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}


async def look(url: str, key: str | None = None, model: str | None = None) -> Server:
    """What the server at this URL serves and whether it is a Baton. Raises httpx.HTTPError and RuntimeError."""
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {key}"} if key else {}, timeout=30) as client:
        reply = (await client.get(f"{url}/v1/models")).raise_for_status()
        names = [one["id"] for one in reply.json()["data"]]
        if model is None and len(names) != 1:
            raise RuntimeError(f"{url} serves {', '.join(names) or 'no model'}: name one with --model-name")
        ready = await client.get(f"{url}/fleet")
        return Server(url, model or names[0], ready.status_code == 200, key)


async def send(client: httpx.AsyncClient, server: Server, question: Question, due_s: float, start: float) -> Record:
    """Wait until it is due, stream the answer, remember when its pieces came. Never raises for what the server does."""
    record = Record(due_s, question.input_tokens, question.output_tokens)
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": question.text,
        "max_tokens": question.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if server.timeline:
        body["timeline"] = True
    await asyncio.sleep(max(0.0, start + due_s - time.monotonic()))
    record.sent_s = time.monotonic() - start
    try:
        async with client.stream("POST", f"{server.url}/v1/completions", json=body, headers=server.headers) as reply:
            record.status = reply.status_code
            if reply.status_code != 200:
                record.error = f"{reply.status_code} {(await reply.aread()).decode(errors='replace')[:200]}"
                return record
            async for line in lines(reply):
                if line.startswith("data: {"):
                    take(record, json.loads(line[6:]), time.monotonic() - start)
    except (httpx.HTTPError, ValueError) as error:
        record.error = f"{type(error).__name__} {error}"
    finally:
        record.done_s = time.monotonic() - start
    if record.error is None and record.got_tokens < record.output_tokens:
        record.error = f"cut after {record.got_tokens} of {record.output_tokens} tokens"
    return record


async def lines(reply: httpx.Response) -> AsyncIterator[str]:
    """The lines of an event stream. httpx's own end also at U+2028 and its like, which JSON lets stand within a string."""
    rest = ""
    async for text in reply.aiter_text():
        *whole, rest = (rest + text).split("\n")
        for line in whole:
            yield line.removesuffix("\r")
    if rest:
        yield rest


def take(record: Record, chunk: dict[str, Any], now_s: float) -> None:
    """One SSE event. A piece counts when it carries text; the number of tokens is the server's usage."""
    if "error" in chunk:
        error = chunk["error"]
        record.error = str(error.get("message", error) if isinstance(error, dict) else error)[:200]
        return
    if any(choice.get("text") for choice in chunk.get("choices", ())):
        record.at_s.append(now_s)
    if chunk.get("usage"):
        record.got_tokens = chunk["usage"]["completion_tokens"]
    timeline = chunk.get("baton", {}).get("timeline")
    if timeline:
        record.stages_ms = {stage: timeline[f"{stage}_ms"] for stage in STAGES}
        record.attempts = timeline.get("attempts", 1)


async def trial(server: Server, questions: Sequence[Question], due_s: Sequence[float], timeout_s: float) -> list[Record]:
    """Every question at its time; ends when all are answered or, after `timeout_s` beyond the last one, given up."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(timeout_s)) as client:
        start = time.monotonic() + 0.05

        async def one(question: Question, due: float) -> Record:
            try:
                async with asyncio.timeout(due + timeout_s):
                    return await send(client, server, question, due, start)
            except TimeoutError:
                record = Record(due, question.input_tokens, question.output_tokens, sent_s=due)
                record.error = f"no answer within {timeout_s:.0f} s"
                return record

        return list(await asyncio.gather(*(one(*pair) for pair in zip(questions, due_s, strict=True))))
