"""Which faults strike whom and when: pure, from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "kill",
    "stop",
    "drain",
    "cut",
    "gateway_kill",
    "gateway_stop",
    "gateway_drain",
    "redis_kill",
    "redis_empty",
    "redis_away",
    "redis_stop",
    "clock_step",
    "poison",
]
WEIGHTS: dict[Kind, float] = {
    "kill": 5,
    "stop": 3,
    "drain": 2,
    "cut": 3,
    "gateway_kill": 1,
    "gateway_stop": 1,
    "gateway_drain": 1,
    "redis_kill": 1,
    "redis_empty": 1,
    "redis_away": 1,
    "redis_stop": 1,
    "clock_step": 1.5,
    "poison": 0.7,
}
LONGEST_S = 20.0
"""Stops and cuts last from one second to this."""
RESTART_S = 5.0
"""A killed process is started again at most this long after."""
STEPS_S = (-7200.0, -60.0, -5.0, 5.0, 60.0, 7200.0)
TRANSFER_FAULTS = ("", "", "fail:60", "stall:150", "corrupt:40")
"""What a prefill is started with."""
MESSAGE_FAULTS = ("", "drop:50", "delay:40x0.3", "drop:50,delay:60x0.2")


@dataclass(frozen=True)
class Strike:
    """`seconds`: how long it lasts, or after how long the victim is started again; of a clock step: by how much."""

    at_s: float
    kind: Kind
    target: str
    seconds: float


@dataclass(frozen=True)
class Possible:
    """Who may be struck. `cuttable`: workers in a network namespace of their own. `clocks`: processes whose wall clock can be moved."""

    workers: Sequence[str]
    gateways: Sequence[str]
    cuttable: Sequence[str] = ()
    clocks: Sequence[str] = ()
    empties: bool = True
    """Redis may lose its data."""
    victims: Sequence[str] = ()
    """Nobody else is struck; none: everybody may be."""

    def targets(self, kind: Kind) -> Sequence[str]:
        return [name for name in self._all(kind) if not self.victims or name in self.victims]

    def _all(self, kind: Kind) -> Sequence[str]:
        match kind:
            case "kill" | "stop" | "drain":
                return self.workers
            case "cut":
                return self.cuttable
            case "gateway_kill" | "gateway_drain" if len(self.gateways) < 2:
                return ()
            case "gateway_kill" | "gateway_stop" | "gateway_drain":
                return self.gateways
            case "clock_step":
                return self.clocks
            case "redis_empty" if not self.empties:
                return ()
            case _:
                return ("redis",) if kind != "poison" else ("all",)


def plan(seed: int, seconds: float, every_s: float, possible: Possible, only: Sequence[Kind] = ()) -> list[Strike]:
    """Strikes within `seconds`, `every_s` apart in the mean (a uniform half more or less). `only`: no other kinds."""
    rng = random.Random(f"strikes {seed}")
    kinds = [kind for kind in WEIGHTS if possible.targets(kind) and (not only or kind in only)]
    strikes: list[Strike] = []
    at_s = 0.0
    while kinds:
        at_s += every_s * rng.uniform(0.5, 1.5)
        kind = rng.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
        target = rng.choice(possible.targets(kind))
        seconds_of = _seconds(kind, rng)
        if at_s >= seconds:
            break
        strikes.append(Strike(at_s, kind, target, seconds_of))
    return strikes


def _seconds(kind: Kind, rng: random.Random) -> float:
    match kind:
        case "stop" | "cut" | "gateway_stop":
            return rng.uniform(1.0, LONGEST_S)
        case "redis_away" | "redis_stop":
            return rng.uniform(1.0, LONGEST_S / 2)
        case "clock_step":
            return rng.choice(STEPS_S)
        case "poison" | "redis_kill" | "redis_empty":
            return 0.0
        case _:
            return rng.uniform(0.0, RESTART_S)


def rolling(names: Sequence[str], start_s: float, every_s: float) -> list[Strike]:
    """Every process drained and started again, one after the other; Redis, which holds nothing but its file, is killed."""

    def kind(name: str) -> Kind:
        if name == "redis":
            return "redis_kill"
        return "gateway_drain" if name.startswith("gateway") else "drain"

    return [Strike(start_s + n * every_s, kind(name), name, 0.0) for n, name in enumerate(names)]
