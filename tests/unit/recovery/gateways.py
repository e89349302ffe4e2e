"""Simulated gateways and their clients: what gateway/desk.py must do with each action of the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.beats import Liveness
from common.errors import RequestError
from common.messages import (
    PROTOCOL,
    GatewayBeat,
    Incarnation,
    Letter,
    Parcel,
    Role,
    Token,
    WorkerBeat,
)
from common.names import BEAT_S
from common.queue import Entry
from gateway.ask import Ask
from gateway.flight import Action, Bury, Confirm, End, Put, Remove, Show, Tell
from gateway.ledger import Ledger
from tests.unit.recovery.decodes import Decode
from tests.unit.recovery.fabric import Process, undisturbed
from tests.unit.recovery.worker import FINGERPRINT, FLEET

if TYPE_CHECKING:
    from tests.unit.recovery.world import World


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
        """By the request's name; further choices as `name/choice`."""
        self.heard: dict[tuple[str, int, int], set[Incarnation]] = {}
        """(request, choice, attempt) → decodes whose tokens the client was shown."""
        self._sequence = 0
        world.clock.after(world.rng.random() * BEAT_S, lambda: self.deliver("timer", self.beat_forever))
        world.clock.after(1.0, lambda: self.deliver("judge", self.judge_forever))

    # ------------------------------------------------------------------------------------------------------------ client

    def submit(self, ask: Ask) -> str:
        request_id = f"{self.name}-{len(self.clients)}"
        for choice in range(ask.n):
            expected = undisturbed(ask.prompt, ask.sampling.seed, ask.max_tokens, ask.stop_ids, choice)
            self.world.learn([*ask.prompt, *expected])
            self.clients[client_name(request_id, choice)] = Client(ask, expected, self.world.now, last_at=self.world.now)
        self.do(self.ledger.open(request_id, ask, self.world.now))
        return request_id

    def cancel(self, name: str) -> None:
        """One choice; the others go on."""
        client = self.clients[name]
        request_id, _, choice = name.partition("/")
        if not client.ended:
            client.cancelled = True
            self.do(self.ledger.cancel(request_id, int(choice or 0), self.world.now))

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
                    decodes = self.heard.setdefault((event.key.request_id, event.key.choice, attempt), set())
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
        seen, launched = self.ledger.seen(worker), self.ledger.launched(worker)
        beat = GatewayBeat(self._sequence, f"tokens of {self.name}", FLEET, FINGERPRINT, PROTOCOL, seen, launched=launched)
        self.world.control(self, worker, beat)

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
                case Confirm(to):
                    self._beat_to(to)
                case Show(request_id, choice, tokens):
                    self.clients[client_name(request_id, choice)].take(tokens, self.world.now)
                case End(request_id, choice, tokens, finish, error):
                    client = self.clients[client_name(request_id, choice)]
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


def client_name(request_id: str, choice: int) -> str:
    return f"{request_id}/{choice}" if choice else request_id
