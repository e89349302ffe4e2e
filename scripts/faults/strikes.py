"""Carries the strikes out, and brings back whoever they ended."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Coroutine, Sequence

from scripts.faults.clients import Gateway
from scripts.faults.schedule import MESSAGE_FAULTS, TRANSFER_FAULTS, Strike
from scripts.faults.score import Score
from scripts.faults.system import System
from scripts.launcher.child import Child

LOOK_S = 0.25
AGAIN_S = 1.0
"""A process that ended by itself is started again after this long."""
DRAIN_S = 170.0
"""A process that has not drained by then has failed."""
ORPHAN_S = 45.0
"""So long after its gateway was killed a poison's job may still be claimed, and kill."""
UNCLEAR_S = 4.0
"""So long after Redis or a gateway was away, what a gateway measures of others' deaths says nothing."""

Say = Callable[[str], None]


class Striker:
    """`poison()` sends one such request and waits for its end."""

    def __init__(self, system: System, score: Score, seed: int, poison: Callable[[], Coroutine[None, None, None]], say: Say) -> None:
        self._system = system
        self._score = score
        self._rng = random.Random(f"lives {seed}")
        self._poison = poison
        self._say = say
        self._down: set[str] = set()
        """Struck and not yet back; nobody is struck twice at once."""
        self._killed: set[tuple[str, int]] = set()
        self._poisonous = 0
        self.unclear_until = 0.0
        """See UNCLEAR_S."""

    def ended(self, gateway: Gateway) -> bool:
        """Whether this life of the gateway was killed."""
        return (gateway.name, gateway.life) in self._killed

    async def run(self, strikes: Sequence[Strike], start: float) -> None:
        """All strikes at their times; returns when everybody struck is on the way back."""
        async with asyncio.TaskGroup() as tasks:
            for strike in strikes:
                await asyncio.sleep(max(0.0, start + strike.at_s - time.monotonic()))
                if strike.target not in self._down and self._ready(strike.target):
                    self._say(f"{strike.kind} {strike.target} {strike.seconds:.1f}")
                    self._score.faults[strike.kind] += 1
                    tasks.create_task(self._strike(strike))

    async def revive(self) -> None:
        """Start again whoever ended by itself, until cancelled; unless poison was about, that is a failure."""
        while True:
            await asyncio.sleep(LOOK_S)
            for child in self._system.cluster.children.values():
                if child.process is None or child.alive or child.name in self._down:
                    continue
                status = child.process.returncode
                if self._poisonous and child.role != "gateway" and status == -signal.SIGKILL:
                    self._score.faults["poison_death"] += 1
                elif status == 1 and time.monotonic() < self.unclear_until:
                    self._score.faults["start_without_redis"] += 1
                else:
                    self._score.crashes.append(f"{child.name} with {status}: {child.last_words()[-200:]}")
                self._say(f"{child.name} ended with {status}: {child.last_words()[-200:]}")
                await asyncio.sleep(AGAIN_S)
                self._start(child.name)

    # ---------------------------------------------------------------------------------------------------------- inside

    @property
    def _gateways_killed(self) -> int:
        return sum(name.startswith("gateway") for name, _ in self._killed)

    def _ready(self, name: str) -> bool:
        if name == "redis":
            return self._system.valkey.alive
        return name == "all" or self._system.cluster.children[name].facts is not None

    def _start(self, name: str) -> None:
        """A new life with faults of its own."""
        child = self._system.cluster.children[name]
        if child.role == "prefill":
            child.flags["fault"] = self._rng.choice(TRANSFER_FAULTS)
            if child.flags["fault"]:
                self._score.faults[f"transfer_{child.flags['fault'].partition(':')[0]}"] += 1
        child.flags["message_fault"] = self._rng.choice(MESSAGE_FAULTS)
        if child.flags["message_fault"]:
            self._score.faults["messages"] += 1
        self._system.restart(name)

    async def _strike(self, strike: Strike) -> None:
        if strike.kind == "clock_step":
            self._system.clocks.step(strike.target, strike.seconds)
            return
        if strike.kind == "poison":
            self._poisonous += 1
            killed = self._gateways_killed
            await self._poison()
            await asyncio.sleep(2 * LOOK_S if self._gateways_killed == killed else ORPHAN_S)
            self._poisonous -= 1
            return
        self._down.add(strike.target)
        try:
            if strike.target == "redis":
                await self._redis(strike)
            else:
                await self._process(strike, self._system.cluster.children[strike.target])
        finally:
            self._down.discard(strike.target)

    async def _process(self, strike: Strike, child: Child) -> None:
        cluster = self._system.cluster
        match strike.kind:
            case "kill" | "gateway_kill":
                self._killed.add((child.name, self._system.lives.get(child.name, 0)))
                cluster.kill(child.name)
                await asyncio.sleep(strike.seconds)
                self._start(child.name)
            case "stop" | "gateway_stop":
                cluster.kill(child.name, signal.SIGSTOP)
                await asyncio.sleep(strike.seconds)
                cluster.kill(child.name, signal.SIGCONT)
                if child.role == "gateway":
                    self._unclear()
            case "drain" | "gateway_drain":
                await self._drain(child)
                await asyncio.sleep(strike.seconds)
                self._start(child.name)
            case "cut":
                assert self._system.network is not None
                self._system.network.cut(child.name)
                await asyncio.sleep(strike.seconds)
                self._system.network.heal(child.name)

    async def _drain(self, child: Child) -> None:
        began = time.monotonic()
        self._system.cluster.kill(child.name, signal.SIGTERM)
        while child.alive:
            if time.monotonic() - began > DRAIN_S:
                self._score.crashes.append(f"{child.name} does not drain")
                self._system.cluster.kill(child.name)
                return
            await asyncio.sleep(LOOK_S)
        assert child.process is not None
        if child.process.returncode:
            self._score.crashes.append(f"{child.name} drained with {child.process.returncode}: {child.last_words()[-200:]}")

    async def _redis(self, strike: Strike) -> None:
        valkey = self._system.valkey
        self.unclear_until = time.monotonic() + strike.seconds + UNCLEAR_S
        match strike.kind:
            case "redis_stop":
                valkey.signal(signal.SIGSTOP)
                await asyncio.sleep(strike.seconds)
                valkey.signal(signal.SIGCONT)
            case _:
                valkey.kill()
                if strike.kind == "redis_empty":
                    valkey.forget()
                await asyncio.sleep(strike.seconds)
                valkey.start()
        self._unclear()

    def _unclear(self) -> None:
        self.unclear_until = time.monotonic() + UNCLEAR_S
