"""What the demo shows in the terminal: progress, a streamed answer, its timeline as bars."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from gateway.keys import given_keys

BAR = 40
ANSWER_S = 120.0


class Progress:
    """Lines with the time since the start, on stderr."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, words: str) -> None:
        print(f"[{time.monotonic() - self._started:5.1f} s] {words}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Credentials:
    """What a client of this environment's gateways needs. `key`: one of theirs, if any stands in the clear."""

    needed: bool
    key: str | None

    @property
    def hidden(self) -> bool:
        """A key is needed, and only those know one who were given it."""
        return self.needed and self.key is None


def credentials(environ: Mapping[str, str]) -> Credentials:
    """Raises SettingError."""
    keys = given_keys(environ.get("BATON_API_KEYS", ""), environ.get("BATON_API_KEYS_FILE") or None)
    return Credentials(bool(keys), next((one.key for one in keys if one.key is not None), None))


def stream_answer(url: str, model: str, question: str, max_tokens: int, key: str | None = None) -> dict[str, Any]:
    """Stream one chat answer to stdout; returns Baton's timeline. Raises RuntimeError with the server's words."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "timeline": True,
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    timeline: dict[str, Any] = {}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=ANSWER_S) as reply:
        if reply.status_code != 200:
            reply.read()
            raise RuntimeError(reply.json()["error"]["message"])
        for chunk in events(reply.iter_lines()):
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
            timeline = chunk.get("baton", {}).get("timeline", timeline)
    print(flush=True)
    return timeline


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def timeline_table(timeline: dict[str, Any]) -> str:
    """The five stages and the rest as bars that together are the total."""
    stages = ["prefill_queue", "prefill", "transfer", "decode_queue", "decode", "other"]
    total = max(timeline["total_ms"], 0.001)
    lines = []
    before = 0.0
    for stage in stages:
        took = timeline[f"{stage}_ms"]
        start, length = round(BAR * before / total), max(0, round(BAR * took / total))
        lines.append(f"  {stage.replace('_', ' '):14} {took:9.1f} ms  {' ' * start}{'█' * length or '▏'}")
        before += max(took, 0)
    lines.append(f"  {'total':14} {timeline['total_ms']:9.1f} ms  first token after {timeline['ttft_ms']:.1f} ms")
    return "\n".join(lines)
