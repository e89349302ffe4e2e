"""`./scripts/goodput`: start what is to be measured, search each target's goodput in turns, write JSON and plots."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import httpx

from scripts.launcher.cluster import ClusterError
from scripts.launcher.model import ModelError, obtain
from scripts.launcher.show import Progress
from scripts.load import interference, plots, results
from scripts.load.client import look
from scripts.load.curve import Curve
from scripts.load.judge import Yardstick, fixed, scales
from scripts.load.options import parse
from scripts.load.targets import Hardware, Target, Variant, raise_own_priority, started, variants
from scripts.load.texts import Writer
from scripts.load.trials import Bench, Plan, Trial
from scripts.load.workloads import Workload, WorkloadError, load

FLOOR, CEILING = 0.02, 2000.0
"""Rates between which is searched, requests/s."""

Say = Callable[[str], None]


def main() -> int:
    chosen = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say = Progress()
    try:
        if chosen.interference:
            print(json.dumps(interfere(chosen, say)), flush=True)
            return 0
        result = json.loads(chosen.replot.read_text()) if chosen.replot else measure(chosen, say)
    except (ModelError, ClusterError, WorkloadError, RuntimeError, httpx.HTTPError, OSError, json.JSONDecodeError) as error:
        print(f"./scripts/goodput: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    stem = chosen.replot or chosen.out
    if not chosen.replot:
        stem.write_text(json.dumps(result))
    files = plots.draw(result, stem.with_suffix(""))
    say(f"wrote {stem} and {', '.join(file.name for file in files)}")
    brief = {name: result[name] for name in ("made", "machine", "command", "objectives", "goodput", "best")}
    brief["sweep"] = {name: {k: v for k, v in one.items() if k != "values"} for name, one in result["sweep"]["trials"].items()}
    print(json.dumps(brief), flush=True)
    return 0


def measure(chosen: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Everything that is started is stopped again, whatever happens. Raises the errors that `main` names."""
    model = obtain(chosen.model, say)
    workload = load(chosen.workload, chosen.context, chosen.seed, chosen.length_scale)
    say(f"workload {workload.name}: {len(workload.shapes)} requests, lengths × {workload.factor:.3g}")
    writer = Writer(model, workload, chosen.seed)
    hardware = owned(chosen, model)
    priority = raise_own_priority()
    say(f"generator, gateways and Valkey run at priority {priority}")
    plan = planned(chosen)
    with running(chosen, hardware, workload, writer, plan, say) as targets:
        bench = Bench(targets, workload, writer, plan, say)
        return asyncio.run(compare(chosen, bench, workload, say))


