"""A client for the tests: streams ids (by logprobs-free completions of token ids) and remembers when each piece came."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

MODEL = "smollm2"
PATIENCE_S = 110.0


@dataclass
class Heard:
    """One streamed answer."""

    text: str = ""
    finish: str | None = None
    error: str | None = None
    at: list[float] = field(default_factory=list)
    """Moments (monotonic) at which pieces came."""
    timeline: dict[str, Any] = field(default_factory=dict)
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def worst_pause_s(self) -> float:
        return max((b - a for a, b in zip(self.at, self.at[1:], strict=False)), default=0.0)


def body(prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {**asked, "stream": True, "stream_options": {"include_usage": True}, "timeline": True, **more}


async def listen(client: httpx.AsyncClient, url: str, asked: dict[str, Any], heard: Heard | None = None) -> Heard:
    """Stream an answer to its end; `heard` can be watched meanwhile."""
    heard = heard or Heard()
    async with client.stream("POST", f"{url}/v1/completions", json=asked, timeout=PATIENCE_S) as reply:
        if reply.status_code != 200:
            heard.error = f"{reply.status_code} {(await reply.aread()).decode()}"
            return heard
        async for line in reply.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                heard.error = chunk["error"]["message"]
                continue
            heard.at.append(time.monotonic())
            for choice in chunk["choices"]:
                heard.text += choice["text"]
                heard.finish = choice["finish_reason"] or heard.finish
            heard.timeline = chunk.get("baton", {}).get("timeline", heard.timeline)
            if chunk.get("usage"):
                heard.completion_tokens = chunk["usage"]["completion_tokens"]
                heard.cached_tokens = chunk["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return heard


async def listen_all(urls: list[str], asked: list[dict[str, Any]], at_once: int) -> list[Heard]:
    """Answers in the order of the questions, `at_once` at a time, over all gateways in turn."""
    turn = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:

        async def one(number: int) -> Heard:
            async with turn:
                return await listen(client, urls[number % len(urls)], asked[number])

        return await asyncio.gather(*(one(number) for number in range(len(asked))))
