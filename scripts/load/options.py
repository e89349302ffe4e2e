"""The words of `./scripts/goodput`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.launcher.__main__ import Parser
from scripts.load.judge import fixed, scales
from scripts.load.targets import KINDS
from scripts.load.workloads import NAMED

QUICK = {"seconds": 10.0, "least": 30, "most": 40, "minutes": 2.5, "length_scale": 0.1, "resolution": 1.3, "rate": 2.0, "budgets": "64,256"}
FULL = {
    "seconds": 60.0,
    "least": 40,
    "most": 400,
    "minutes": 60.0,
    "length_scale": None,
    "resolution": 1.1,
    "rate": 1.0,
    "budgets": "64,128,256",
}
"""`--quick` measures shorter requests, fewer of them, and says what it could not resolve."""

ABOUT = """How many requests per second meet both their TTFT and their TPOT objective, for several servers in one run.
Requests are due at random times whether or not earlier ones were answered (open loop), and every latency counts from then."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked; ends with one line and 2 for a bad one."""
    parser = Parser(prog="./scripts/goodput", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--start", action="append", choices=KINDS, metavar="KIND", help=f"start and measure: {', '.join(KINDS)}; repeatable"
    )
    parser.add_argument("--url", action="append", default=[], metavar="[NAME=]URL", help="measure a server that runs already; repeatable")
    parser.add_argument("--workload", default="chatbot", help=f"{', '.join(NAMED)}, or a CSV with input_tokens, output_tokens[, arrival_s]")
    parser.add_argument(
        "--slo", metavar="TTFT,TPOT", help="objectives in seconds, or a named set of the paper (chatbot, code, summarisation, …)"
    )
    parser.add_argument(
        "--slo-scale", default=None, metavar="K[,K]", help="objectives as multiples of what the first target takes when idle [3]"
    )
    parser.add_argument("--cv", type=float, default=1.0, help="of the gaps between arrivals: 1 Poisson, 0 even, more is burstier [1]")
    parser.add_argument(
        "--interference", action="store_true", help="instead: time between tokens of running streams while long prompts arrive"
    )
    parser.add_argument("--quick", action="store_true", help="short requests and few of them: under ten minutes on two cores")
    parser.add_argument("--rate", type=float, help="first rate to try, requests/s [1; quick 2]")
    parser.add_argument("--shares", default="0.9", help="attainments to search the goodput of, as 0.9,0.99 [0.9]")
    parser.add_argument("--seconds", type=float, help="worth of requests in a trial")
    parser.add_argument("--least", type=int, help="requests in a trial, at least")
    parser.add_argument("--most", type=int, help="requests in a trial, at most")
    parser.add_argument("--minutes", type=float, help="for the search in all")
    parser.add_argument("--resolution", type=float, help="the search ends when missed/reached rates are this close, as 1.1")
    parser.add_argument("--length-scale", type=float, help="multiply all lengths by this instead of fitting them to the context")
    parser.add_argument("--budgets", help="chunk budgets to try for the chunked baseline [64,128,256; quick 64,256]")
    parser.add_argument("--prefill", type=int, default=1, help="prefill workers of the disaggregated system [1]")
    parser.add_argument("--decode", type=int, default=1, help="decode workers [1]; the baselines get as many devices")
    parser.add_argument("--devices", type=int, metavar="N", help="in all, shared by prefills and decodes if fewer [one for each]")
    parser.add_argument("--model", help="to start and to count tokens with [SmolLM2-135M-Instruct]")
    parser.add_argument("--model-name", help="what the --url servers call it, if they serve several")
    parser.add_argument("--key", help="API key for the --url servers")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--context", type=int, default=2048, help="largest request, prompt and answer, in tokens [2048]")
    parser.add_argument("--pages", type=int, default=8192, help="KV pages (of 16 tokens) of a started system in all [8192]")
    parser.add_argument(
        "--prefix-reuse",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether started systems share what prompts begin with [no; yes for mooncake, whose prompts do]",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("goodput.json"), help="results; plots go beside it [goodput.json]")
    parser.add_argument("--replot", type=Path, metavar="FILE", help="draw an earlier run's figures again, measure nothing")
    chosen = parser.parse_args(sys.argv[1:] if argv is None else argv)
    for name, value in (QUICK if chosen.quick else FULL).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    if chosen.start is None:
        chosen.start = [] if chosen.url else list(KINDS)
    if chosen.prefix_reuse is None:
        chosen.prefix_reuse = chosen.workload == "mooncake" and not chosen.interference
    if chosen.slo is None and chosen.slo_scale is None:
        chosen.slo_scale = "3"
    try:
        chosen.shares = tuple(float(word) for word in chosen.shares.split(","))
        chosen.budgets = [int(word) for word in chosen.budgets.split(",")]
        if chosen.slo:
            fixed(chosen.slo)
        if chosen.slo_scale:
            scales(chosen.slo_scale)
    except ValueError as error:
        parser.error(str(error))
    if not all(0 < share < 1 for share in chosen.shares) or min(chosen.budgets) < 1:
        parser.error("--shares must lie between 0 and 1, --budgets above 0")
    if min(chosen.rate, chosen.seconds, chosen.minutes, chosen.least, chosen.prefill, chosen.decode, chosen.pages, chosen.context - 1) <= 0:
        parser.error("rates, seconds, minutes, counts and sizes must be above 0")
    if chosen.devices is not None and not 1 <= chosen.devices <= chosen.prefill + chosen.decode:
        parser.error("--devices must be at least 1 and at most the prefill and decode workers together")
    if chosen.most < chosen.least or chosen.resolution <= 1 or chosen.cv < 0:
        parser.error("--most must not be below --least, --resolution must be above 1, --cv not below 0")
    if chosen.length_scale is not None and chosen.length_scale <= 0:
        parser.error("--length-scale must be above 0")
    return chosen