def interfere(chosen: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Time between tokens without and with long prompts, each target in turn. Raises the errors that `main` names."""
    model = obtain(chosen.model, say)
    load = interference.Load()
    workload = interference.workload(chosen.context, load)
    writer = Writer(model, workload, chosen.seed)
    hardware = owned(chosen, model)
    raise_own_priority()
    found = {}
    with running(chosen, hardware, workload, writer, planned(chosen), say) as targets:
        for number, target in enumerate(targets):
            asyncio.run(interference.measure(target, writer, interference.Load(half_s=5.0), 2 * number))  # warms up
            found[target.name] = asyncio.run(interference.measure(target, writer, load, 2 * number + 1))
            say(f"{target.name}: {found[target.name]}")
    return {**about(), "load": asdict(load), "found": found}


def owned(chosen: argparse.Namespace, model: Path) -> Hardware:
    return Hardware(
        model=model,
        device=chosen.device,
        dtype=chosen.dtype,
        pages=chosen.pages,
        context_tokens=chosen.context,
        prefill=chosen.prefill,
        decode=chosen.decode,
        prefix_reuse=chosen.prefix_reuse,
        share=chosen.devices,
    )


def planned(chosen: argparse.Namespace) -> Plan:
    return Plan(chosen.seconds, chosen.least, chosen.most, chosen.cv, chosen.seed, chosen.shares)


@contextlib.contextmanager
def running(
    chosen: argparse.Namespace, hardware: Hardware, workload: Workload, writer: Writer, plan: Plan, say: Say
) -> Iterator[list[Target]]:
    """Everything that was asked for, started or found."""
    wanted = [one for kind in chosen.start if kind != "chunked" for one in variants(kind, hardware)]
    if "chunked" in chosen.start:
        wanted += variants("chunked", hardware, tuned(chosen, hardware, workload, writer, plan, say))
    with started(wanted, say) as clusters:
        targets = [reach(variant, cluster) for variant, cluster in clusters]
        targets += [foreign(words, chosen) for words in chosen.url]
        yield targets


def reach(variant: Variant, cluster: Any) -> Target:
    server = asyncio.run(look(cluster.urls[0]))
    return Target(variant.name, variant.kind, variant.placement, server, cluster)


def foreign(words: str, chosen: argparse.Namespace) -> Target:
    """A `--url` target. Raises RuntimeError if nothing answers there."""
    name, _, url = words.rpartition("=") if "=" in words.split("://")[0] else ("", "", words)
    name, url = name or url, url.rstrip("/").removesuffix("/v1")
    try:
        return Target(name, name, "as found", asyncio.run(look(url, chosen.key, chosen.model_name)))
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise RuntimeError(f"no OpenAI-compatible server at {url}: {error}") from error


def tuned(chosen: argparse.Namespace, hardware: Hardware, workload: Workload, writer: Writer, plan: Plan, say: Say) -> int:
    """The chunk budget with which most requests attain at the first rate, one worker a device; ties: the lower P90 of TPOT."""
    if len(chosen.budgets) == 1:
        return int(chosen.budgets[0])
    found: dict[int, tuple[float, float]] = {}
    yardstick = None
    for budget in chosen.budgets:
        with started(variants("chunked", hardware, budget)[-1:], lambda words: None) as running:
            bench = Bench([reach(*running[0])], workload, writer, plan, say)
            say(f"trying a chunk budget of {budget} tokens")
            if yardstick is None:
                asyncio.run(bench.measure_unloaded(1))
                yardstick = objectives(chosen, bench)
            done = asyncio.run(bench.run(bench.targets[0], chosen.rate, yardstick, 0))
        hits = sum(map(yardstick.attains, done.records)) / len(done.records)
        pace = results.quantile([record.served.tpot_s for record in done.records], 0.9)
        found[budget] = (hits, -(pace or 0.0))
    best = max(found, key=lambda budget: found[budget])
    say(f"chunk budget {best}: attained, −P90 TPOT by budget {found}")
    return best


def objectives(chosen: argparse.Namespace, bench: Bench) -> Yardstick:
    """Fixed ones, or multiples of what the first target took when idle; `--slo` with `--slo-scale` multiplies the fixed ones."""
    base = fixed(chosen.slo) if chosen.slo else bench.unloaded[bench.targets[0].name]
    ttft_scale, tpot_scale = scales(chosen.slo_scale) if chosen.slo_scale else (1.0, 1.0)
    return Yardstick(base.ttft, base.tpot_s, ttft_scale, tpot_scale)


async def compare(chosen: argparse.Namespace, bench: Bench, workload: Workload, say: Say) -> dict[str, Any]:
    await bench.measure_unloaded(1 if chosen.quick else 3)
    yardstick = objectives(chosen, bench)
    middle = sorted(shape.input_tokens for shape in workload.shapes)[len(workload.shapes) // 2]
    middle = middle or yardstick.ttft[len(yardstick.ttft) // 2][0]  # texts of their own have the lengths they have
    at_middle = yardstick.objectives(middle)
    told = f"TTFT ≤ {1000 * at_middle.ttft_s:.0f} ms (prompt of {middle} tokens), TPOT ≤ {1000 * at_middle.tpot_s:.1f} ms"
    say(told)
    curves = {target.name: Curve(chosen.rate, FLOOR, CEILING, chosen.resolution) for target in bench.targets}
    await bench.search(curves, yardstick, time.monotonic() + 60 * chosen.minutes)
    found = results.summary(bench.targets, curves, chosen.shares)
    word = f"{chosen.shares[0]:.0%}"
    rate = max(one[word]["rate"] for one in found["goodput"].values()) or chosen.rate
    swept = await at_one_rate(bench, rate, yardstick)
    return {
        **about(),
        "workload": {
            "name": workload.name,
            "factor": workload.factor,
            "context_tokens": chosen.context,
            "cv": chosen.cv,
            "seed": chosen.seed,
        },
        "objectives": {
            "words": told,
            "ttft": yardstick.ttft,
            "tpot_s": yardstick.tpot_s,
            "scales": [yardstick.ttft_scale, yardstick.tpot_scale],
        },
        "targets": [target_body(bench, target) for target in bench.targets],
        **found,
        "trials": [results.trial_summary(one, yardstick) for one in bench.trials],
        "records": [[results.record_body(record) for record in one.records] for one in bench.trials],
        "sweep": sweep_body(rate, swept, yardstick),
    }


def about() -> dict[str, Any]:
    return {
        "made": str(date.today()),
        "cores": len(os.sched_getaffinity(0)),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "command": " ".join(["./scripts/goodput", *sys.argv[1:]]),
    }


async def at_one_rate(bench: Bench, rate: float, yardstick: Yardstick) -> list[Trial]:
    """One more trial of each target, all at this rate: what the sweep, the breakdown and the distributions show."""
    return [await bench.run(target, rate, yardstick, 0) for target in bench.targets]


def target_body(bench: Bench, target: Target) -> dict[str, Any]:
    idle = bench.unloaded[target.name]
    flags = target.cluster.shape.worker_flags if target.cluster else {}
    return {
        "name": target.name,
        "kind": target.kind,
        "placement": target.placement,
        "flags": flags,
        "unloaded": {"ttft": idle.ttft, "tpot_s": idle.tpot_s},
    }


def sweep_body(rate: float, trials: Sequence[Trial], yardstick: Yardstick) -> dict[str, Any]:
    body: dict[str, Any] = {"rate": rate, "attainment": {}, "trials": {}}
    for one in trials:
        good = [record for record in one.records if record.error is None]
        values = {
            "ttft": [round(record.served.ttft_s, 4) for record in good],
            "tpot": [round(record.served.tpot_s, 5) for record in good if record.got_tokens > 1],
            "between": [round(gap, 4) for gap in results.gaps(good)],
        }
        body["attainment"][one.target] = results.sweep(one, yardstick)
        body["trials"][one.target] = {**results.trial_summary(one, yardstick), "values": values}
    return body


if __name__ == "__main__":
    sys.exit(main())
