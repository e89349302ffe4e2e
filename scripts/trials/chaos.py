"""`./scripts/chaos`: what a client gets while workers die, stall and lose messages, and Redis forgets everything.

Two prefills, two decodes, one gateway, float32. A steady number of streamed requests runs while a seeded sequence of faults strikes:
SIGKILL and SIGSTOP/SIGCONT of any worker, Redis restarted empty; every fiftieth token message is dropped all the time. Each answer
is compared with what plain transformers generates greedily.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from scripts.launcher.__main__ import wait_served
from scripts.launcher.cluster import Cluster, Shape
from scripts.launcher.model import obtain
from scripts.launcher.show import Progress
from tests.integration.talk import Heard, body, listen
from tests.references import references
from tests.systems import assert_conserved

CALM_S = 30.0
"""After the last fault everything running must end within this long."""
DROP_EVERY = 50
REFUSED_S = 1.0
"""A client that is refused comes back after this long."""


@dataclass
class Score:
    """What happened."""

    requests: int = 0
    lost: int = 0
    wrong: int = 0
    duplicated: int = 0
    worst_pause_s: float = 0.0
    recovered: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Question:
    prompt: list[int]
    text: str


def questions(tokens: int, tokenizer: object) -> list[Question]:
    chosen = sorted(references(), key=lambda one: len(one["prompt"]))[:16]
    decode = tokenizer.decode  # type: ignore[attr-defined]
    return [Question(one["prompt"], decode(one["output"][:tokens], skip_special_tokens=True)) for one in chosen]


async def ask_forever(
    cluster: Cluster, pool: list[Question], tokens: int, rng: random.Random, until: float, score: Score, say: Progress
) -> None:
    """One client after another, each waiting for its whole answer."""
    async with httpx.AsyncClient() as client:
        while time.monotonic() < until:
            question = rng.choice(pool)
            try:
                heard = await listen(client, cluster.urls[0], body(question.prompt, tokens))
            except httpx.HTTPError as error:
                heard = Heard(error=f"{type(error).__name__} {error}")
            if not judge(score, question, heard, tokens, say):
                await asyncio.sleep(REFUSED_S)


def judge(score: Score, question: Question, heard: Heard, tokens: int, say: Progress) -> bool:
    """Enter one answer into the score; False if the request was refused before it started (no live worker, Redis away)."""
    if heard.error is not None and heard.error.startswith(("429", "503")) and not heard.text:
        say(f"refused: {heard.error[:120]}")
        score.refused += 1
        return False
    score.requests += 1
    score.worst_pause_s = max(score.worst_pause_s, heard.worst_pause_s)
    score.recovered += heard.timeline.get("attempts", 1) > 1
    if heard.error is not None or heard.finish is None:
        score.lost += 1
        say(f"LOST: {heard.error}")
    elif heard.completion_tokens > tokens:
        score.duplicated += 1
    elif heard.text != question.text:
        score.wrong += 1
        say(f"WRONG: {heard.text!r} instead of {question.text!r}")
    return True


async def strike_forever(cluster: Cluster, rng: random.Random, every_s: float, until: float, score: Score, say: Progress) -> None:
    """One fault after another; what was killed is started again, what was stopped continues."""
    async with asyncio.TaskGroup() as later:
        while time.monotonic() + every_s < until:
            await asyncio.sleep(rng.uniform(0.5, 1.5) * every_s)
            child = rng.choice([child for child in cluster.workers])
            kind = rng.choices(("kill", "stop", "redis"), (5, 3, 1))[0]
            if kind == "redis":
                assert cluster.valkey is not None
                say("Redis restarts empty")
                cluster.valkey.restart_empty()
            elif child.alive and child.facts is not None and kind == "kill":
                say(f"SIGKILL {child.name}")
                cluster.kill(child.name)
                later.create_task(restart(cluster, child.name, rng.uniform(0.0, 5.0)))
            elif child.alive and child.facts is not None:
                seconds = rng.uniform(0.5, 10.0)
                say(f"SIGSTOP {child.name} for {seconds:.1f} s")
                cluster.kill(child.name, signal.SIGSTOP)
                later.create_task(go_on(cluster, child.name, seconds))
            else:
                continue
            score.faults[kind] += 1


async def restart(cluster: Cluster, name: str, after_s: float) -> None:
    await asyncio.sleep(after_s)
    cluster.restart(name, wait=False)


async def go_on(cluster: Cluster, name: str, after_s: float) -> None:
    await asyncio.sleep(after_s)
    cluster.kill(name, signal.SIGCONT)


async def play(cluster: Cluster, chosen: argparse.Namespace, pool: list[Question], say: Progress) -> Score:
    rng = random.Random(chosen.seed)
    score = Score()
    until = time.monotonic() + chosen.minutes * 60
    async with asyncio.TaskGroup() as tasks:
        for number in range(chosen.streams):
            own = random.Random(chosen.seed * 1000 + number)
            tasks.create_task(ask_forever(cluster, pool, chosen.tokens, own, until, score, say))
        tasks.create_task(strike_forever(cluster, rng, chosen.every, until - CALM_S, score, say))
    return score


def main() -> int:
    parser = argparse.ArgumentParser(prog="./scripts/chaos", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=6, help="requests running at any time")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--every", type=float, default=12.0, help="mean seconds between two faults")
    chosen = parser.parse_args()
    say = Progress()
    model = obtain(None, say)
    from transformers import AutoTokenizer

    pool = questions(chosen.tokens, AutoTokenizer.from_pretrained(model))
    flags = {"max_request_tokens": "2048", "pages": "640", "drop_parcels": str(DROP_EVERY)}
    shape = Shape(model=model, prefill=2, decode=2, dtype="float32", model_name="smollm2", worker_flags=flags)
    with Cluster(shape, say) as cluster:
        cluster.start()
        wait_served(cluster.urls[0])
        score = asyncio.run(play(cluster, chosen, pool, say))
        cluster.wait_ready()
        leaked = ""
        try:
            assert_conserved(cluster)
        except (AssertionError, httpx.HTTPError) as error:
            leaked = f"{type(error).__name__} {error}"
            say(leaked)
            for child in cluster.children.values():
                say(f"--- {child.name}\n{child.log.read_text()[-4000:]}")
    result = {
        "seed": chosen.seed,
        "minutes": chosen.minutes,
        "requests": score.requests,
        "faults": dict(score.faults),
        "lost": score.lost,
        "duplicated": score.duplicated,
        "wrong": score.wrong,
        "leaked": int(bool(leaked)),
        "recovered": score.recovered,
        "refused": score.refused,
        "worst_pause_s": round(score.worst_pause_s, 2),
    }
    print(json.dumps(result), flush=True)
    return int(bool(score.lost or score.duplicated or score.wrong or leaked or not score.requests))


if __name__ == "__main__":
    sys.exit(main())
