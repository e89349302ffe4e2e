"""A worker's life around its engine: gateways, beats, the fleet, draining. The roles add what is theirs by overriding the hooks.

Two threads matter here: the engine's, which computes, and this one's event loop, which decides and talks. Outcomes cross by
`call_soon_threadsafe`, commands by the engine's inbox; nothing else is shared.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, TypeVar

from redis.asyncio import Redis

from common.beats import Liveness
from common.control import ControlServer
from common.errors import EngineError, QueueError, StartError, TransferError
from common.faults import parse
from common.fleet import Fleet
from common.logs import get_logger
from common.messages import Identity, Incarnation, Introduction, Key, Letter, Role, WorkerBeat
from common.names import BEAT_S
from common.queue import Entry, JobQueue
from common.seal import read_seal
from common.service import Service, end
from common.settings import WorkerSettings
from services.engine.engine import Engine
from services.engine.plan import Outcome, Snapshot
from services.worker.deaths import Death
from services.worker.figures import Figures
from services.worker.gateways import Gateways
from services.worker.orders import Heard
from services.worker.room import Room
from services.worker.runs import Acknowledge, Release, Runs, Stop, Submit
from services.worker.runs import Action as RunAction

log = get_logger(__name__)

A = TypeVar("A")


class Worker(ABC, Generic[A]):
    """Base of the three roles; `A` is the role's action type, carried out by `perform`."""

    role: ClassVar[Role]

    def __init__(self, room: Room, settings: WorkerSettings, service: Service, redis: Redis, identity: Identity) -> None:
        self.room = room
        self.settings = settings
        self.service = service
        self.incarnation: Incarnation = service.incarnation
        self.fleet = Fleet(redis, settings.fleet)
        self.identity = identity
        self.queue = JobQueue(redis, settings.fleet, identity.fingerprint)
        self.fault = parse(settings.message_fault)
        self.seal = read_seal(settings.fleet_secret_file)
        self.server = ControlServer(self.incarnation, settings.host, self._letter, self.seal, self.fault)
        self.gateways = Gateways(
            self.incarnation,
            settings.fleet,
            identity.fingerprint,
            self.server,
            on_cancel=self._cancelled,
            on_over=self._over,
            on_seen=self._seen,
            seal=self.seal,
            fault=self.fault,
        )
        self.death = Death(settings.die)
        runner = self.death.around(room.runner)
        self.engine = Engine(room.scheduler, runner, self._deliver, name=self.role, on_death=self._engine_died)
        self.snapshot: Snapshot = self.engine.snapshot
        self._loop = asyncio.get_running_loop()
        self._acknowledged: asyncio.Queue[Entry] = asyncio.Queue()
        self._sequence = 0
        self._draining = False
        self._pulse = Liveness()
        """Our own, as the others see it."""
        self._settled = asyncio.Event()
        """Set while nothing is left to be acknowledged, by a gateway or to Redis."""

    # ------------------------------------------------------------------------------------------------- the role's part

    @property
    @abstractmethod
    def runs(self) -> Runs: ...

    @abstractmethod
    def outcome(self, outcome: Outcome, now: float) -> list[A]: ...

    @abstractmethod
    def cancel(self, key: Key, now: float) -> list[A]: ...

    @abstractmethod
    def over(self, key: Key) -> list[A]: ...

    @abstractmethod
    def drain(self, now: float) -> list[A]: ...

    @abstractmethod
    def perform(self, action: A) -> None:
        """Carry out an action of the role's own; the common ones are done here."""

    def letter(self, letter: Letter) -> None:
        """A letter that no gateway sent."""
        log.warning("a letter for another role", sender=letter.sender, kind=type(letter.body).__name__)

    def introduced(self, members: dict[Incarnation, Introduction], identity: Identity | None) -> bool:
        """The fleet's members have changed; False if some could not be met."""
        return True

    def tick(self, now: float) -> list[A]:
        """Every BEAT_S: peers that died, deadlines, repeats."""
        return []

    def woken(self) -> None:
        """The engine has taken a step, or an execution is over: there may be room."""

    def own_tasks(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Start what the role runs besides, until it drains."""
        return []

    def rank_heard(self, rank: int, word: Heard) -> None:
        """The transfer of another rank has said something."""

    def own_figures(self) -> dict[str, float]:
        """Further figures of this role."""
        return {}

    def own_words(self) -> dict[str, str]:
        """What this role exports in words."""
        return {}

    def close(self) -> None:
        """Release what the role holds."""

    # --------------------------------------------------------------------------------------------------------- running

    async def run(self) -> None:
        """Serve until the service stops, drain, and leave nothing behind."""
        self.engine.start()
        figures = Figures(self.settings.host, self.settings.metrics_port, self._figures, self._words)
        try:
            await self.room.ranks.connect()
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(self.room.ranks.watch(self.rank_heard), name="ranks"),
                    tasks.create_task(self.fleet.keep(self._introduction(), self.identity, self.introduced), name="fleet"),
                    tasks.create_task(self._beat_forever(), name="beats"),
                    tasks.create_task(self._acknowledge_forever(), name="acknowledge"),
                ]
                listening = tasks.create_task(self._listen_for_a_role(), name="role")
                own = self.own_tasks(tasks)
                self.service.ready(control=self.server.address, metrics_port=figures.port, ranks=self.room.ranks.pids)
                await self.service.stopping.wait()
                await end(listening, *own)
                await self._drain()
                await end(*background)
        finally:
            figures.close()
            self._end()

    def _end(self) -> None:
        """Of what computes and talks. What does not end in time ends with the process: the next role's engine must not share its pages."""
        overdue = [] if self.engine.stop(self.settings.drain_s) else [f"the engine's thread has not ended in {self.settings.drain_s:g} s"]
        self.gateways.close()
        self.server.close()
        try:
            self.close()
        except TransferError as error:
            overdue.append(str(error))
        self.room.ranks.close()
        if overdue:
            log.error("a thread does not end", reason="; ".join(overdue))
            if self.service.becoming is not None:
                self.service.fail(StartError(f"cannot become {self.service.becoming}: {'; '.join(overdue)}"))

    async def _drain(self) -> None:
        """Hand everything back (rule 12) and wait until the gateways have acknowledged it, or the grace ends."""
        self._draining = True
        self._blame()
        self.do(self.drain(time.monotonic()))
        self._beat()
        self._settle()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), self.settings.drain_s)
        try:
            await self.fleet.leave(self.incarnation)
        except QueueError as error:
            log.warning("left without a word to Redis", error=error)

    def _blame(self) -> None:
        """If the engine's thread has died: of what it was computing, and that counts against it (rule 11)."""
        if self.engine.error is not None:
            for key in self.engine.launching:
                self.do(self.runs.lose(key, "failed", f"{type(self.engine.error).__name__}: {self.engine.error}"))

    def do(self, actions: Sequence[A | RunAction]) -> None:
        """Carry out, then publish what has been said meanwhile."""
        self._carry_out(actions)
        self.gateways.flush()

    def _carry_out(self, actions: Sequence[A | RunAction]) -> None:
        for action in actions:
            match action:
                case Submit(sequence):
                    self.engine.post(self.room.scheduler.submit, sequence)
                case Stop(key):
                    self.engine.post(self.room.scheduler.cancel, key)
                case Release(key):
                    self.engine.post(self.room.scheduler.release, key)
                case Acknowledge(entry):
                    self._acknowledged.put_nowait(entry)
                case _:
                    self.perform(action)

    # ----------------------------------------------------------------------------------------------------- engine's words

    def _deliver(self, outcomes: list[Outcome], snapshot: Snapshot) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._outcomes, outcomes, snapshot)

    def _outcomes(self, outcomes: list[Outcome], snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        now = time.monotonic()
        for outcome in outcomes:
            self._carry_out(self.outcome(outcome, now))
        self.gateways.flush()
        self.woken()

    def _engine_died(self, error: BaseException) -> None:
        """On the engine's thread: a worker without an engine ends, and its requests go on elsewhere."""
        self._loop.call_soon_threadsafe(self.service.fail, error)

    # ---------------------------------------------------------------------------------------------------- gateways' words

    def _letter(self, letter: Letter) -> None:
        if not self.gateways.letter(letter):
            self.letter(letter)

    def _cancelled(self, key: Key) -> None:
        self.do(self.cancel(key, time.monotonic()))
        self._settle()
        self.woken()

    def _over(self, key: Key) -> None:
        self.do(self.over(key))
        self._settle()
        self.woken()

    def _seen(self, launched: Sequence[Key]) -> None:
        self.do(self.runs.acknowledged())
        self.engine.confirm(launched)

    def _settle(self) -> None:
        if len(self.gateways.outbox) or not self._acknowledged.empty():
            self._settled.clear()
        else:
            self._settled.set()

    # -------------------------------------------------------------------------------------------------------- by itself

    def _introduction(self) -> Introduction:
        return Introduction(
            self.role,
            self.incarnation,
            self.server.address,
            self.identity.fingerprint,
            self.room.layout,
            list(self.room.shards),
            self.snapshot.pool.total,
        )

    def facts(self) -> WorkerBeat:
        """Our beat, without anybody's holdings."""
        pool, pace = self.snapshot.pool, self.engine.pace
        return WorkerBeat(
            role=self.role,
            sequence=self._sequence,
            step=self.snapshot.step,
            busy=self.snapshot.in_flight > 0,
            longest_step_s=self.room.longest_step_s,
            free_pages=pool.free + pool.cached,
            total_pages=pool.total,
            running=self.snapshot.running + self.snapshot.parked,
            waiting=self.snapshot.waiting + self.snapshot.inbound,
            draining=self._draining,
            prefill_rate=pace.prefill_rate or self.room.prefill_rate,
            backlog_tokens=max(0, self.snapshot.unplanned_tokens - self.runs.unbegun_tokens),
            step_s=pace.step_s,
            each_s=pace.each_s,
        )

    def _figures(self) -> dict[str, float]:
        """By name; read from the metrics thread, so nothing here may change anything."""
        snapshot = self.snapshot
        pool = snapshot.pool
        return {
            "pages_total": pool.total,
            "pages_free": pool.free,
            "pages_cached": pool.cached,
            "pages_held": pool.held,
            "pages_in_transit": pool.in_transit,
            "steps_total": snapshot.step,
            "prefix_tokens_looked_up_total": snapshot.looked_up,
            "prefix_tokens_reused_total": snapshot.reused,
            "waiting": snapshot.waiting,
            "running": snapshot.running,
            "parked": snapshot.parked,
            "inbound": snapshot.inbound,
            "executions": len(self.gateways.outbox),
            "refused_messages_total": self.server.refusals.total,
            "pool_bytes": self.room.memory.pool_bytes,
            "memory_free_at_start_bytes": self.room.memory.free_bytes,
            "memory_promised_at_start_bytes": self.room.memory.promised_bytes,
            "memory_reserve_bytes": self.room.memory.reserve_bytes,
            **self.own_figures(),
        }

    def _words(self) -> dict[str, str]:
        """The role as well: it may change, and then Prometheus must not go by the container's name."""
        return {"role": self.role, **self.own_words()}

    def _beat(self) -> None:
        self._sequence += 1
        self.gateways.beat(self.facts())

    def _watch_engine(self, now: float) -> None:
        """A launch that does not return: the others take this worker for dead by now (rule 3), and only a new process can compute again."""
        own = self.snapshot
        self._pulse.beat(self.incarnation, own.step, own.in_flight > 0, self.room.longest_step_s, now)
        for _, reason in self._pulse.dead(now):
            self.room.ranks.lost(EngineError(f"the engine hangs: {reason}"))

    async def _beat_forever(self) -> None:
        while True:
            self._watch_engine(time.monotonic())  # first: a beat would take the suspicion of what it hangs on back
            self._beat()
            self.gateways.reap()
            self.do(self.tick(time.monotonic()))
            await asyncio.sleep(BEAT_S)

    async def _listen_for_a_role(self) -> None:
        """An operator may want this worker in another role (`python -m services.worker.role`)."""
        while True:
            await asyncio.sleep(BEAT_S)
            with contextlib.suppress(QueueError):
                role = await self.fleet.wished(self.incarnation)
                if role is None or role == self.role:
                    continue
                if len(self.room.shards) > 1:
                    log.warning("a worker of several ranks keeps its role: start another one", wanted=role)
                    return
                self.service.become(role)

    async def _acknowledge_forever(self) -> None:
        while True:
            entry = await self._acknowledged.get()
            try:
                await self.queue.remove(entry)
            except QueueError as error:
                log.warning("a job could not be acknowledged: its gateway will", error=error)
            self._settle()
