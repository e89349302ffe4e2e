"""Placements: which workers, how many, over how many devices each. Frozen structs and their words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from services.engine.policies import PolicyName
from services.planner.costs import Parallel


@dataclass(frozen=True, slots=True)
class Group:
    """Equal workers."""

    parallel: Parallel
    replicas: int

    @property
    def devices(self) -> int:
        return self.parallel.devices * self.replicas

    def __str__(self) -> str:
        return f"{self.replicas} x ({self.parallel})"


@dataclass(frozen=True, slots=True)
class Disaggregated:
    """Prefill and decode on workers of their own. With `units` above 1 the whole is repeated, each unit a fleet on its own node(s)."""

    prefill: Group
    decode: Group
    units: int = 1
    across_nodes: bool = False
    """Handoffs cross the network between nodes."""
    short_tokens: int = 4
    """Answers that prefills write themselves: the workers' default."""

    @property
    def devices(self) -> int:
        return (self.prefill.devices + self.decode.devices) * self.units

    def __str__(self) -> str:
        words = f"prefill {self.prefill} + decode {self.decode}"
        return f"{self.units} x [{words}]" if self.units > 1 else words


@dataclass(frozen=True, slots=True)
class Colocated:
    """Both phases in each worker, under one of the engine's policies. `budget_tokens` None: the saturating length."""

    group: Group
    policy: PolicyName = "prefill_first"
    budget_tokens: int | None = None

    @property
    def devices(self) -> int:
        return self.group.devices

    def __str__(self) -> str:
        budget = f", budget {self.budget_tokens}" if self.budget_tokens else ""
        return f"colocated {self.group} {self.policy}{budget}"


@dataclass(frozen=True, slots=True)
class PrefillOnly:
    """One phase alone, as DistServe's Algorithm 1 looks at it: every request ends with its first token."""

    group: Group

    @property
    def devices(self) -> int:
        return self.group.devices

    def __str__(self) -> str:
        return f"prefill alone {self.group}"


@dataclass(frozen=True, slots=True)
class DecodeOnly:
    """The other one: prompts come computed, at the moment of arrival and for nothing."""

    group: Group

    @property
    def devices(self) -> int:
        return self.group.devices

    def __str__(self) -> str:
        return f"decode alone {self.group}"


Placement: TypeAlias = Disaggregated | Colocated
Simulated: TypeAlias = Placement | PrefillOnly | DecodeOnly
