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
from common.queue import Entry
from common.refusals import Refusals
from common.seal import Seal
from common.tokens import TokenSubscriber
from gateway.ask import Ask, Timeline, Update
from gateway.flight import Action, Bury, Confirm, End, Put, Remove, Show, Tell
from gateway.forecast import MOST_WAIT_S, Bounds, Forecast
from gateway.ledger import AGAIN_S, FlightId, Ledger
from gateway.writer import QueueWriter

log = get_logger(__name__)

JUDGE_S = 1.0


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
        self._fleet_name = fleet
        self._fleet = Fleet(redis, fleet)
        self._tokenizer = tokenizer
        self._max_running, self._max_queued = max_running, max_queued
        self._forecast = Forecast(bounds)
        self._refusals = Refusals(log, "a worker's word")
        self._subscriber = TokenSubscriber(incarnation, host, self._parcel, seal)
        self._control = ControlClient(incarnation, self._letter, seal, fault)
        self._ledger = Ledger(incarnation, self._subscriber.address)
        self._liveness = Liveness()
        self._beats: dict[Incarnation, WorkerBeat] = {}
        self._members: set[Incarnation] = set()
        """Whom Redis names at present."""
        self._answers: dict[FlightId, LiveAnswer] = {}
        self._idle = asyncio.Event()
        """Set whenever the last running answer has ended."""
        self._writer = QueueWriter(redis, self._fleet, self._put_done, on_reenqueued)
        self._draining = False
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
    def away(self) -> bool:
        return self._fleet.away

    @property
    def most_running(self) -> int:
        return self._max_running

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
        if self.away:
            raise Unavailable("the job queue cannot be reached: try again later", retry_after_s=AGAIN_S)
        identity = self._identity
        roles = self.roles()
        if identity is None:
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
            full = "too many requests are running or waiting at this gateway: try again after Retry-After seconds"
            raise Overloaded(full, retry_after_s=min(MOST_WAIT_S, wait_s))
        self._forecast.check(ask, load, workers, now, identity.page_tokens)

    # ------------------------------------------------------------------------------------------------------- its tasks

    def start(self, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Everything the desk does by itself, until it is cancelled."""
        introduction = Introduction("gateway", self._incarnation, "", "")
        return [
            tasks.create_task(self._fleet.keep(introduction, None, self._introduced), name="fleet"),
            tasks.create_task(self._beat_forever(), name="beats"),
            tasks.create_task(self._judge_forever(), name="judge"),
            *self._writer.start(tasks),
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

    def _introduced(self, members: dict[Incarnation, Introduction], identity: Identity | None) -> bool:
        """Redis names whom to knock at. Workers that have vanished from it are disconnected once they are also silent. False if some cannot
        be knocked at now."""
        self._identify(identity)
        all_met = True
        for name, member in members.items():
            if member.role == "gateway" or name in self._control.peers:
                continue
            if not self._fits(member):
                if name not in self._members:  # once: it is named again as long as it lives
                    self._refusals.note("mismatch", worker=name)
                continue
            if not self._control.connect(name, member.control_address):
                all_met = False
                continue
            self._ledger.join(name, member.role)
            self._beat_to(name)
        self._members = set(members)
        for name in self._control.peers - self._members:
            self._part(name)
        return all_met

    def _part(self, worker: Incarnation) -> None:
        """Redis does not name it any more: if it is silent too, nobody is there."""
        if worker not in self._liveness.alive:
            self._control.disconnect(worker)
            self._ledger.part(worker)

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
        self._writer.open(self._fleet_name, identity.fingerprint)

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
                if worker not in self._members:
                    self._part(worker)
            self._do(self._ledger.tick(now))
            await asyncio.sleep(BEAT_S)

    def _beat_to(self, worker: Incarnation) -> None:
        if self._identity is None:
            return
        beat = GatewayBeat(
            self._sequence,
            self._subscriber.address,
            self._fleet_name,
            self._identity.fingerprint,
            seen=self._ledger.seen(worker),
            waiting_tokens=self._waiting_tokens,
            launched=self._ledger.launched(worker),
        )
        self._control.send(worker, beat)

    async def _judge_forever(self) -> None:
        """Once a second: what has become of our entries, and whether our requests that run alone still do."""
        while True:
            await asyncio.sleep(JUDGE_S)
            try:
                await self._writer.tidy(self._ledger.alone())
                states = await self._writer.states(self._ledger.entries())
            except QueueError as error:
                log.warning("cannot look at the queue", error=error)
                continue
            self._do(self._ledger.judge(states, time.monotonic()))

    # ------------------------------------------------------------------------------------------------------ its actions

    def _put_done(self, job: Job, entry: Entry | None) -> None:
        choice = job.choices[0]
        attempt = (job.request_id, choice.choice, choice.attempt)
        now = time.monotonic()
        self._do(self._ledger.put(*attempt, entry) if entry is not None else self._ledger.put_failed(*attempt, now))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Put() | Remove() | Bury():
                    self._writer.add(action)
                case Tell(to, body):
                    self._control.send(to, body)
                case Confirm(to):
                    self._beat_to(to)
                case Show(request_id, choice, tokens):
                    if (answer := self._answers.get((request_id, choice))) is not None:
                        answer.put(Update(tokens))
                case End(request_id, choice, tokens, finish, error):
                    if (answer := self._take((request_id, choice))) is not None:
                        answer.put(Update(tokens, finish, error))
