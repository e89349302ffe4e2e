"""What every simulated worker does: services/worker/{worker,gateways}.py and services/engine/engine.py, without sockets and threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from msgspec.structs import replace

from common.beats import Liveness
from common.messages import (
    Cancel,
    Event,
    GatewayBeat,
    Key,
    Layout,
    Letter,
    Parcel,
    Resend,
    Role,
    WorkerBeat,
    decode,
    encode,
)
from common.names import BEAT_S
from common.queue import Entry
from services.engine.pages import PagePool
from services.engine.plan import Chunk, Draw, Outcome, Plan, Snapshot, StepOutput
from services.engine.policies import Limits
from services.engine.scheduler import Scheduler
from services.transfer.protocol import TransferEvent
from services.worker.outbox import Outbox
from services.worker.runs import Acknowledge, Release, Runs, Stop, Submit
from tests.unit.recovery.carrier import Carrier
from tests.unit.recovery.fabric import KV_ROOT, PAGE_TOKENS, Process, kv_next, next_token

if TYPE_CHECKING:
    from tests.unit.recovery.world import World

FLEET, FINGERPRINT = "sim", "f"
LAYOUT = Layout(1, 1, PAGE_TOKENS, 1, "float32")
BUDGET_TOKENS = 16
DRAIN_S = 5.0
SWEEP_S, ORPHAN_S = 10.0, 30.0


class Core(Protocol):
    """What the roles' cores have in common."""

    runs: Runs

    def outcome(self, outcome: Outcome, now: float) -> list[Any]: ...

    def cancel(self, key: Key, now: float) -> list[Any]: ...

    def over(self, key: Key) -> list[Any]: ...

    def drain(self, now: float) -> list[Any]: ...


