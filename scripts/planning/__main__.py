"""`./scripts/plan`: read what was measured, search, say what to start and write the file that starts it."""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.launcher.show import Progress
from scripts.load.workloads import WorkloadError, load
from scripts.planning import against, compose, reproduce, show
from scripts.planning.against import AgainstError
from scripts.planning.demand import wanted
from scripts.planning.live import demanded
from scripts.planning.options import parse
from services.planner import paper, profile
from services.planner.candidates import Cluster
from services.planner.costs import Costs
from services.planner.goodput import curve
from services.planner.planner import PlanError, plan
from services.planner.profile import ProfileError

POINTS = (0.6, 0.8, 1.0, 1.15, 1.35)
"""Of a finalist's goodput: where its curve is simulated."""


def main() -> int:
    chosen = parse()
    say = Progress()
    # A search makes millions of small objects that are freed by counting; looking for cycles among them costs a quarter of the time.
    gc.disable()
    try:
        if chosen.paper:
            result = reproduce.everything(say)
        elif chosen.against:
            result = check(chosen, say)
        else:
            result = search(chosen, say)
    except (WorkloadError, ProfileError, PlanError, AgainstError, OSError) as error:
        print(f"./scripts/plan: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 130
    print(json.dumps(result), flush=True)
    return 0


def costs_of(name: str) -> Costs:
    """Of a built-in machine or a profile. Raises ProfileError."""
    return paper.costs(name) if name in paper.NAMED else profile.costs(profile.read(Path(name)))


def check(chosen: argparse.Namespace, say: Progress) -> dict[str, Any]:
    """The simulator against a run of `./scripts/goodput`. Raises ProfileError, AgainstError, OSError."""
    costs = costs_of(chosen.profile)
    say(f"{costs.name}: {costs.source}")
    found = against.read(chosen.against)
    results, left = against.compared(costs, found, chosen.share)
    print("\n".join([against.table(results), *left]), file=sys.stderr, flush=True)
    picture = chosen.out.with_suffix(".png")
    show.draw_against(results, f"{costs.name}: measured, and simulated", chosen.share, picture)
    say(f"wrote {picture}")
    return {
        "command": f"./scripts/plan {shlex.join(sys.argv[1:])}",
        "machine": costs.name,
        "fit": costs.source,
        "measured_by": found.command,
        "share": chosen.share,
        "systems": {one.target: against.as_json(one) for one in results},
        "left_out": left,
    }


def search(chosen: argparse.Namespace, say: Progress) -> dict[str, Any]:
    """Raises WorkloadError, ProfileError, PlanError, OSError."""
    costs = costs_of(chosen.profile)
    say(f"{costs.name}: {costs.source}")
    if chosen.one_gpu_workers:
        costs = replace(costs, launches={tp: one for tp, one in costs.launches.items() if tp == 1})
    if chosen.live:
        workload, rate = demanded(chosen.live, chosen.key)
        say(f"live: {len(workload.shapes)} requests, {rate:.3g}/s")
        chosen.rate = chosen.rate or rate
    else:
        workload = load(chosen.workload, chosen.context, 1, chosen.length_scale)
    want = wanted(workload, chosen.slo, chosen.share, chosen.cv)
    say(f"{workload.name}: prompts of {want.mean_input_tokens:.0f} tokens in the mean, answers of {want.mean_output_tokens:.0f}")
    cluster = Cluster(chosen.gpus, chosen.nodes)
    pipelines = 1 if chosen.one_gpu_workers else None
    answer = plan(costs, want, cluster, chosen.context, say, rate=chosen.rate, algorithm=chosen.algorithm, most_stages=pipelines)
    searched = time.process_time()
    say(f"searched: {searched:.0f} s of one core")
    print(show.table(answer), file=sys.stderr)
    where = answer.chosen.where
    command = f"./scripts/plan {shlex.join(sys.argv[1:])}".strip()
    words = [show.sentence(answer, chosen.rate)]
    if chosen.profile in reproduce.PLACEMENTS:
        words.append(f"The paper found, for ShareGPT: {reproduce.PLACEMENTS[chosen.profile]}.")
    text, cannot = compose.override(where, command)  # type: ignore[arg-type]
    words += [one[0].upper() + one[1:] + "." for one in cannot]
    print("\n".join(words), file=sys.stderr, flush=True)
    files = [_written(chosen.out.with_suffix(".yml"), text)]
    if not chosen.no_curve:
        curves = [(one.where, curve(costs, one.where, want, [p * one.goodput for p in POINTS])) for _, one in show.finalists(answer)]
        files.append(chosen.out.with_suffix(".png"))
        title = f"{costs.name}, {workload.name}, {chosen.gpus} GPUs"
        show.draw(curves, title, chosen.slo, chosen.share, files[-1])  # type: ignore[arg-type]
    result = {
        "command": command,
        "machine": costs.name,
        "fit": costs.source,
        "workload": workload.name,
        "objectives": {"ttft_s": chosen.slo.ttft_s, "tpot_s": chosen.slo.tpot_s, "share": chosen.share},
        **show.as_json(answer),
        "words": words,
        "search_cpu_s": round(searched, 1),
    }
    files.append(_written(chosen.out.with_suffix(".json"), json.dumps(result, indent=1)))
    say(f"wrote {', '.join(map(str, files))}")
    return result


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


if __name__ == "__main__":
    sys.exit(main())
