"""`./scripts/chaos`: what clients get while processes die, stall and are cut off, messages are lost, pages spoilt and clocks stepped.

Real processes in float32 under open-loop load (arrivals and lengths of ./scripts/goodput; prompts whose greedy answers are known), a
seeded schedule of faults. Every answer is compared with what plain transformers generates. The last line is one JSON object; the exit
status is 1 if an answer was lost, doubled or wrong, a page leaked, or a process ended by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from scripts.faults.clients import Crowd, Questions, arrive
from scripts.faults.schedule import Kind, Possible, Strike, plan, rolling
from scripts.faults.score import REENQUEUE_S, Score
from scripts.faults.strikes import Striker
from scripts.faults.system import SETTLE_S, System, running
from scripts.faults.watch import Watch
from scripts.launcher.__main__ import Parser
from scripts.launcher.cluster import ClusterError, Shape
from scripts.launcher.model import ModelError, obtain
from scripts.launcher.show import Progress
from scripts.load import arrivals
from scripts.load.workloads import WorkloadError, load

CALM_S = 25.0
"""Between the last fault and the last arrival."""
POISON = 100
"""Token with which no known prompt begins."""
WARM_UP_S = 30.0


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="./scripts/chaos", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--every", type=float, default=8.0, help="mean seconds between two faults")
    parser.add_argument(
        "--only", action="append", choices=get_args(Kind), default=[], metavar="KIND", help=f"of {', '.join(get_args(Kind))}"
    )
    parser.add_argument("--victim", action="append", default=[], metavar="NAME", help="nobody else is struck, like decode-0 or redis")
    parser.add_argument("--rolling", action="store_true", help="instead: every process drained and started again, one after the other")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--workload", default="chatbot", help="whose lengths are asked")
    parser.add_argument("--length-scale", type=float, default=0.25)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--pages", type=int, default=320, help="of each worker's pool, 16 tokens each")
    parser.add_argument("--prefix-reuse", action=argparse.BooleanOptionalAction, default=None, help="default: with even seeds")
    parser.add_argument(
        "--transport", choices=("any", "tcp"), default=None, help="of pages; tcp can be cut off; default: tcp with every third seed"
    )
    chosen = parser.parse_args(argv)
    if min(chosen.minutes, chosen.every, chosen.rate, chosen.length_scale, chosen.prefill, chosen.decode, chosen.gateways) <= 0:
        parser.error("minutes, rates and counts must be above 0")
    names = everybody(chosen)
    if unknown := [name for name in chosen.victim if name not in names]:
        parser.error(f"--victim {unknown[0]}: there are {', '.join(names)}")
    if chosen.prefix_reuse is None:
        chosen.prefix_reuse = chosen.seed % 2 == 0
    if chosen.transport is None:
        chosen.transport = "tcp" if chosen.seed % 3 == 0 else "any"
    return chosen


def everybody(chosen: argparse.Namespace) -> list[str]:
    """The names of all processes."""
    counts = {"prefill": chosen.prefill, "decode": chosen.decode, "gateway": chosen.gateways}
    return [*(f"{role}-{number}" for role, count in counts.items() for number in range(count)), "redis"]


def shape(model: Path, chosen: argparse.Namespace) -> Shape:
    flags = {
        "max_request_tokens": "2048",
        "pages": str(chosen.pages),
        "prefix_reuse": str(chosen.prefix_reuse).lower(),
        "die": f"poison:{POISON}",
    }
    return Shape(
        model=model,
        prefill=chosen.prefill,
        decode=chosen.decode,
        gateways=chosen.gateways,
        dtype="float32",
        model_name="smollm2",
        worker_flags=flags,
        role_flags={"gateway": {"drain_s": "150"}},
        env={"UCX_TLS": "tcp,self"} if chosen.transport == "tcp" else {},
    )


def strikes(chosen: argparse.Namespace, system: System) -> list[Strike]:
    if chosen.rolling:
        names = [name for name in (*system.cluster.children, "redis") if not chosen.victim or name in chosen.victim]
        return rolling(names, 10.0, (60 * chosen.minutes - 10.0 - CALM_S) / len(names))
    workers, gateways = ([child.name for child in children] for children in (system.cluster.workers, system.cluster.gateways))
    possible = Possible(workers, gateways, system.cuttable, system.clocked, victims=chosen.victim)
    return plan(chosen.seed, 60 * chosen.minutes - CALM_S, chosen.every, possible, chosen.only)


async def play(system: System, questions: Questions, chosen: argparse.Namespace, say: Progress) -> tuple[Score, Watch]:
    score = Score()
    asked = 0

    async def one(number: int) -> None:
        nonlocal asked
        words = score.enter(await crowd.ask(questions.question(number), number))
        asked += 1
        if words is not None:
            say(f"request {number}: {words}")

    async def poison() -> None:
        words = score.enter(await crowd.ask(questions.poison(POISON), -1))
        if words is not None:
            say(words)

    striker = Striker(system, score, chosen.seed, poison, say)
    watch = Watch(system, lambda: striker.unclear_until)
    crowd = Crowd(system.serving, striker.ended, chosen.seed)
    due = arrivals.gamma(max(2, round(60 * chosen.minutes * chosen.rate)), chosen.rate, 1.0, chosen.seed)
    async with crowd, asyncio.TaskGroup() as tasks:
        aside = [tasks.create_task(striker.revive()), tasks.create_task(watch.run())]
        start = time.monotonic()
        striking = tasks.create_task(striker.run(strikes(chosen, system), start))
        await arrive(due, start, one)
        await striking
        for task in aside:
            task.cancel()
    return score, watch


def settle(system: System) -> dict[str, dict[str, float]]:
    """What is still held although all work is done."""
    give_up = time.monotonic() + SETTLE_S
    while (left := system.leaked()) and time.monotonic() < give_up:
        time.sleep(0.2)
    return left


def main() -> int:
    chosen = options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say = Progress()
    try:
        model = obtain(None, say)
        workload = load(chosen.workload, 2048, chosen.seed, chosen.length_scale)
        questions = Questions(model, workload.shapes, chosen.seed)
        with tempfile.TemporaryDirectory(prefix="baton-chaos-") as scratch:
            kept = Path(scratch)
            with running(shape(model, chosen), cut=True, clocks=True, persistent=True, folder=kept, say=say) as system:
                score, watch = asyncio.run(play(system, questions, chosen, say))
                system.cluster.wait_ready()
                left = settle(system)
                result = verdict(chosen, system, score, watch, left)
                if result["failures"]:
                    show_logs(system, say)
    except (ClusterError, ModelError, WorkloadError) as error:
        print(f"./scripts/chaos: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    print(json.dumps(result), flush=True)
    return int(bool(result["failures"]))


def verdict(chosen: argparse.Namespace, system: System, score: Score, watch: Watch, left: dict[str, dict[str, float]]) -> dict[str, Any]:
    failures = score.failures()
    if left:
        failures.append(f"leaked: {left}")
    worst = watch.worst_reenqueue_s
    return {
        "seed": chosen.seed,
        "minutes": chosen.minutes,
        "rate": chosen.rate,
        "prefix_reuse": chosen.prefix_reuse,
        "transport": chosen.transport,
        **score.body(),
        "reenqueue": {
            "worst_below_s": worst,
            "within_wanted": worst is None or worst <= REENQUEUE_S,
            "count": sum(watch.reenqueued.values()),
        },
        "leaked": left,
        "memory_mib_an_hour": watch.memory(WARM_UP_S),
        "skipped": system.skipped,
        "failures": failures,
    }


def show_logs(system: System, say: Progress) -> None:
    for child in system.cluster.children.values():
        say(f"--- {child.name}\n{child.log.read_text(errors='replace')[-6000:]}")


if __name__ == "__main__":
    sys.exit(main())