class Worker(Process):
    """Engine thread, beats, gateways and outbox: services/worker/{worker,gateways}.py and services/engine/engine.py."""

    role: Role
    core: Core

    def __init__(self, world: World, name: str, pages: int, depth: int) -> None:
        super().__init__(name)
        self.world = world
        self.outbox = Outbox()
        self.pool = PagePool(pages, PAGE_TOKENS, keep_cached=world.reuse)
        limits = Limits(BUDGET_TOKENS, 8, max_batch=8, growth_pages=1)
        self.scheduler = Scheduler(
            self.pool,
            "decode_first" if self.role == "prefill" else "chunked",
            limits,
            depth=depth,
            reuse=FINGERPRINT if world.reuse else None,
        )
        self.snapshot: Snapshot = self.scheduler.snapshot()
        self.gateways = Liveness()
        self.lost: set[str] = set()
        """Gateways that have fallen silent."""
        self.addresses: set[str] = set()
        """Gateways for which a token socket is open."""
        self.draining = False
        self.drain_until = 0.0
        self.acknowledging = 0
        self.owner: dict[int, int] = {}
        """Page in transit → the grant whose receives are posted into it."""
        self.carrier = Carrier(self, world.clock, world.rng, world.weather, world.carriers, self.transferred, self.owns, pages)
        self._sequence = 0
        self._inbox: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._launches: deque[Plan] = deque()
        self._computing = False
        self.hung = False
        self._stuck: deque[Callable[[], None]] = deque()
        self.in_launch: set[Key] = set()
        self.longest_step_s = 1.0
        world.clock.after(world.rng.random() * BEAT_S, lambda: self.deliver("timer", self.beat_forever))

    # -------------------------------------------------------------------------------------------------------- the engine

    def deliver(self, channel: str, what: Callable[[], None]) -> None:
        """A launch that hangs (a device that does not answer) leaves the rest of the process alive and beating."""
        if channel == "engine" and self.hung and self._computing and self.alive:
            self._stuck.append(what)
        else:
            super().deliver(channel, what)

    def unhang(self) -> None:
        self.hung = False
        while self._stuck:
            self.deliver("engine", self._stuck.popleft())

    def post(self, command: Callable[..., None], *arguments: Any) -> None:
        self._inbox.append((command, arguments))
        self.world.clock.after(0.0001, lambda: self.deliver("engine", self._turn))

    def _turn(self) -> None:
        """Commands, then as many launches as may be in flight; outcomes before the launch that follows them."""
        while self._inbox:
            command, arguments = self._inbox.popleft()
            command(*arguments)
        while (plan := self.scheduler.next()) is not None:
            self._launches.append(plan)
            self.in_launch |= {chunk.sequence.key for chunk in plan.chunks}
            self._report()
        self._report()
        self.pool.check()
        self._check_findable()
        if self._launches and not self._computing:
            self._computing = True
            self.world.clock.after(self.world.rng.choice((0.01, 0.03, 0.1)), lambda: self.deliver("engine", self._collect))

    def _collect(self) -> None:
        plan = self._launches.popleft()
        self._computing = False
        if self.world.rng.random() < self.world.weather.launch_fail:
            self.scheduler.abort(plan, "an injected failure")
        else:
            self.scheduler.commit(plan, StepOutput(tuple(self._compute(chunk) for chunk in plan.chunks)))
        self.in_launch = {chunk.sequence.key for other in self._launches for chunk in other.chunks}
        self._turn()

    def _check_findable(self) -> None:
        """What can be found by its hash is the KV of exactly those tokens: it was computed here, or verified."""
        for page, digest in self.pool._hash_of.items():
            assert self.carrier.memory[page] == self.world.truth[digest], f"{self.name}: page {page} is shown and not what its hash says"

    def _compute(self, chunk: Chunk) -> Draw | None:
        """Write the chunk's KV behind what lies in the pages, and draw from it. Every KV read must be the right one."""
        sequence = chunk.sequence
        if self.scheduler.find(sequence.key) is not sequence:
            return Draw(0)  # it has ended meanwhile: this is void
        kv = KV_ROOT
        for position in range(chunk.start + chunk.tokens):
            page = self.carrier.memory[sequence.pages[position // PAGE_TOKENS]]
            kv = kv_next(kv, sequence.ids[position])
            if position >= chunk.start:
                assert self.pool.users(sequence.pages[position // PAGE_TOKENS]) == 1, "a page is written that others read"
                page[position % PAGE_TOKENS] = kv
            assert page[position % PAGE_TOKENS] == kv, f"{self.name}: {sequence.key} reads KV that is not its own at {position}"
        return Draw(next_token(kv, sequence.sampling.seed, sequence.key.choice)) if chunk.draws else None

    def _report(self) -> None:
        outcomes, snapshot = self.scheduler.take_outcomes(), self.scheduler.snapshot()
        if outcomes or snapshot != self.snapshot:
            self.world.clock.after(0.0001, lambda: self.deliver("loop", lambda: self._outcomes(outcomes, snapshot)))

    def _outcomes(self, outcomes: list[Outcome], snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        for outcome in outcomes:
            self.carry_out(self.core.outcome(outcome, self.world.now))
        self.flush()
        self.woken()

    # ----------------------------------------------------------------------------------------------------------- actions

    def do(self, actions: list[Any]) -> None:
        self.carry_out(actions)
        self.flush()

    def carry_out(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Submit(sequence):
                    self.post(self.scheduler.submit, sequence)
                case Stop(key):
                    self.post(self.scheduler.cancel, key)
                case Release(key):
                    self.post(self.scheduler.release, key)
                case Acknowledge(entry):
                    self._acknowledge(entry)
                case _:
                    self.perform(action)

    def perform(self, action: Any) -> None:
        raise NotImplementedError

    def woken(self) -> None:
        pass

    def transferred(self, event: TransferEvent) -> None:
        raise NotImplementedError

    def owns(self, page: int, grant: int) -> bool:
        return page in self.pool._in_transit and self.owner.get(page) == grant

    def _acknowledge(self, entry: Entry) -> None:
        """Retried until Redis is there: here simply later."""
        self.acknowledging += 1

        def done() -> None:
            if self.world.queue.away:
                self.world.clock.after(0.5, lambda: self.deliver("redis", done))
                return
            self.world.queue.remove(entry)
            self.acknowledging -= 1

        self.world.clock.after(self.world.wires.latency(), lambda: self.deliver("redis", done))

    # ---------------------------------------------------------------------------------------------------------- gateways

    def meet(self, gateway: str) -> None:
        if gateway not in self.gateways.alive:
            self.gateways.heard(gateway, self.world.now)
            self.addresses.add(gateway)

    def flush(self) -> None:
        for gateway, events in self.outbox.take().items():
            self.publish(gateway, list(events))

    def publish(self, gateway: str, events: list[Event]) -> None:
        target = self.world.processes.get(gateway)
        if gateway not in self.addresses or target is None:
            return
        data = encode(Parcel(self.name, gateway, events))
        self.world.wires.send("tokens", self, target, decode(data, Parcel), lambda: target.parcel(decode(data, Parcel)))

    def letter(self, letter: Letter) -> None:
        if letter.to != self.name:
            return
        match letter.body:
            case GatewayBeat() as beat:
                self.lost.discard(letter.sender)
                self.meet(letter.sender)
                self.gateways.heard(letter.sender, self.world.now)
                for key in self.outbox.seen(beat.seen):
                    self.do(self.core.over(key))
                self.do([*self.runs.acknowledged()])
            case Cancel(key):
                for own in self.outbox.meant_by(key) or [key]:
                    self.outbox.forget(own)
                    self.do(self.core.cancel(own, self.world.now))
            case Resend(key, index):
                self.outbox.resend(letter.sender, key, index)
                self.flush()
            case _:
                self.peer_letter(letter)

    def peer_letter(self, letter: Letter) -> None:
        raise NotImplementedError

    def facts(self) -> WorkerBeat:
        pool = self.snapshot.pool
        return WorkerBeat(
            self.role, self._sequence, self.snapshot.step, self.snapshot.in_flight > 0, self.longest_step_s,
            pool.free + pool.cached, pool.total, self.snapshot.running + self.snapshot.parked,
            self.snapshot.waiting + self.snapshot.inbound, self.draining,
        )  # fmt: skip

    def beat(self) -> None:
        self._sequence += 1
        for gateway in sorted(self.gateways.alive):
            self.publish(gateway, [replace(self.facts(), holding=self.outbox.holding(gateway))])

    def beat_forever(self) -> None:
        self.beat()
        for gateway, _ in self.gateways.dead(self.world.now):
            self.gateways.forget(gateway)
            self.lost.add(gateway)
            self.addresses.discard(gateway)
            for key in self.outbox.of(gateway):
                self.outbox.forget(key)
                self.do(self.core.cancel(key, self.world.now))
        self.do(self.tick(self.world.now))
        if self.draining and ((not len(self.outbox) and not self.acknowledging) or self.world.now > self.drain_until):
            self.world.ended(self)
            return
        self.world.clock.after(BEAT_S, lambda: self.deliver("timer", self.beat_forever))

    def tick(self, now: float) -> list[Any]:
        raise NotImplementedError

    def drain(self) -> None:
        self.draining, self.drain_until = True, self.world.now + DRAIN_S
        self.do(self.core.drain(self.world.now))
        self.beat()

    def send(self, to: str, body: Any) -> None:
        self.world.control(self, to, body)

    @property
    def runs(self) -> Runs:
        return self.core.runs

    def leftovers(self) -> list[str]:
        """What must be gone when nothing runs."""
        counts = self.pool.counts
        found = {
            "pages": counts.total - counts.free - counts.cached,
            "outbox": len(self.outbox),
            "runs": len(self.runs),
            "scheduler": len(self.scheduler.keys()) + self.snapshot.inbound,
            "transfer": 0 if self.carrier.quiet else 1,
        }
        return [f"{self.name} {what}: {count}" for what, count in found.items() if count]
