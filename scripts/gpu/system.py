"""Whole systems on one GPU, in the shape of Llama-3-8B with random weights: disaggregated, colocated and chunked beside each other.

Time between tokens of running streams while 8k-token prompts arrive; the handoff of a 2,048-token prompt against a decode step; requests
per second within strict and loose objectives. The disaggregated system is measured up to three times: its two workers taking turns
on the card, and with its prefill bounded to 50 and to 30 % of the multiprocessors (MPS), where that runs. Every result is given out as it
comes.

Beside `./scripts/gpu_check --only system` it can be called by itself, also without a GPU: `python -m scripts.gpu.system --tiny`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from scripts.gpu import checkpoint
from scripts.gpu.effort import GPU, SEED, TINY, Effort
from scripts.gpu.goodput import OBJECTIVES, PATIENCE_S, Goodput, Result, failure, within
from scripts.launcher.__main__ import wait_served
from scripts.launcher.cluster import Cluster, ClusterError
from scripts.launcher.model import obtain
from scripts.launcher.mps import BINARY, binary
from scripts.launcher.show import Progress
from scripts.load import interference
from scripts.load.__main__ import reach
from scripts.load.targets import Hardware, Target, Variant, raise_own_priority, variants
from scripts.load.texts import Writer
from scripts.load.workloads import load
from scripts.trials import handoff

ROOM_BYTES = 120 << 30
"""A card with so much memory holds four copies of the weights, and the KV of three systems."""
START_S, BOUNDED_START_S = 110.0, 70.0
LAST_S = 15.0
"""Left at the end, to stop everything."""
FAILURES = (ClusterError, RuntimeError, OSError, TimeoutError, httpx.HTTPError)
"""Of a system that does not come up."""


def results(model: str | None) -> Iterator[Result]:
    yield from Systems(GPU, obtain(None, Progress()) if model is None else Path(model)).measured()


def compile_kernels() -> None:
    """Into Triton's cache, or the first system to start would pay for all of them."""
    from scripts.gpu.speed import compile_all  # they need Triton
    from services.engine.cuda.triton_operators import Ways

    compile_all([Ways()])


