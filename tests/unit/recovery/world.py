"""The simulated fleet: gateways, prefills, decodes, queue and wires on one clock, and what can be done to them. Seeded, so repeatable.

What must hold is asserted where it could break: clients see each index once, in order, and exactly the undisturbed tokens; one decode is
heard per attempt; pools add up after every engine step; no write lands in a page that is not in transit for its grant; every KV read is
the one that was computed for these very tokens, and so is every page that can be found by its hash. `settle` lets the weather calm
down and asserts that nothing is left.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from common.messages import (
    Incarnation,
    Job,
    Letter,
    Role,
    Sampling,
    ToPeer,
    ToWorker,
    decode,
    encode,
)
from common.queue import Entry
from gateway.ask import Ask
from services.engine.pages import chain_hashes
from tests.unit.recovery.carrier import Carrier
from tests.unit.recovery.decodes import Decode
from tests.unit.recovery.fabric import PAGE_TOKENS, Clock, Process, Streams, Weather, Wires, pages_of
from tests.unit.recovery.gateways import Gateway
from tests.unit.recovery.prefills import Colocated, Prefill
from tests.unit.recovery.worker import FINGERPRINT, Worker

P = TypeVar("P", bound=Process)


class World:
    """All of it. `start` adds processes; `run` lets time pass."""

    def __init__(self, seed: int = 0, *, max_request_tokens: int = 48, reuse: bool = True, short_tokens: int = 0) -> None:
        self.reuse = reuse
        """Whether workers share pages by their hashes (prefix reuse)."""
        self.short_tokens = short_tokens
        """Of answers that prefills write themselves."""
        self.truth: dict[bytes, list[int]] = {}
        """What lies in a page with this hash."""
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.weather = Weather()
        self.wires = Wires(self.clock, self.rng, self.weather)
        self.queue = Streams(self.clock)
        self.max_request_tokens = max_request_tokens
        self.jobs: list[tuple[Entry, Job]] = []
        """Every job that has ever entered the queue."""
        self.processes: dict[Incarnation, Process] = {}
        self.carriers: dict[Incarnation, Carrier] = {}
        self._roles: dict[Incarnation, Role] = {}
        self._numbers = 0

    @property
    def now(self) -> float:
        return self.clock.now

    def learn(self, ids: list[int]) -> None:
        """Tokens that somebody may compute."""
        self.truth.update(zip(chain_hashes(FINGERPRINT, ids, PAGE_TOKENS), pages_of(ids), strict=True))

    # ------------------------------------------------------------------------------------------------------------- fleet

    def _name(self, letter: str) -> Incarnation:
        self._numbers += 1
        return f"{letter}{self._numbers}"

    def gateway(self) -> Gateway:
        return self._join(Gateway(self, self._name("g")), "gateway")

    def prefill(self, pages: int = 24, depth: int = 1) -> Prefill:
        return self._join(Prefill(self, self._name("p"), pages, depth), "prefill")

    def decode(self, pages: int = 24, depth: int = 1) -> Decode:
        return self._join(Decode(self, self._name("d"), pages, depth), "decode")

    def colocated(self, pages: int = 24, depth: int = 1) -> Colocated:
        return self._join(Colocated(self, self._name("c"), pages, depth), "colocated")

    def start(self, kind: type[Worker], pages: int = 24, depth: int = 1) -> Worker:
        if kind is Colocated:
            return self.colocated(pages, depth)
        return self.prefill(pages, depth) if kind is Prefill else self.decode(pages, depth)

    def _join(self, process: P, role: Role) -> P:
        """Introductions reach each other process within a second, both ways."""
        for name, other in self.processes.items():
            if other.alive:
                self._introduce(process, name, self._roles[name])
                self._introduce(other, process.name, role)
        self.processes[process.name] = process
        self._roles[process.name] = role
        return process

    def _introduce(self, to: Process, name: Incarnation, role: Role) -> None:
        self.clock.after(self.rng.random(), lambda: to.deliver("fleet", lambda: to.introduced(name, role)))  # type: ignore[attr-defined]

    def control(self, source: Process, to: Incarnation, body: ToWorker | ToPeer) -> None:
        """A letter on a control socket: written once, read at the other end."""
        target = self.processes.get(to)
        if target is None:
            return
        data = encode(Letter(source.name, to, body))
        letter = decode(data, Letter)
        self.wires.send("control", source, target, letter, lambda: target.letter(letter))  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------------------------ faults

    def kill(self, process: Process) -> None:
        process.alive = False
        carrier = self.carriers.get(process.name)
        if carrier is not None:
            carrier.died()

    ended = kill
    """A drained worker exits: to the others it looks the same."""

    def freeze(self, process: Process, seconds: float) -> None:
        if process.alive and not process.frozen:
            process.frozen = True
            self.clock.after(seconds, lambda: self.thaw(process))

    def thaw(self, process: Process) -> None:
        if process.alive and process.frozen:
            process.thaw(self.rng)

    def hang(self, worker: Worker, seconds: float) -> None:
        worker.hung = True
        self.clock.after(seconds, worker.unhang)

    # -------------------------------------------------------------------------------------------------------------- time

    def run(self, seconds: float) -> None:
        self.clock.run(self.now + seconds)

    def run_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true in time; looked at every 50 ms."""
        until = self.now + seconds
        while not condition():
            if self.now >= until:
                return False
            self.run(0.05)
        return True

    def living(self, kind: type[P]) -> list[P]:
        return [process for process in self.processes.values() if isinstance(process, kind) and process.alive]

    def settle(self, seconds: float = 60.0) -> None:
        """Calm weather, everybody awake, one worker of each role: every request ends, and then nothing is left anywhere."""
        self.weather.__dict__.update(Weather().__dict__)
        self.queue.away = False
        for process in list(self.processes.values()):
            self.thaw(process)
        for worker in self.living(Worker):
            worker.unhang()
        working = {type(worker) for worker in self.living(Worker) if not worker.draining}
        if Colocated not in working or Prefill in working:
            for kind in {Prefill, Decode} - working:
                self.start(kind)
        assert self.run_until(lambda: not self.waiting(), seconds), f"not ended: {self.waiting()}"
        gateways_died = any(isinstance(process, Gateway) and not process.alive for process in self.processes.values())
        self.run_until(lambda: not self.leftovers(), 60.0 if gateways_died else 20.0)
        if len(self.queue):
            self.run_until(lambda: not self.leftovers(), 620.0)  # copies of jobs that died with their holder go with their deadline
        assert not self.leftovers(), self.leftovers()

    def waiting(self) -> list[str]:
        return [
            request_id
            for gateway in self.living(Gateway)
            for request_id, client in gateway.clients.items()
            if not client.ended and not client.cancelled
        ]

    def leftovers(self) -> list[str]:
        found = [what for worker in self.living(Worker) for what in worker.leftovers()]
        found += [f"{gateway.name} flights: {len(gateway.ledger)}" for gateway in self.living(Gateway) if len(gateway.ledger)]
        return found + ([f"queue: {len(self.queue)}"] if len(self.queue) else [])


def ask(rng: random.Random, *, prompt: int | None = None, max_tokens: int | None = None) -> Ask:
    """A small request: a prompt of a few pages, mostly cut from one of three texts, sometimes with words of its own behind it; a few tokens
    out, sometimes a stop id on the way, sometimes several answers."""
    length = prompt or rng.choice((1, 3, 4, 5, 8, 13, 20))
    text, common = rng.randrange(3), rng.choice((0, 4, 9, 20, 20))
    ids = [(11 * at * (text + 1) + text) % 40 if at < common else rng.randrange(40) for at in range(length)]
    stop_ids = [rng.randrange(40)] if rng.random() < 0.3 else []
    return Ask(
        ids, Sampling(seed=rng.randrange(1000)), max_tokens or rng.choice((1, 2, 5, 12, 24)), stop_ids, n=rng.choice((1, 1, 1, 2, 4))
    )
