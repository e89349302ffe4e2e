"""The simulated fleet: gateways, prefills, decodes, queue and wires on one clock, and what can be done to them. Seeded, so repeatable.

What must hold is asserted where it could break: clients see each index once, in order, and exactly the undisturbed tokens; one decode is
heard per attempt; pools add up after every engine step; no write lands in a page that is not in transit for its grant; every KV read is
the one that was computed for this very sequence. `settle` lets the weather calm down and asserts that nothing is left.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from common.beats import Liveness
from common.errors import RequestError
from common.messages import (
    PROTOCOL,
    GatewayBeat,
    Incarnation,
    Job,
    Letter,
    Parcel,
    Role,
    Sampling,
    Token,
    ToPeer,
    ToWorker,
    WorkerBeat,
    decode,
    encode,
)
from common.names import BEAT_S
from common.queue import Entry
from gateway.ask import Ask
from gateway.flight import Action, Bury, End, Put, Remove, Show, Tell
from gateway.ledger import Ledger
from tests.unit.recovery.carrier import Carrier
from tests.unit.recovery.fabric import Clock, Process, Streams, Weather, Wires, undisturbed
from tests.unit.recovery.workers import FINGERPRINT, FLEET, Colocated, Decode, Prefill, Worker

P = TypeVar("P", bound=Process)


@dataclass(eq=False)
class Client:
    """One who asked, and what has been seen."""

    ask: Ask
    expected: list[int]
    accepted_at: float
    seen: list[int] = field(default_factory=list)
    ended: bool = False
    error: RequestError | None = None
    cancelled: bool = False
    last_at: float = 0.0

    def take(self, tokens: list[Token], now: float) -> None:
        assert not self.ended and not self.cancelled, "a word after the last one"
        for token in tokens:
            assert token.index == len(self.seen), f"index {token.index} shown where {len(self.seen)} is due"
            assert token.id == self.expected[token.index], f"token {token.index} is not the undisturbed one"
            self.seen.append(token.id)
        self.last_at = now


class Gateway(Process):
    """gateway/desk.py without sockets."""

    def __init__(self, world: World, name: Incarnation) -> None:
        super().__init__(name)
        self.world = world
        self.ledger = Ledger(name, f"tokens of {name}")
        self.liveness = Liveness()
        self.peers: set[Incarnation] = set()
        self.clients: dict[str, Client] = {}
        self.heard: dict[tuple[str, int], set[Incarnation]] = {}
        """(request, attempt) → decodes whose tokens the client was shown."""
        self._sequence = 0
        world.clock.after(world.rng.random() * BEAT_S, lambda: self.deliver("timer", self.beat_forever))
        world.clock.after(1.0, lambda: self.deliver("judge", self.judge_forever))

    # ------------------------------------------------------------------------------------------------------------ client

    def submit(self, ask: Ask) -> str:
        request_id = f"{self.name}-{len(self.clients)}"
        expected = undisturbed(ask.prompt, ask.sampling.seed, ask.max_tokens, ask.stop_ids)
        self.clients[request_id] = Client(ask, expected, self.world.now, last_at=self.world.now)
        self.do(self.ledger.open(request_id, ask, self.world.now))
        return request_id

    def cancel(self, request_id: str) -> None:
        client = self.clients[request_id]
        if not client.ended:
            client.cancelled = True
            self.do(self.ledger.cancel(request_id))

    # ----------------------------------------------------------------------------------------------------------- workers

    def introduced(self, name: Incarnation, role: Role) -> None:
        if role != "gateway" and name not in self.peers:
            self.peers.add(name)
            self.ledger.join(name, role)
            self._beat_to(name)

    def parcel(self, parcel: Parcel) -> None:
        now = self.world.now
        for event in parcel.events:
            if isinstance(event, WorkerBeat):
                self.liveness.beat(parcel.sender, event.step, event.busy, event.longest_step_s, now)
                self.do(self.ledger.event(parcel.sender, event, now))
                continue
            flight = self.ledger._flights.get((event.key.request_id, event.key.choice))
            attempt = flight.attempt if flight is not None else 0
            actions = self.ledger.event(parcel.sender, event, now)
            if any(isinstance(action, Show | End) and action.tokens for action in actions):
                assert event.key.attempt == attempt, "an older attempt was shown"
                if isinstance(self.world.processes[parcel.sender], Decode):
                    decodes = self.heard.setdefault((event.key.request_id, attempt), set())
                    decodes.add(parcel.sender)
                    assert len(decodes) == 1, f"two decodes were heard for {event.key}"
            self.do(actions)

    def letter(self, letter: Letter) -> None:
        raise AssertionError(f"a gateway is told nothing on control but mismatches: {letter}")

    def beat_forever(self) -> None:
        self._sequence += 1
        for worker in sorted(self.peers):
            self._beat_to(worker)
        now = self.world.now
        for worker, _ in self.liveness.dead(now):
            self.liveness.forget(worker)
            self.do(self.ledger.dead(worker, now))
        self.do(self.ledger.tick(now))
        self.world.clock.after(BEAT_S, lambda: self.deliver("timer", self.beat_forever))

    def _beat_to(self, worker: Incarnation) -> None:
        seen = self.ledger.seen(worker)
        self.world.control(self, worker, GatewayBeat(self._sequence, f"tokens of {self.name}", FLEET, FINGERPRINT, PROTOCOL, seen))

    def judge_forever(self) -> None:
        entries = self.ledger.entries()
        if entries and not self.world.queue.away:
            states = {entry: self.world.queue.state(entry) for entry in entries}
            latency = self.world.wires.latency()
            judged = lambda: self.do(self.ledger.judge(states, self.world.now))  # noqa: E731
            self.world.clock.after(latency, lambda: self.deliver("redis", judged))
        self.world.clock.after(1.0, lambda: self.deliver("judge", self.judge_forever))

    # ----------------------------------------------------------------------------------------------------------- actions

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Put():
                    self._write(lambda put=action: self._put(put))
                case Remove(entry):
                    self._write(lambda entry=entry: self._remove(entry))
                case Bury(job, _):
                    self._write(lambda job=job: self.world.queue.dead_letters.append(job))
                case Tell(to, body):
                    self.world.control(self, to, body)
                case Show(request_id, _, tokens):
                    self.clients[request_id].take(tokens, self.world.now)
                case End(request_id, _, tokens, finish, error):
                    client = self.clients[request_id]
                    client.take(tokens, self.world.now)
                    client.ended, client.error = True, error
                    assert (finish is None) == (error is not None)
                    assert error is not None or client.seen == client.expected, "ended with too few tokens"

    def _write(self, what: Callable[[], None]) -> None:
        """Writers work side by side: no order among writes."""
        self.world.clock.after(self.world.wires.latency(), lambda: self.deliver("redis", what))

    def _remove(self, entry: Entry) -> None:
        """Repeated until Redis has done it: nobody else knows that this entry is to go."""
        if not self.world.queue.away:
            self.world.queue.remove(entry)
            return
        self.world.clock.after(0.5, lambda: self.deliver("redis", lambda: self._remove(entry)))

    def _put(self, put: Put) -> None:
        job, rng, weather = put.job, self.world.rng, self.world.weather
        choice, attempt = job.choices[0].choice, job.choices[0].attempt
        trouble = self.world.queue.away or rng.random() < weather.put_trouble
        if not trouble or (not self.world.queue.away and rng.random() < 0.5):
            entry = self.world.queue.put(job, put.job_class)
            self.world.jobs.append((entry, job))
            if rng.random() < weather.duplicate_put:
                self.world.queue.put(job, put.job_class)
        if trouble:
            self._write(lambda: self.do(self.ledger.put_failed(job.request_id, choice, attempt, self.world.now)))
        else:
            self._write(lambda: self.do(self.ledger.put(job.request_id, choice, attempt, entry)))


class World:
    """All of it. `start` adds processes; `run` lets time pass."""

    def __init__(self, seed: int = 0, *, max_request_tokens: int = 48) -> None:
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
    """A small request: a prompt of a few pages, a few tokens out, sometimes a stop id on the way."""
    ids = [rng.randrange(40) for _ in range(prompt or rng.choice((1, 3, 4, 5, 8, 13, 20)))]
    stop_ids = [rng.randrange(40)] if rng.random() < 0.3 else []
    return Ask(ids, Sampling(seed=rng.randrange(1000)), max_tokens or rng.choice((1, 2, 5, 12, 24)), stop_ids)
