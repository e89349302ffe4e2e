"""Measures one model on one machine in one run: ceilings, prompts, decode steps, Python, sampling, and plain transformers beside them.

All of it takes turns, round by round: a neighbour who takes half the machine for a minute then slows bounds and launches alike.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from common.settings import Device, DType, Kernels
from services.engine.bench import launches, overhead, work
from services.engine.bench.ceilings import Ceilings, Probe
from services.engine.bench.launches import PAGE_TOKENS, Grid, prompt_name, step_name
from services.engine.bench.plain import KINDS, Plain
from services.engine.bench.report import Ceiling, DecodePoint, PrefillPoint, Profile, Report, Row
from services.engine.bench.rounds import Case, Sample, Say, Times
from services.engine.bench.rounds import measure as timed
from services.engine.bench.work import Shapes, Work
from services.engine.forward import place
from services.engine.loading import load
from services.engine.pool import Pool, free_bytes
from services.engine.torch_forward import TorchForward

ROUNDS, QUICK_ROUNDS = 7, 3
PLAIN_PROMPTS = ((512,), (2048,))
PLAIN_STEPS = ((1, 512), (16, 512))


@dataclass(frozen=True)
class Options:
    path: Path
    device: Device
    dtype: DType
    kernels: Kernels
    quick: bool
    plain: bool = True
    """Plain transformers beside it."""


def measure(
    options: Options, say: Say, beside: Callable[[Shapes], Sequence[Sample]] = lambda shapes: ()
) -> tuple[Report, dict[str, Times]]:
    """The report, and the times of everything by name. `beside` makes what else shall take its turn in each round. Raises StartError if
    the model or the kernels cannot be had, or the pool does not fit."""
    say("loading the model")
    loaded = load(options.path, options.device, options.dtype, PAGE_TOKENS)
    shapes, layout, device, dtype = launches.shapes(loaded), loaded.layout, loaded.device, loaded.dtype
    wanted = launches.grid(options.device, loaded.context_tokens, options.quick)
    over = place(loaded, options.kernels)
    del loaded
    gc.collect()
    memory = _memory(device, shapes)
    say(f"a pool of {wanted.pages} pages")
    pool = Pool(layout, wanted.pages, device)
    launches.fill(pool)
    forward = over(pool)
    probe = Probe(shapes, device, dtype)
    samples = (1, 16) if options.device == "cpu" else (1, 16, 256)
    cases = [
        *probe.cases,
        *launches.cases(forward, wanted),
        *overhead.step_cases(overhead.SEQUENCES[-1]),
        *overhead.sampling_cases(shapes.vocabulary, device, samples),
    ]
    for kind in KINDS[: 0 if not options.plain else 1 if options.quick else None]:
        say(f"plain transformers with {kind}")
        cases += _plain(options, device, dtype, kind, wanted)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    times = timed([*cases, *beside(shapes)], rounds, say)
    found = probe.ceilings(times)
    rows = Rows(shapes, found, times)
    step = rows.steps()
    report = Report(
        device=options.device,
        dtype=str(dtype).removeprefix("torch."),
        kernels="torch" if isinstance(forward, TorchForward) else "native",
        cores=sorted(os.sched_getaffinity(0)) if options.device == "cpu" else [],
        rounds=rounds,
        ceiling=Ceiling(found.flops_per_s, found.read_bytes_per_s, found.copy_bytes_per_s, found.ways),
        prefill=[rows.launch(prompt_name(lengths), work.prefill(shapes, lengths)) for lengths in wanted.prompts],
        decode=[rows.launch(step_name(*one), work.decode(shapes, *one)) for one in wanted.steps],
        step=step,
        sampling=[rows.sampling(name, batch) for batch in samples for name in overhead.SAMPLINGS],
        profile=Profile(
            prefill=[PrefillPoint(list(lengths), times[prompt_name(lengths)].median) for lengths in wanted.prompts],
            decode=[DecodePoint(*one, times[step_name(*one)].median) for one in wanted.steps],
            kv_bytes_per_token=shapes.kv_token_bytes,
            weight_bytes=shapes.weight_bytes,
            memory_bytes=memory,
            transfer_bytes_per_s=found.copy_bytes_per_s,
            overhead_s=next(row.median_s for row in step if row.name == overhead.step_name(16)),
            page_tokens=PAGE_TOKENS,
            layers=shapes.layers,
            machine=machine(device),
            model=options.path.name,
            made=time.strftime("%Y-%m-%d"),
        ),
    )
    return report, times


@dataclass(frozen=True)
class Rows:
    """Times against bounds."""

    shapes: Shapes
    ceilings: Ceilings
    times: Mapping[str, Times]

    def launch(self, name: str, due: Work) -> Row:
        bound = work.bound(due, self.ceilings.flops_per_s, self.ceilings.read_bytes_per_s)
        plain = {kind: self.times[f"{name}, {kind}"].median for kind in KINDS if f"{name}, {kind}" in self.times}
        return Row(name, self.times[name].median, self.times[name].least, bound.seconds, bound.by, plain)

    def steps(self) -> list[Row]:
        names = {overhead.step_name(count): overhead.step_bound_s(count) for count in overhead.SEQUENCES}
        return [Row(name, self.times[name].median, self.times[name].least, bound_s) for name, bound_s in names.items()]

    def sampling(self, sampling: str, batch: int) -> Row:
        name = overhead.sampling_name(sampling, batch)
        bound_s = overhead.sampling_bytes(self.shapes.vocabulary, batch) / self.ceilings.read_bytes_per_s
        return Row(name, self.times[name].median, self.times[name].least, bound_s, "reads")


def machine(device: torch.device) -> str:
    """Its name, as its maker has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")


def _plain(options: Options, device: torch.device, dtype: torch.dtype, kind: str, wanted: Grid) -> list[Case]:
    prompts = tuple(one for one in PLAIN_PROMPTS if one in wanted.prompts)
    steps = tuple(one for one in PLAIN_STEPS if one in wanted.steps)
    return Plain(options.path, device, dtype, kind).cases(prompts, steps)


def _memory(device: torch.device, shapes: Shapes) -> float:
    """Of the device for weights and KV, the weights being there."""
    return float(
        torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else free_bytes(device) + shapes.weight_bytes
    )
