"""The desk: carries out what the ledger decides. Sockets, Redis and clocks are here, decisions are not."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable

from redis.asyncio import Redis

from common.beats import Liveness
from common.control import ControlClient
from common.errors import BadRequest, Overloaded, QueueError, Unavailable
from common.faults import NONE, MessageFault
from common.fleet import Fleet
from common.logs import get_logger
from common.messages import PROTOCOL, GatewayBeat, Identity, Incarnation, Introduction, Job, Letter, Mismatch, Parcel, WorkerBeat
from common.names import BEAT_S
from common.queue import Entry, JobQueue
from common.refusals import Refusals
from common.seal import Seal
from common.tokens import TokenSubscriber
from gateway.ask import Ask, Timeline, Update
from gateway.flight import Action, Bury, End, Put, Remove, Show, Tell
from gateway.forecast import MOST_WAIT_S, Bounds, Forecast
from gateway.ledger import AGAIN_S, FlightId, Ledger

log = get_logger(__name__)

JUDGE_S = 1.0
WRITERS = 4
"""Queue operations under way at once: one that waits for a slow Redis must not hold up all others."""


class LiveAnswer:
    """A running answer: the ledger's words wait here until the client's side takes them (at most `max_tokens` of them)."""

    def __init__(self, desk: LiveDesk, flight: FlightId, ask: Ask, timeline: Timeline) -> None:
        self._flight = flight
        self.tokens = len(ask.prompt)
        """Whose KV the fleet holds for it, once it has begun."""
        self.timeline = timeline
        self._desk = desk
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._over = False

    async def __aiter__(self) -> AsyncIterator[Update]:
        try:
            while not self._over:
                update = await self._updates.get()
                self._over = update.finish is not None or update.error is not None
                yield update
        finally:
            self.cancel()

    def cancel(self) -> None:
        self._over = True
        self._desk.cancel(self._flight)

    def put(self, update: Update) -> None:
        self.tokens += len(update.tokens)
        self._updates.put_nowait(update)


class LiveDesk:
    """The gateway's Desk over a real fleet. `start` sets it going."""

    def __init__(
        self,
        incarnation: Incarnation,
        redis: Redis,
        fleet: str,
        host: str,
        tokenizer: str,
        *,
        max_running: int,
        max_queued: int,
        bounds: Bounds,
        seal: Seal | None = None,
        fault: MessageFault = NONE,
        on_reenqueued: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """`on_reenqueued`: seconds from the last word of a lost worker to the new attempt in the queue."""
        self._incarnation = incarnation
        self._redis = redis
        self._fleet_name = fleet
        self._fleet = Fleet(redis, fleet)
        self._tokenizer = tokenizer
        self._max_running, self._max_queued = max_running, max_queued
        self._on_reenqueued = on_reenqueued
        self._forecast = Forecast(bounds)
        self._refusals = Refusals(log, "a worker's word")
        self._subscriber = TokenSubscriber(incarnation, host, self._parcel, seal)
        self._control = ControlClient(incarnation, self._letter, seal, fault)
        self._ledger = Ledger(incarnation, self._subscriber.address)
        self._liveness = Liveness()
        self._beats: dict[Incarnation, WorkerBeat] = {}
        self._answers: dict[FlightId, LiveAnswer] = {}
        self._alone: set[str] = set()
        """Requests for which we hold the fleet's right to run alone."""
        self._idle = asyncio.Event()
        """Set whenever the last running answer has ended."""
        self._queue: JobQueue | None = None
        self._writes: asyncio.Queue[Put | Remove | Bury] = asyncio.Queue()
        self._draining = False
        self._undone: list[Put | Remove | Bury] = []
        """What Redis did not take; tried again once a second."""
        self._identity: Identity | None = None
        self._sequence = 0
        self._waiting_tokens: list[int] = []
        """By class, as of the last beat."""

    # ----------------------------------------------------------------------------------------------- what HTTP may ask

    @property
    def identity(self) -> Identity | None:
        return self._identity

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def recoveries(self) -> int:
        """Attempts started anew since the start."""
        return self._ledger.recoveries

    @property
    def running(self) -> int:
        """Answers accepted and not ended."""
        return len(self._ledger)

    @property
    def queued(self) -> int:
        return self._ledger.queued

    @property
    def refused(self) -> int:
        """Messages of the fleet's sockets that were not taken."""
        return self._refusals.total + self._subscriber.refusals.total + self._control.refusals.total

    @property
    def workers(self) -> dict[Incarnation, WorkerBeat]:
        """The latest beat of every live worker."""
        return {name: beat for name, beat in self._beats.items() if name in self._liveness.alive}

    def roles(self) -> dict[str, int]:
        count: dict[str, int] = {}
        for beat in self.workers.values():
            if not beat.draining:
                count[beat.role] = count.get(beat.role, 0) + 1
        return count

    def submit(self, ask: Ask) -> list[LiveAnswer]:
        self._admit(ask)
        request_id = secrets.token_hex(12)
        actions = self._ledger.open(request_id, ask, time.monotonic())
        flights = [(request_id, choice) for choice in range(ask.n)]
        answers = [LiveAnswer(self, flight, ask, self._ledger.timeline(*flight)) for flight in flights]
        self._answers.update(zip(flights, answers, strict=True))
        self._idle.clear()
        self._do(actions)
        return answers

    def cancel(self, flight: FlightId) -> None:
        if self._take(flight) is not None:
            self._do(self._ledger.cancel(*flight, time.monotonic()))

    def _take(self, flight: FlightId) -> LiveAnswer | None:
        answer = self._answers.pop(flight, None)
        if answer is not None and answer.timeline.ttft_s and self._identity is not None:
            self._forecast.ended(-(-answer.tokens // self._identity.page_tokens), time.monotonic())
        if not self._answers:
            self._idle.set()
        return answer

    def _admit(self, ask: Ask) -> None:
        if self._draining:
            raise Unavailable("the gateway is shutting down: ask another one", retry_after_s=AGAIN_S)
        if self._fleet.away:
            raise Unavailable("the job queue cannot be reached: try again later", retry_after_s=AGAIN_S)
        identity = self._identity
        roles = self.roles()
        if identity is None or self._queue is None:
            raise Unavailable("no worker has joined the fleet yet: start a prefill and a decode", retry_after_s=AGAIN_S)
        if not roles.get("colocated"):
            missing = [role for role in ("prefill", "decode") if not roles.get(role)]
            if missing:
                raise Unavailable(f"no live {' and no live '.join(missing)} worker", retry_after_s=AGAIN_S)
        tokens = len(ask.prompt) + ask.max_tokens
        limit = identity.max_request_pages * identity.page_tokens
        if tokens > limit:
            raise BadRequest(f"prompt and max_tokens are {tokens} tokens, this fleet serves {limit} a request", param="max_tokens")
        now, load, workers = time.monotonic(), self._ledger.load(), self.workers.values()
        if len(self._ledger) + ask.n > self._max_running or self._ledger.queued >= self._max_queued:
            wait_s, _ = self._forecast.ttft_s(ask.job_class, 0, load, workers)
            raise Overloaded("too many requests are waiting", retry_after_s=min(MOST_WAIT_S, wait_s))
        self._forecast.check(ask, load, workers, now, identity.page_tokens)

    # ------------------------------------------------------------------------------------------------------- its tasks

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Everything the desk does by itself, until it is cancelled."""
        introduction = Introduction("gateway", self._incarnation, "", "")
        return [
            tasks.create_task(self._fleet.keep(introduction, None, self._introduced), name="fleet"),
            tasks.create_task(self._beat_forever(), name="beats"),
            tasks.create_task(self._judge_forever(), name="judge"),
            *(tasks.create_task(self._write_forever(), name=f"writer {number}") for number in range(WRITERS)),
        ]

    async def drain(self, grace_s: float) -> None:
        """Take nothing new and let running answers finish, at most `grace_s` long; what is left then ends with an error."""
        self._draining = True
        if self._answers:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)
        for flight, answer in reversed(list(self._answers.items())):
            answer.put(Update([], error=Unavailable("the gateway is shutting down")))
            self.cancel(flight)
        try:
            await self._fleet.leave(self._incarnation)
        except QueueError as error:
            log.warning("left without a word to Redis", error=error)

    def close(self) -> None:
        self._subscriber.close()
        self._control.close()

    def _parcel(self, parcel: Parcel) -> None:
        now = time.monotonic()
        if parcel.sender not in self._control.peers:  # nobody has introduced it: what it says now its beats say again
            self._refusals.note("stranger")
            return
        for event in parcel.events:
            if isinstance(event, WorkerBeat):
                self._liveness.heard(parcel.sender, now)
                self._liveness.beat(parcel.sender, event.step, event.busy, event.longest_step_s, now)
                self._beats[parcel.sender] = event
            self._do(self._ledger.event(parcel.sender, event, now))

    def _letter(self, letter: Letter) -> None:
        if isinstance(letter.body, Mismatch):
            log.error("a worker refuses this gateway", worker=letter.sender, reason=letter.body.reason)

    def _introduced(self, members: dict[Incarnation, Introduction], identity: Identity | None) -> None:
        """Redis names whom to knock at. Workers that have vanished from it are disconnected once they are also silent."""
        self._identify(identity)
        for name, member in members.items():
            if member.role == "gateway" or name in self._control.peers:
                continue
            if not self._fits(member):
                self._refusals.note("mismatch", worker=name)
                continue
            self._control.connect(name, member.control_address)
            self._ledger.join(name, member.role)
            self._beat_to(name)
        for name in set(self._control.peers) - set(members):
            if name not in self._liveness.alive:
                self._control.disconnect(name)

    def _fits(self, member: Introduction) -> bool:
        same = self._identity is None or member.fingerprint == self._identity.fingerprint
        return same and member.protocol == PROTOCOL

    def _identify(self, identity: Identity | None) -> None:
        if identity is None or identity == self._identity:
            return
        if identity.tokenizer != self._tokenizer:
            log.error("the fleet serves a model with another tokenizer than this gateway's", fleet=self._fleet_name, model=identity.model)
            return
        self._identity = identity
        self._queue = JobQueue(self._redis, self._fleet_name, identity.fingerprint)

    async def _beat_forever(self) -> None:
        while True:
            self._sequence += 1
            self._waiting_tokens = list(self._ledger.load().waiting_tokens.values())
            for worker in tuple(self._control.peers):
                self._beat_to(worker)
            now = time.monotonic()
            for worker, reason in self._liveness.dead(now):
                log.warning("worker lost", worker=worker, reason=reason)
                self._liveness.forget(worker)
                self._beats.pop(worker, None)
                self._do(self._ledger.dead(worker, now))
            self._do(self._ledger.tick(now))
            await asyncio.sleep(BEAT_S)

    def _beat_to(self, worker: Incarnation) -> None:
        if self._identity is None:
            return
        seen, fingerprint = self._ledger.seen(worker), self._identity.fingerprint
        beat = GatewayBeat(self._sequence, self._subscriber.address, self._fleet_name, fingerprint, PROTOCOL, seen, self._waiting_tokens)
        self._control.send(worker, beat)

    async def _judge_forever(self) -> None:
        """Once a second: what has become of our entries, and whether our requests that run alone still do."""
        while True:
            await asyncio.sleep(JUDGE_S)
            undone, self._undone = self._undone, []
            for action in undone:
                self._writes.put_nowait(action)
            if self._queue is None:
                continue
            try:
                await self._keep_alone(self._queue)
                entries = self._ledger.entries()
                states = await self._queue.states(entries) if entries else {}
            except QueueError as error:
                log.warning("cannot look at the queue", error=error)
                continue
            self._do(self._ledger.judge(states, time.monotonic()))

    async def _keep_alone(self, queue: JobQueue) -> None:
        """Renew the right to run alone while it is used, and give it back afterwards."""
        using = self._ledger.alone()
        for request_id in self._alone - using:
            await queue.unlock_alone(request_id)
        self._alone &= using
        for request_id in using & self._alone:
            await queue.lock_alone(request_id)

    # ------------------------------------------------------------------------------------------------------ its actions

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Put() | Remove() | Bury():
                    self._writes.put_nowait(action)
                case Tell(to, body):
                    self._control.send(to, body)
                case Show(request_id, choice, tokens):
                    if (answer := self._answers.get((request_id, choice))) is not None:
                        answer.put(Update(tokens))
                case End(request_id, choice, tokens, finish, error):
                    if (answer := self._take((request_id, choice))) is not None:
                        answer.put(Update(tokens, finish, error))

    async def _write_forever(self) -> None:
        while True:
            action = await self._writes.get()
            if not await self._written(action):
                self._undone.append(action)

    async def _written(self, action: Put | Remove | Bury) -> bool:
        """False if it has to be done again: a put is repeated by the ledger, everything else until Redis is back."""
        assert self._queue is not None
        try:
            match action:
                case Put(job, job_class, silent_since):
                    await self._put(job, job_class, silent_since)
                case Remove(entry):
                    await self._queue.remove(entry)
                case Bury(job, reason):
                    await self._queue.bury(job, reason)
        except QueueError as error:
            log.warning("the queue refuses", action=type(action).__name__, error=error)
            return False
        return True

    async def _put(self, job: Job, job_class: str, silent_since: float | None) -> None:
        """One XADD; the ledger hears how it went. A suspicious request waits until no other one runs alone in the fleet."""
        assert self._queue is not None
        choice = job.choices[0]
        try:
            if job.alone and not await self._queue.lock_alone(job.request_id):
                raise QueueError("another request runs alone")
            if job.alone:
                self._alone.add(job.request_id)
            entry = await self._put_twice(job, job_class)
        except QueueError as error:
            log.warning("a job was not put", request=job.request_id, attempt=choice.attempt, error=error)
            self._do(self._ledger.put_failed(job.request_id, choice.choice, choice.attempt, time.monotonic()))
        else:
            if silent_since is not None:
                self._on_reenqueued(time.monotonic() - silent_since)
            self._do(self._ledger.put(job.request_id, choice.choice, choice.attempt, entry))

    async def _put_twice(self, job: Job, job_class: str) -> Entry:
        """A connection that died with an earlier Redis fails once. Should the job stand there twice, the first execution wins (rule 1)."""
        assert self._queue is not None
        try:
            return await self._queue.put(job, job_class)
        except QueueError:
            if self._fleet.away:
                raise
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            return await self._queue.put(job, job_class)
