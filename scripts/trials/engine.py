"""`./scripts/engine_bench`: the engine against the machine's ceilings, against plain transformers, and against other servers.

On a CPU one core is used unless --cores says otherwise, and the machine should be idle. Servers named by --peer should be pinned to the
same cores; they and the engine take turns, so that one computes at a time. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import os
import sys
import typing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
import torch

from common.errors import SettingError, StartError
from common.settings import Device, DType, Kernels, cores
from scripts.launcher.__main__ import Parser
from scripts.launcher.model import ModelError, obtain
from scripts.launcher.show import Progress
from scripts.outputs import obstacle
from scripts.trials import peers as http
from services.engine.bench.measure import Options, measure
from services.engine.bench.report import Report, table


class Result(msgspec.Struct, frozen=True):
    """The last line; `report.profile` is what the planner reads."""

    benchmark: str
    report: Report
    peers: list[http.Peer]


def main() -> int:
    chosen = _arguments()
    say = Progress()
    try:
        servers = dict(_peer(text) for text in chosen.peer)
        before = os.sched_getaffinity(0)
        if chosen.device == "cpu":
            _pin(cores(chosen.cores) if chosen.cores else [min(before)])
        path = obtain(chosen.model, say)
        options = Options(path, chosen.device, chosen.dtype, chosen.kernels, chosen.quick, plain=not chosen.no_plain)
        elsewhere = frozenset(before - os.sched_getaffinity(0) or before)
        report, times = measure(options, say, lambda shapes: http.samples(servers, shapes.vocabulary, elsewhere))
    except (StartError, SettingError, ModelError, RuntimeError, httpx.HTTPError) as error:
        print(f"engine_bench: {error}", file=sys.stderr)
        return 1
    print(table(report))
    found = [http.result(name, url, times) for name, url in servers.items()]
    if found:
        print(http.table(found, times))
    line = msgspec.json.encode(Result("engine", report, found))
    if chosen.json is not None:
        chosen.json.write_bytes(line + b"\n")
    if chosen.profile is not None:
        chosen.profile.write_bytes(msgspec.json.encode(report.profile) + b"\n")
    print(line.decode(), flush=True)
    return 0


def _pin(wanted: list[int]) -> None:
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:
        raise StartError(f"cores {wanted}: {error.strerror}") from error
    torch.set_num_threads(len(wanted))


def _peer(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not name or urlsplit(url).scheme not in ("http", "https"):
        raise SettingError(f"--peer {text}: it must be like NAME=http://127.0.0.1:8000")
    return name, url.rstrip("/").removesuffix("/v1")


def _arguments() -> argparse.Namespace:
    parser = Parser(prog="./scripts/engine_bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, GGUF file or hub id [the small default model]")
    parser.add_argument("--device", choices=typing.get_args(Device), default="cpu")
    parser.add_argument("--dtype", choices=typing.get_args(DType), default="auto")
    parser.add_argument("--cores", help="CPU cores, as 0 or 0-3 or 0,2 [the first one]")
    parser.add_argument("--kernels", choices=typing.get_args(Kernels), default="auto")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--no-plain", action="store_true", help="leave plain transformers out, for a profile sooner")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line here")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="also write what the planner reads here")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=URL", help="a server with OpenAI's API and the same model; may repeat"
    )
    chosen = parser.parse_args()
    for path in (chosen.json, chosen.profile):
        if reason := obstacle(path):
            parser.error(reason)
    return chosen


if __name__ == "__main__":
    sys.exit(main())