class Systems:
    """The systems that run, and what has been asked of them."""

    def __init__(self, effort: Effort, tokenizer: Path) -> None:
        self._effort = effort
        self._tokenizer = tokenizer
        self._began = time.monotonic()
        self._say = Progress()
        self._running: dict[str, Target] = {}
        self._asked = itertools.count()
        self._started = itertools.count(1)

    def measured(self) -> Iterator[Result]:
        """Everything, in an order in which a failure or the end of the time leaves what matters most. Nothing is left running."""
        effort = self._effort
        yield "about", self._about()
        raise_own_priority()
        with ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-system-", dir=roomy())))
            stack.callback(self._stop)
            began = time.monotonic()
            if effort.device == "cuda":
                compile_kernels()
            written = checkpoint.write(place, effort.size, self._tokenizer, effort.device)
            torch.cuda.empty_cache()
            yield "checkpoint", {"bytes": written, "seconds": round(time.monotonic() - began, 1), "in": str(place.parent)}
            self._texts(place)
            hardware = Hardware(place, effort.device, "auto", effort.pages, effort.context, share=1)
            apart, colocated = (variants(kind, hardware)[0] for kind in ("disaggregated", "colocated"))
            chunked = variants("chunked", hardware, effort.budget_tokens)[0]
            yield from (self._together if self._fit() else self._in_turn)(apart, colocated, chunked)
        yield "done", {**self._about(), "seconds": round(time.monotonic() - self._began, 1)}

    def _together(self, apart: Variant, colocated: Variant, chunked: Variant) -> Iterator[Result]:
        """All on the card at once, so that trials take turns."""
        yield from self._start([apart])
        yield from self._start([colocated, chunked])  # two workers calibrate beside each other, as the first two did
        yield from self._gaps(apart)
        yield from self._handoff(apart)
        yield from self._gaps(colocated)
        yield from self._gaps(chunked)
        best = apart
        for percent in self._effort.percents:
            if self._effort.device == "cuda" and binary() is None:
                yield "MPS", {"skipped": f"there is no {BINARY}"}
                break
            if best is not apart and self._left() < self._effort.goodput_s + 60:
                break
            self._stop(best.name)
            better = bounded(apart, percent)
            yield from self._start([better], BOUNDED_START_S)
            if better.name not in self._running:
                break
            yield from self._gaps(better)
            yield from self._handoff(better)
            best = better
        if best.name not in self._running:
            yield from self._start([best])
        yield from self._search((best, colocated, chunked), self._effort.goodput_s)

    def _in_turn(self, apart: Variant, colocated: Variant, chunked: Variant) -> Iterator[Result]:
        """One system at a time: a card that holds no more."""
        for variant in (apart, colocated, chunked, *(bounded(apart, percent) for percent in self._effort.percents[:1])):
            if self._left() < 45:
                break
            yield from self._start([variant])
            if variant.name not in self._running:
                continue
            yield from self._gaps(variant)
            if variant.kind == apart.kind:
                yield from self._handoff(variant)
            yield from self._search([variant], self._effort.goodput_s / 4)
            self._stop(variant.name)

    # ---------------------------------------------------------------------------------------------------- starting, ending

    def _start(self, wanted: Sequence[Variant], patience_s: float = START_S) -> Iterator[Result]:
        """Those that come up are running then, and measured from here on; of the others the reason is told."""
        began = time.monotonic()
        names = {variant.name: f"start {next(self._started)}, {variant.name}" for variant in wanted}
        clusters = [(variant, Cluster(variant.shape, self._say)) for variant in wanted]
        for variant, cluster in clusters:
            self._say(f"starting {variant.name}")
            try:
                cluster.begin()
                if cluster.mps is not None and not cluster.mps.env:  # nobody waits for workers that would have no bounds
                    raise ClusterError(f"no MPS: {cluster.mps.failure}")
            except FAILURES as error:
                cluster.stop()
                yield names[variant.name], {"ok": False, "error": str(error)}
        for variant, cluster in clusters:
            if not any(child.process for child in cluster.children.values()):
                continue
            try:
                cluster.wait_ready(timeout_s=max(1.0, min(patience_s, self._left()) - (time.monotonic() - began)))
                wait_served(cluster.urls[0])
                self._running[variant.name] = reach(variant, cluster)
            except FAILURES as error:
                told = {child.name: child.log.read_text(errors="replace").splitlines()[-4:] for child in cluster.workers}
                cluster.stop()
                yield names[variant.name], {"started": False, "error": str(error)[:300], "logs": told}
                continue
            limits = {child.name: said(cluster, child.name, "engine built") for child in cluster.workers}
            yield names[variant.name], {"seconds": round(time.monotonic() - began, 1), "engines": limits}

    def _stop(self, name: str | None = None) -> None:
        """One of them, or all."""
        for one in [name] if name is not None else list(self._running):
            target = self._running.pop(one, None)
            if target is not None and target.cluster is not None:
                target.cluster.stop()

    # ----------------------------------------------------------------------------------------------------------- measuring

    def _gaps(self, variant: Variant) -> Iterator[Result]:
        """Time between tokens of running streams, without and with long prompts."""
        target = self._running.get(variant.name)
        if target is None:
            return
        effort, found = self._effort, {}
        try:
            for one in (replace(effort.load, half_s=effort.warm_s, settle_s=0.0), effort.load):
                measure = interference.measure(target, self._streams, one, next(self._asked))
                found = asyncio.run(within(measure, 2 * one.half_s + PATIENCE_S))
        except Exception as error:
            found = failure(error)
        yield f"between tokens, {variant.name}", found

    def _handoff(self, variant: Variant) -> Iterator[Result]:
        target = self._running.get(variant.name)
        if target is None or target.cluster is None:
            return
        prompt = random.Random(SEED).choices(checkpoint.plain(self._tokenizer), k=self._effort.handoff_tokens)
        try:
            cost = asyncio.run(within(handoff.measure(target.server.url, prompt, 7, target.server.model), PATIENCE_S))
            steps = {"transfer_in_steps": round(cost.transfer_ms / cost.decode_step_ms, 3)}
            found = {**asdict(cost), **steps, "transport": said(target.cluster, "prefill-0", "transfer open")}
        except Exception as error:
            found = failure(error)
        yield f"handoff, {variant.name}", found

    def _search(self, wanted: Sequence[Variant], seconds: float) -> Iterator[Result]:
        """Goodput of those that run."""
        targets = [self._running[variant.name] for variant in wanted if variant.name in self._running]
        yield from self._goodput.search(targets, min(seconds, self._left()))

    # -------------------------------------------------------------------------------------------------------------- inside

    def _texts(self, place: Path) -> None:
        effort = self._effort
        self._streams = Writer(place, interference.workload(effort.context, effort.load), SEED)
        workload = load("chatbot", effort.context, SEED, effort.length_scale)
        self._goodput = Goodput(effort, workload, Writer(place, workload, SEED), self._say)

    def _left(self) -> float:
        return self._began + self._effort.whole_s - LAST_S - time.monotonic()

    def _fit(self) -> bool:
        return self._effort.device == "cpu" or torch.cuda.mem_get_info()[1] >= ROOM_BYTES

    def _about(self) -> dict[str, Any]:
        effort = self._effort
        card = torch.cuda.get_device_name() if effort.device == "cuda" else "cpu"
        return {
            "device": card,
            "model": asdict(effort.size),
            "load": asdict(effort.load),
            "pages_of_each_system": effort.pages,
            "context_tokens": effort.context,
            "chunk_budget_tokens": effort.budget_tokens,
            "trials": asdict(effort.plan),
            "lengths": f"chatbot × {effort.length_scale:g}",
            "objectives_ttft_tpot": OBJECTIVES,
        }


