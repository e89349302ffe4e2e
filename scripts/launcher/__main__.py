"""`./scripts/demo`: start the system, show one answer, serve until Ctrl-C, stop everything."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from typing import NoReturn

import httpx

from common.errors import SettingError
from scripts.launcher.cluster import Cluster, ClusterError, Shape, share_cores
from scripts.launcher.model import ModelError, name_of, obtain
from scripts.launcher.show import Credentials, Progress, credentials, stream_answer, timeline_table
from services.engine.native import build

QUESTION = "What is the capital of France?"
HIDDEN = "all API keys stand as digests, so that nobody here can show one"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="./scripts/demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--once", metavar="QUESTION", help="answer this, then stop")
    parser.add_argument("--model", help="folder, .gguf file or hub id; default: SmolLM2-135M-Instruct, fetched once")
    parser.add_argument("--prefill", type=int, metavar="N", help="prefill workers; default: 1")
    parser.add_argument("--decode", type=int, metavar="N", help="decode workers; default: 1")
    parser.add_argument("--colocated", type=int, default=0, metavar="N", help="workers for both phases, instead of the two above")
    parser.add_argument("--gateways", type=int, default=1, metavar="N", help="gateways, on consecutive ports")
    parser.add_argument("--redis", metavar="URL", help="a Redis or Valkey; default: an embedded one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--port", type=int, default=8000, help="of the first gateway")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest first answer")
    chosen = parser.parse_args(argv)
    if chosen.colocated < 0 or chosen.max_tokens < 1:
        parser.error("--colocated and --max-tokens cannot be that small")
    if chosen.redis is not None and not chosen.redis.startswith(("redis://", "rediss://", "unix://")):
        parser.error("--redis must be like redis://:password@host:6379/0")
    if chosen.colocated and (chosen.prefill or chosen.decode):
        parser.error("--colocated workers stand instead of --prefill and --decode")
    usual = 0 if chosen.colocated else 1
    chosen.prefill, chosen.decode = (usual if number is None else number for number in (chosen.prefill, chosen.decode))
    if not chosen.colocated and (chosen.prefill < 1 or chosen.decode < 1):
        parser.error("at least one prefill and one decode are needed (or --colocated)")
    if chosen.gateways < 1 or not 1 <= chosen.port <= 65536 - chosen.gateways:
        parser.error("at least one gateway, on a port from 1 to 65535")
    return chosen


def main() -> int:
    chosen = options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say = Progress()
    try:
        return run(chosen, say)
    except (ModelError, ClusterError, SettingError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped")
        return 0 if chosen.once is None else 130


def run(chosen: argparse.Namespace, say: Progress) -> int:
    """Everything from the model to the last answer. Raises ModelError, ClusterError and SettingError."""
    shown = credentials(os.environ)
    if shown.hidden and chosen.once is not None:
        print(f"no answer: {HIDDEN}; set BATON_API_KEYS to a key, or leave --once out", file=sys.stderr)
        return 1
    busy = [port for port in range(chosen.port, chosen.port + chosen.gateways) if in_use(port)]
    if busy:
        print(f"port {busy[0]} is in use: choose another with --port", file=sys.stderr)
        return 1
    model = obtain(chosen.model, say)
    name = name_of(chosen.model, model)
    shape = Shape(
        model=model,
        model_name=name,
        prefill=chosen.prefill,
        decode=chosen.decode,
        colocated=chosen.colocated,
        gateways=chosen.gateways,
        device=chosen.device,
        dtype=chosen.dtype,
        port=chosen.port,
        redis_url=chosen.redis,
    )
    workers = shape.prefill + shape.decode + shape.colocated
    if shape.device == "cpu" and len(set(share_cores(workers))) < workers:
        say(f"{workers} workers share fewer cores: expect them to wait for each other")
    if shape.device == "cpu":
        compile_kernels(say)
    with Cluster(shape, say) as cluster:
        try:
            say(f"starting {', '.join(cluster.children)}")
            cluster.begin()
            cluster.wait_ready()
            return serve(cluster, name, shown, chosen.once, chosen.max_tokens, say)
        except ClusterError as error:
            raise ClusterError(f"{error}\nthe logs of all processes: {cluster.keep_logs()}") from error


def compile_kernels(say: Progress) -> None:
    """Those for this CPU, if they are not there: each worker would, and nobody would see it."""
    if not (build.cache() / build.library_name(build.target())).exists() and build.compiler() is not None:
        say("compiling the kernels for this CPU, once (about half a minute)")
        with contextlib.suppress(build.Unavailable):  # a worker says why, and goes on without
            build.library()


def serve(cluster: Cluster, model: str, shown: Credentials, once: str | None, max_tokens: int, say: Progress) -> int:
    url = cluster.urls[0]
    wait_served(url)
    if shown.hidden:
        say(f"not asking anything: {HIDDEN}")
    elif not answered(url, model, once if once is not None else QUESTION, max_tokens, shown.key, say):
        return 1
    if once is not None:
        return 0
    say(f"serving {model} on {', '.join(cluster.urls)} — Ctrl-C stops everything")
    header = " -H 'Authorization: Bearer KEY'" if shown.needed else ""
    print(
        f"\n  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\\n"
        f'    -d \'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n',
        file=sys.stderr,
    )
    ready: set[int] = set()
    try:
        while True:
            revive(cluster, ready, say)
            time.sleep(1.0)
    except KeyboardInterrupt:
        say("stopping; streams that are open may come to their end (Ctrl-C again: now)")
        cluster.drain()
        raise


def revive(cluster: Cluster, ready: set[int], say: Progress) -> None:
    """Start again what has ended. `ready`: process ids of those that were seen ready. Raises ClusterError for one that never was."""
    for child in cluster.children.values():
        if child.facts is not None:
            ready.add(child.pid)
        if not child.alive:
            if child.pid not in ready:
                raise ClusterError(child.ending())
            say(f"{child.ending()}; starting it again")
            cluster.restart(child.name, wait=False)
    if cluster.valkey is not None and not cluster.valkey.alive:
        say("the embedded Valkey has ended; starting it again, empty")
        try:
            cluster.valkey.start()
        except TimeoutError as error:
            raise ClusterError(str(error)) from error


def answered(url: str, model: str, question: str, max_tokens: int, key: str | None, say: Progress) -> bool:
    """Asks, and shows the answer and its timeline, or why there is none."""
    say(f"asking: {question}")
    try:
        timeline = stream_answer(url, model, question, max_tokens, key)
    except (RuntimeError, OSError, httpx.HTTPError) as error:
        print(f"no answer: {error}", file=sys.stderr)
        return False
    print(timeline_table(timeline), file=sys.stderr)
    return True


def wait_served(url: str, timeout_s: float = 15.0) -> None:
    """Until the gateway has met a worker of each role. Raises ClusterError."""
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise ClusterError(f"{url} does not become ready")


def in_use(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
