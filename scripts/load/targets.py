"""What is measured: systems that this script starts itself on the same hardware, and servers that somebody else has started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from scripts.launcher.__main__ import wait_served
from scripts.launcher.cluster import Cluster, Shape, share_cores
from scripts.load.client import Server

KINDS = ("disaggregated", "colocated", "chunked")
PREFILL_PAGES = 0.25


@dataclass(frozen=True)
class Hardware:
    """What every started variant has in all. `pages` of KV are divided evenly among a variant's workers; where prefills and decodes share
    their devices, the prefills have `PREFILL_PAGES` of them: they keep a prompt only until it is handed over."""

    model: Path
    device: str
    dtype: str
    pages: int
    context_tokens: int
    prefill: int = 1
    decode: int = 1
    prefix_reuse: bool = False
    """Whether started systems share what prompts begin with: the same for all of them."""
    share: int | None = None
    """Devices in all; None: one for each prefill and each decode. With fewer they share them."""

    @property
    def devices(self) -> int:
        return self.share or self.prefill + self.decode


@dataclass(frozen=True)
class Variant:
    """A way to place work. The best of those of one `kind` counts."""

    kind: str
    placement: str
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.kind} {self.placement}"


@dataclass
class Target:
    """A running server under test. `cluster` is None for one that somebody else started; its CPU is then unknown."""

    name: str
    kind: str
    placement: str
    server: Server
    cluster: Cluster | None = None
    cpu: dict[str, float] = field(default_factory=dict)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds so far, by part of the system; a process that has gone is left out."""
        spent: dict[str, float] = {}
        if self.cluster is None:
            return spent
        parts = [(child.role, child.pid) for child in self.cluster.children.values() if child.alive]
        if self.cluster.valkey is not None:
            parts.append(("valkey", self.cluster.valkey.pid))
        for part, pid in parts:
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(pid).cpu_times()
                spent[part] = spent.get(part, 0.0) + times.user + times.system
        return spent


def variants(kind: str, hardware: Hardware, budget_tokens: int | None = None) -> list[Variant]:
    """All placements of one kind on this hardware: for the baselines one worker over all cores, and one worker for each device."""
    if kind == "disaggregated":
        shape = _shape(hardware, hardware.prefill + hardware.decode, prefill=hardware.prefill, decode=hardware.decode)
        if hardware.devices < hardware.prefill + hardware.decode:
            prefill, decode = divided(hardware)
            shape.role_flags.update(prefill={"pages": str(prefill)}, decode={"pages": str(decode)})
        return [Variant(kind, f"{hardware.prefill}+{hardware.decode}", shape)]
    flags = {"policy": "prefill_first" if kind == "colocated" else "chunked"}
    if budget_tokens is not None:
        flags["budget_tokens"] = str(budget_tokens)
    counts = [hardware.devices] if hardware.device == "cuda" else sorted({1, hardware.devices})
    return [
        Variant(kind, f"{n}×{hardware.devices // n}", _shape(hardware, n, colocated=n, prefill=0, decode=0, flags=flags)) for n in counts
    ]


def divided(hardware: Hardware) -> tuple[int, int]:
    """Pages of each prefill and of each decode where they share devices."""
    prefills = int(hardware.pages * PREFILL_PAGES)
    return prefills // hardware.prefill, (hardware.pages - prefills) // hardware.decode


def _shape(
    hardware: Hardware, workers: int, *, prefill: int, decode: int, colocated: int = 0, flags: dict[str, str] | None = None
) -> Shape:
    common = {
        "max_request_tokens": str(hardware.context_tokens),
        "pages": str(hardware.pages // workers),
        "prefix_reuse": str(hardware.prefix_reuse).lower(),
        **(flags or {}),
    }
    return Shape(
        model=hardware.model,
        prefill=prefill,
        decode=decode,
        colocated=colocated,
        device=hardware.device,
        dtype=hardware.dtype,
        worker_flags=common,
        role_flags={"gateway": {"max_queued": "100000", "max_running": "100000", "max_ttft_s": "86400"}},
    )


@contextlib.contextmanager
def started(wanted: Iterable[Variant], say: Callable[[str], None]) -> Iterator[list[tuple[Variant, Cluster]]]:
    """All of them, one after the other so that each calibrates on an idle machine. Raises ClusterError; nothing is left running."""
    with contextlib.ExitStack() as stack:
        running = []
        for variant in wanted:
            say(f"starting {variant.name} on cores {' | '.join(share_cores(_workers(variant.shape)))}")
            cluster = stack.enter_context(Cluster(variant.shape))
            cluster.start()
            wait_served(cluster.urls[0])
            running.append((variant, cluster))
        yield running


def _workers(shape: Shape) -> int:
    return shape.prefill + shape.decode + shape.colocated


def raise_own_priority() -> int:
    """The generator is served like the gateways and Valkey. Returns the priority it has."""
    from scripts.launcher.child import raise_priority

    raise_priority(os.getpid())
    return os.getpriority(os.PRIO_PROCESS, 0)
