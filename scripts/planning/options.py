"""The words of `./scripts/plan`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.slo import Objectives
from scripts.launcher.__main__ import Parser
from scripts.load.judge import fixed
from scripts.load.workloads import NAMED
from scripts.outputs import obstacle
from services.planner import paper

BUILT_IN = "distserve-a100-opt-13b"
ABOUT = """Which workers to start, and how many: prefill and decode apart, or colocated, for the most requests per second and device that
meet both objectives. It simulates the workers' own scheduler with the times of a profile, and starts nothing."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked; ends with one line and 2 for a bad one. `slo` becomes `Objectives`."""
    parser = Parser(prog="./scripts/plan", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--profile",
        metavar="FILE|NAME",
        help=f"launches that ./scripts/engine_bench --profile FILE measured, or DistServe's: {', '.join(paper.NAMED)} [{BUILT_IN}]",
    )
    parser.add_argument("--gpus", type=int, default=8, help="devices in all [8]")
    parser.add_argument("--nodes", type=int, default=1, help="hosts that they are spread over evenly [1]")
    parser.add_argument(
        "--workload", default="chatbot", help=f"{', '.join(NAMED)}, or a CSV with input_tokens, output_tokens[, arrival_s] [chatbot]"
    )
    parser.add_argument(
        "--live",
        action="append",
        default=[],
        metavar="URL",
        help="instead: what a running gateway's clients have asked lately, and how often; repeatable, for every gateway of the fleet",
    )
    parser.add_argument("--key", help="API key for --live")
    parser.add_argument(
        "--slo", default="0.25,0.1", metavar="TTFT,TPOT", help="objectives in seconds, or a named set of the paper [0.25,0.1]"
    )
    parser.add_argument("--share", type=float, default=0.9, help="of the requests that must meet both [0.9]")
    parser.add_argument(
        "--rate", type=float, help="requests/s to reach on as few devices as possible [the most that all can do; --live: its own rate]"
    )
    parser.add_argument("--cv", type=float, default=1.0, help="of the gaps between arrivals: 1 Poisson; a trace brings its own [1]")
    parser.add_argument("--context", type=int, default=2048, help="largest request, prompt and answer, in tokens [2048]")
    parser.add_argument("--length-scale", type=float, help="multiply all lengths by this instead of fitting them to the context")
    parser.add_argument(
        "--algorithm", type=int, choices=(1, 2), help="DistServe's: 1 workers anywhere, 2 handoffs inside a node [by the network]"
    )
    parser.add_argument("--one-gpu-workers", action="store_true", help="only workers of one GPU each")
    parser.add_argument("--no-curve", action="store_true", help="leave the plot out")
    parser.add_argument("--paper", action="store_true", help="instead: DistServe's motivating case and ratios, ours beside the paper's")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="instead: what ./scripts/goodput --slo … --out FILE measured, beside what the simulator says of the same requests",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("plan"),
        metavar="STEM",
        help="writes STEM.json, STEM.yml and, without --no-curve, STEM.png; --against: STEM.png only; --paper: nothing [plan]",
    )
    chosen = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        yardstick = fixed(chosen.slo)
    except ValueError as error:
        parser.error(str(error))
    chosen.slo = Objectives(yardstick.ttft[0][1], yardstick.tpot_s)
    if chosen.profile is None and (chosen.live or chosen.against):
        parser.error("--live and --against need --profile: what ./scripts/engine_bench --profile FILE measured of this model and machine")
    chosen.profile = chosen.profile or BUILT_IN
    if chosen.gpus < 1 or chosen.nodes < 1 or chosen.gpus % chosen.nodes:
        parser.error("--gpus must be a multiple of --nodes, both above 0")
    if not 0 < chosen.share < 1 or chosen.cv < 0 or chosen.context < 3:
        parser.error("--share must lie between 0 and 1, --cv not below 0, --context above 2")
    if min(one for one in (chosen.rate, chosen.length_scale, 1.0) if one is not None) <= 0:
        parser.error("--rate and --length-scale must be above 0")
    if not chosen.out.name:
        parser.error("--out must name files, without their ends")
    written = () if chosen.paper else (".png",) if chosen.against else (".json", ".yml") if chosen.no_curve else (".json", ".yml", ".png")
    for end in written:
        if reason := obstacle(chosen.out.with_suffix(end)):
            parser.error(f"--out {reason}")
    return chosen