def bounded(variant: Variant, percent: int) -> Variant:
    """The same with a prefill that may use only so much of the card."""
    flags = variant.shape.role_flags
    role_flags = {**flags, "prefill": {**flags.get("prefill", {}), "gpu_percent": str(percent)}}
    return replace(variant, placement=f"{variant.placement}, prefill {percent} %", shape=replace(variant.shape, role_flags=role_flags))


def said(cluster: Cluster, child: str, words: str) -> str | None:
    """The last line of a child's log with these words, from there on."""
    lines = cluster.children[child].log.read_text(errors="replace").splitlines()
    return next((line[line.index(words) :][:300] for line in reversed(lines) if words in line), None)


def roomy() -> str:
    """Where a checkpoint of 16 GB is written and read fastest: memory, if there is plenty, else the usual place."""
    memory = Path("/dev/shm")  # noqa: S108
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 40 << 30 else tempfile.gettempdir()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu.system", description=__doc__)
    parser.add_argument("--model", help="folder with the tokenizer's files [the default model's]")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU: the same steps in a minute or two")
    parser.add_argument("--seconds", type=float, help="in all [345; tiny 150]")
    parser.add_argument("--goodput", type=float, metavar="SECONDS", help="for the search of goodput [150; tiny 20]")
    parser.add_argument("--percents", help="shares of the card for the prefill, tried in this order; 0: none [50,30]")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing is left running, and no checkpoint lies about
    effort = TINY if chosen.tiny else GPU
    if chosen.percents:
        effort = replace(effort, percents=tuple(int(word) for word in chosen.percents.split(",") if int(word)))
    effort = replace(effort, whole_s=chosen.seconds or effort.whole_s, goodput_s=chosen.goodput or effort.goodput_s)
    for result in Systems(effort, obtain(None, Progress()) if chosen.model is None else Path(chosen.model)).measured():
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
