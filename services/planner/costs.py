"""What the planner knows of a machine and a model: launches, room for KV, the way between workers. Frozen; tokens, bytes, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from services.planner.latency import LaunchModel

CHUNK_S = 0.5
"""A long prompt runs in chunks of about this long: the workers' default (`chunk_s`)."""


@dataclass(frozen=True, slots=True)
class Parallel:
    """How one worker is spread over devices: tensor and pipeline degree."""

    tp: int
    pp: int

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp{self.tp} pp{self.pp}"


@dataclass(frozen=True, slots=True)
class Costs:
    """`launches` by tensor-parallel degree.

    A worker of g devices holds `(memory_bytes·g - weight_bytes) / kv_bytes_per_token` tokens of KV.
    """

    name: str
    launches: Mapping[int, LaunchModel]
    memory_bytes: float
    """Of one device, for weights and KV together."""
    weight_bytes: float
    """Of the whole model; each worker holds it once over all its devices."""
    kv_bytes_per_token: float
    """Over all layers and heads."""
    transfer_bytes_per_s: float
    """From one worker to another on the same node, when one handoff goes alone. One way at a time at either end."""
    network_bytes_per_s: float
    """The same between nodes."""
    transfer_s: float = 0.0
    """Of a handoff beyond its bytes: offer, grant, verification, commit."""
    page_tokens: int = 16
    layers: int = 0
    """Pipeline degrees must divide it; 0: unknown, any will do."""
    source: str = ""
    """Where the figures come from, and how well they fit."""

    def pages(self, parallel: Parallel) -> int:
        """Pages of KV in the pool of such a worker; 0 if not even the weights fit."""
        room = self.memory_bytes * parallel.devices - self.weight_bytes
        return max(0, int(room / self.kv_bytes_per_token) // self.page_tokens)

    def transferred_s(self, pages: int, across_nodes: bool = False) -> float:
        """Time that so many pages occupy the way between two workers."""
        rate = self.network_bytes_per_s if across_nodes else self.transfer_bytes_per_s
        return pages * self.page_tokens * self.kv_bytes_per_token / rate

    def limits(self, tp: int) -> tuple[int, int]:
        """(budget, chunk) tokens of a launch."""
        return self.launches[tp].limits(self.page_tokens, CHUNK_S)
