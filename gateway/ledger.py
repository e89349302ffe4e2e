"""Who holds which request, and what to do when nobody does: the gateway's half of the recovery rules, pure.

The ledger owns a request from acceptance to its last token. It is told what happened (`open`, `put`, `put_failed`, `join`, `part`,
`event`, `dead`, `judge`, `tick`, `cancel`) and answers with actions for the desk to carry out; it has no clock, no socket and no await, so
raising an attempt and copying the accepted ids are one step. Rule numbers are those of docs/protocol.md.

An execution is bound by the first word heard of it (rule 1). A *holder* is a live worker whose latest word claims the bound
execution. When the last holder dies, lets go or forgets, the flight gets a new attempt that goes on behind the accepted ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from common.beats import PAUSE_S
from common.errors import RequestError, Unavailable
from common.messages import (
    Cancel,
    Event,
    Finished,
    Handed,
    Holding,
    Incarnation,
    Key,
    Lost,
    Resend,
    Resent,
    Role,
    Started,
    Token,
    Tokens,
    WorkerBeat,
)
from common.names import CLASSES, DEAD_S
from common.queue import Absent, Entry, EntryState, Pending
from gateway.ask import Ask, Timeline
from gateway.flight import Action, Bury, Confirm, End, Flight, Put, Remove, Show, Tell
from gateway.forecast import Load

FlightId: TypeAlias = tuple[str, int]

PUT_RETRY_S = 0.5
AGAIN_S = 2.0
"""Who is refused because Redis or the workers are away comes back after this."""
EARLY_S = 1.0
"""A worker may find a deadline passed this long before it has by our clock; earlier, its clock or Redis' has jumped."""
PROGRESS = 16
"""Tokens that an attempt has brought: its end is no sign that the request kills."""
ALONE_AT = 2
"""Deaths during a launch of the request after which it runs alone; one more ends it (rule 11)."""


class Ledger:
    """Every request this gateway has accepted and not ended."""

    def __init__(self, gateway: Incarnation, tokens_address: str) -> None:
        self._gateway = gateway
        self._tokens_address = tokens_address
        self._flights: dict[FlightId, Flight] = {}
        self._roles: dict[Incarnation, Role] = {}
        self._finals: dict[Incarnation, set[Key]] = {}
        self._ticked_at: float | None = None
        self.recoveries = 0

    # ------------------------------------------------------------------------------------------------ the client's side

    def open(self, request_id: str, ask: Ask, now: float) -> list[Action]:
        """Accept a request: it is put in its class of the queue, all of its choices as one job."""
        flights = [Flight(request_id, choice, ask, now) for choice in range(ask.n)]
        for flight in flights:
            flight.rides = 0 if flight.choice else None
            self._flights[flight.id] = flight
        return [self._put(flights[0], now)]

    def cancel(self, request_id: str, choice: int, now: float) -> list[Action]:
        """Nobody waits for this choice any more (rule 13)."""
        flight = self._flights.pop((request_id, choice), None)
        return [] if flight is None else [*self._let_go(flight), *self._promote(flight, now)]

    # ------------------------------------------------------------------------------------------------- the queue's side

    def put(self, request_id: str, choice: int, attempt: int, entry: Entry) -> list[Action]:
        """The job of this attempt stands in the queue as `entry`."""
        flight = self._flights.get((request_id, choice))
        if flight is None or flight.attempt != attempt:
            return [Remove(entry)]
        stale: list[Action] = [] if flight.entry in (None, entry) else [Remove(flight.entry)]
        flight.entry = entry
        return stale

    def put_failed(self, request_id: str, choice: int, attempt: int, now: float) -> list[Action]:
        """The queue did not take the job (or did not say so). A first attempt ends here, a running request is tried again."""
        flight = self._flights.get((request_id, choice))
        if flight is None or flight.attempt != attempt:
            return []
        if flight.execution is not None:
            return []  # it had entered all the same
        if attempt == 1:
            return self._end(flight, now, error=Unavailable("the job queue cannot be reached: try again later", retry_after_s=AGAIN_S))
        flight.put_again_at = now + PUT_RETRY_S
        return []

    def entries(self) -> list[Entry]:
        """Entries whose fate the desk looks up once a second, for `judge`."""
        return [f.entry for f in self._flights.values() if f.entry is not None and f.execution is None]

    def judge(self, states: dict[Entry, EntryState], now: float) -> list[Action]:
        """Rule 4: an entry that vanished, or that a consumer holds who is dead or does not speak of it, is put again."""
        actions: list[Action] = []
        for flight in self._still_open():
            if flight.entry is None or flight.execution is not None or flight.entry not in states:
                continue
            state = states[flight.entry]
            held_s = flight.pending_s(state, now) if isinstance(state, Pending) else 0.0
            if now - flight.put_at < DEAD_S:
                continue
            if isinstance(state, Absent):
                actions += self._again(flight, now)
            elif isinstance(state, Pending) and held_s > DEAD_S:
                # A consumer that is dead and one that has lost the reply look alike: delivered, and not a word of it for as long as death
                # takes. Who lives is not asked: one that has just started claims before its first beat is heard. It is suspected to have
                # died of it until it speaks again.
                actions += self._again(flight, now, suspect=state.consumer, heard=False)
        return actions

    # ------------------------------------------------------------------------------------------------ the workers' side

    def join(self, worker: Incarnation, role: Role) -> None:
        self._roles[worker] = role

    def part(self, worker: Incarnation) -> None:
        """Nobody speaks of it any more, and it has said nothing since it was lost, if ever."""
        self._roles.pop(worker, None)
        self._finals.pop(worker, None)

    def event(self, sender: Incarnation, event: Event, now: float) -> list[Action]:
        """One event of a worker. Events of older attempts, second executions and strangers are dropped and cancelled."""
        if isinstance(event, WorkerBeat):
            return self._beat(sender, event, now)
        if sender not in self._roles:
            return []  # nobody has introduced it yet, or it was dead: its next beat says what it is, and what was missed
        flight = self._current(event.key)
        if flight is None or not self._bind(flight, sender, event.key, now):
            if isinstance(event, Finished | Lost | Handed):
                self._final(sender, event.key)
                return []
            return [] if isinstance(event, Resent) and event.unknown else [Tell(sender, Cancel(event.key))]
        match event:
            case Started():
                flight.launched[sender] = True  # it is said as the launch begins; the next beat may come too late
                flight.transferred(event.transfer_s)
                flight.reused(event.reused_tokens)
                return [Confirm(sender)] if flight.announced else []
            case Tokens():
                flight.launched[sender] = self._roles.get(sender) != "prefill"
                flight.spent(self._roles.get(sender), event, now)
                if self._roles.get(sender) == "colocated":
                    flight.settled_at = flight.settled_at or now
                return self._tokens(flight, sender, event.tokens, now)
            case Handed():
                return self._handed(flight, sender, event, now)
            case Finished():
                return self._finished(flight, sender, event, now)
            case Lost():
                return self._lost(flight, sender, event, now)
            case Resent():
                return self._resent(flight, sender, event, now)

    def dead(self, worker: Incarnation, now: float) -> list[Action]:
        """The worker has died (rule 3): what it alone held starts again elsewhere."""
        self._roles.pop(worker, None)
        self._finals.pop(worker, None)
        actions: list[Action] = []
        for flight in self._still_open():
            launched = flight.launched.pop(worker, None)  # None: only `Handed` has told that it is there
            heard_at = flight.holders.get(worker)
            if flight.drop_holder(worker):
                suspect = None if launched is False else worker
                actions += self._again(flight, now, suspect=suspect, heard=launched is not None, silent_since=heard_at)
            elif flight.execution is None and flight.pending is not None and flight.pending[0] == worker:
                actions += self._again(flight, now, suspect=worker, heard=False)
        return actions

    def seen(self, worker: Incarnation) -> list[tuple[Key, int, bool]]:
        """For the next beat to this worker: what need not be kept any longer (rule 5)."""
        finals = self._finals.pop(worker, set())
        running = [
            (flight.key, flight.index, False) for flight in self._flights.values() if worker in flight.holders and flight.key not in finals
        ]
        return running + [(key, 0, True) for key in finals]

    def launched(self, worker: Incarnation) -> list[Key]:
        """For the next beat to this worker: suspects of which it has said that it launches them (rule 11)."""
        return [flight.key for flight in self._flights.values() if flight.announced and flight.launched.get(worker)]

    def tick(self, now: float) -> list[Action]:
        """Everything that time alone brings about: deadlines, puts to repeat, holders that have stopped speaking of a request.

        After a pause of our own nobody counts as silent: what they said meanwhile may not have been read yet.
        """
        last, self._ticked_at = self._ticked_at, now
        if last is not None and now - last > PAUSE_S:
            for flight in self._flights.values():
                flight.holders = dict.fromkeys(flight.holders, now)
        actions: list[Action] = []
        for flight in self._still_open():
            if now >= flight.deadline:
                actions += self._end(flight, now, error=Unavailable("the request's deadline has passed", code="deadline_exceeded"))
            elif self._stranded(flight, now):
                flight.next_attempt(now)
                actions.append(self._put(flight, now))
            elif flight.put_again_at is not None and now >= flight.put_again_at:
                actions.append(self._put(flight, now))
            elif flight.execution is not None:
                silent = {worker: at for worker, at in flight.holders.items() if now - at > DEAD_S}
                if any([flight.drop_holder(worker) for worker in silent]):
                    actions += self._again(flight, now, silent_since=max(silent.values()))
        return actions

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def queued(self) -> int:
        """Accepted and not yet started by any worker."""
        return len(self._waiting())

    def timeline(self, request_id: str, choice: int = 0) -> Timeline:
        """The live timeline of an open request."""
        return self._flights[(request_id, choice)].timeline

    def alone(self) -> set[str]:
        """Requests that have to run alone (rule 11)."""
        return {flight.request_id for flight in self._flights.values() if flight.alone}

    def load(self) -> Load:
        """What waits and what has no place on a decode yet."""
        waiting = dict.fromkeys(CLASSES, 0)
        for flight in self._waiting():
            waiting[flight.job_class] += flight.tokens
        unplaced = [flight for flight in self._flights.values() if flight.decode is None and flight.settled_at is None]
        return Load(waiting, sum(flight.tokens for flight in unplaced if flight.rides is None), len(unplaced))

    # ---------------------------------------------------------------------------------------------------------- inside

    def _still_open(self) -> Iterator[Flight]:
        """Each flight, but for those that end meanwhile: one may take its riders along."""
        for flight in list(self._flights.values()):
            if flight.id in self._flights:
                yield flight

    def _waiting(self) -> list[Flight]:
        return [one for one in self._flights.values() if one.execution is None and one.rides is None]

    def _riders(self, leader: Flight) -> list[Flight]:
        """Choices that no worker has spoken of yet and that travel with this one."""
        others = (self._flights.get((leader.request_id, choice)) for choice in range(leader.ask.n))
        return [other for other in others if other is not None and other.rides == leader.choice]

    def _promote(self, gone: Flight, now: float) -> list[Action]:
        """A choice is over before its riders have started: the first of them leads the others, with its suspicions."""
        riders = self._riders(gone)
        if not riders:
            return []
        first = riders[0]
        for rider in riders[1:]:
            rider.rides = first.choice
        first.next_attempt(now)
        first.suspects |= gone.suspects
        first.alone = gone.alone
        return [self._put(first, now)]

    def _stranded(self, flight: Flight, now: float) -> bool:
        """Its leader has been for long where it should have started."""
        leader = self._flights.get((flight.request_id, flight.rides)) if flight.rides is not None else None
        return leader is not None and leader.settled_at is not None and now - leader.settled_at > DEAD_S

    def _current(self, key: Key) -> Flight | None:
        flight = self._flights.get((key.request_id, key.choice))
        return flight if flight is not None and flight.attempt == key.attempt else None

    def _bind(self, flight: Flight, sender: Incarnation, key: Key, now: float) -> bool:
        """Rule 1: whether the sender may speak for this flight; the first execution and the first decode heard of may."""
        if flight.execution is None:
            flight.start(key.execution)
        if flight.execution != key.execution:
            return False
        if self._roles.get(sender) == "decode":
            if flight.decode is None:
                flight.decode = sender
            if flight.decode != sender:
                return False
            flight.settled_at = flight.settled_at or now
        elif flight.prefill is None:
            flight.prefill = sender
        elif flight.prefill != sender or flight.handed:
            return False
        flight.holders[sender] = now
        return True

    def _final(self, sender: Incarnation, key: Key) -> None:
        """Its last word on this execution is known, or of no interest: it may forget it (rule 5)."""
        self._finals.setdefault(sender, set()).add(key)

    def _beat(self, sender: Incarnation, beat: WorkerBeat, now: float) -> list[Action]:
        """A beat's holdings say again what lost events said, and show what is missing (it cannot overtake tokens)."""
        for flight in self._flights.values():
            flight.suspects.discard(sender)  # it was only silent: no request has killed it
        self._roles[sender] = beat.role
        actions: list[Action] = []
        for holding in beat.holding:
            actions += self._holding(sender, holding, now)
        return actions

    def _holding(self, sender: Incarnation, holding: Holding, now: float) -> list[Action]:
        flight = self._current(holding.key)
        if flight is None or not self._bind(flight, sender, holding.key, now):
            if holding.ended:
                self._final(sender, holding.key)
                return []
            return [Tell(sender, Cancel(holding.key))]
        flight.launched[sender] = holding.launched
        if holding.ended or holding.index > flight.index:
            return [Tell(sender, Resend(holding.key, flight.index))]
        return []

    def _tokens(self, flight: Flight, sender: Incarnation, tokens: list[Token], now: float) -> list[Action]:
        fresh: list[Token] = []
        for token in tokens:
            if token.index > flight.index:
                break
            if token.index == flight.index:
                fresh.append(token)
                flight.accepted.append(token.id)
                flight.shown(now)
                if flight.finish is not None:
                    return self._end(flight, now, fresh)
        actions: list[Action] = [Show(flight.request_id, flight.choice, fresh)] if fresh else []
        if tokens and tokens[-1].index >= flight.index:
            actions.append(Tell(sender, Resend(flight.key, flight.index)))
        return actions

    def _handed(self, flight: Flight, sender: Incarnation, event: Handed, now: float) -> list[Action]:
        """From now on the decode holds it; one that is dead already falls silent as a holder."""
        self._final(sender, event.key)
        flight.handed = True
        actions: list[Action] = []
        if flight.decode is None:
            flight.decode = event.to
            flight.holders[event.to] = now
        elif flight.decode != event.to:
            actions.append(Tell(event.to, Cancel(event.key)))
        flight.drop_holder(sender)
        return actions

    def _finished(self, flight: Flight, sender: Incarnation, event: Finished, now: float) -> list[Action]:
        """The flight would be over had every token come: ask for those that are missing, and acknowledge nothing before."""
        if flight.index < event.index:
            return [Tell(sender, Resend(event.key, flight.index))]
        self._final(sender, event.key)
        return self._again(flight, now)

    def _lost(self, flight: Flight, sender: Incarnation, event: Lost, now: float) -> list[Action]:
        self._final(sender, event.key)
        if sender != flight.decode and flight.decode in flight.holders:
            flight.drop_holder(sender)  # a prefill that never learnt that it was rid of it
            return []
        if event.reason == "expired" and now >= flight.deadline - EARLY_S:
            return self._end(flight, now, error=Unavailable("the request's deadline has passed", code="deadline_exceeded"))
        if event.reason == "refused":
            return self._end(flight, now, error=RequestError(f"no worker can run this request: {event.detail}"))
        flight.reserve_all = flight.reserve_all or event.reason == "preempted"
        return self._again(flight, now, suspect=f"{sender} in attempt {flight.attempt}" if event.reason == "failed" else None)

    def _resent(self, flight: Flight, sender: Incarnation, event: Resent, now: float) -> list[Action]:
        if event.unknown:
            return self._again(flight, now) if flight.drop_holder(sender) else []
        actions = self._tokens(flight, sender, event.tokens, now) if event.tokens else []
        if event.end is not None and flight.id in self._flights:
            actions += self.event(sender, event.end, now)
        return actions

    def _again(
        self, flight: Flight, now: float, *, suspect: str | None = None, heard: bool = True, silent_since: float | None = None
    ) -> list[Action]:
        """A new attempt behind the accepted ids, in one step (rule 2). `suspect`: what seems to have died of it (rule 11), `heard`: it had
        said that it launches it. A death without a word counts if it is the first: the launch of a suspect is announced. So does one after
        `PROGRESS` tokens: what kills its worker comes no further each time, and who lives long meets many deaths. `silent_since`: the last
        word of who fell silent."""
        self.recoveries += 1
        actions = self._let_go(flight)
        kills = heard and flight.index - flight.first_index < PROGRESS
        flight.next_attempt(now)
        if suspect is not None and (kills or not flight.suspects):
            flight.suspects.add(suspect)
        if flight.suspicion > ALONE_AT:
            job = flight.job(self._gateway, self._tokens_address, self._riders(flight), now)
            error = RequestError("workers died while running this request: it is not tried again", code="poison")
            error.status, error.type = 500, "server_error"
            return [*actions, Bury(job, f"{flight.suspicion} workers died with it"), *self._end(flight, now, error=error)]
        flight.alone = flight.suspicion >= ALONE_AT
        return [*actions, self._put(flight, now, silent_since)]

    def _put(self, flight: Flight, now: float, silent_since: float | None = None) -> Put:
        riders = self._riders(flight)
        for one in (flight, *riders):
            one.put_at, one.announced = now, flight.suspicion > 0
        flight.put_again_at = None
        return Put(flight.job(self._gateway, self._tokens_address, riders, now), flight.job_class, silent_since)

    def _let_go(self, flight: Flight) -> list[Action]:
        """Cancel the present attempt wherever it may be."""
        actions: list[Action] = []
        if flight.entry is not None:
            actions.append(Remove(flight.entry))
            flight.entry = None
        if flight.execution is not None:
            known = {worker for worker in (flight.prefill, flight.decode) if worker is not None}
            actions += [Tell(worker, Cancel(flight.key)) for worker in sorted(known) if worker in self._roles]
        return actions

    def _end(self, flight: Flight, now: float, tokens: list[Token] | None = None, error: RequestError | None = None) -> list[Action]:
        """An error is also the error of those that travel with it."""
        riders = self._riders(flight)
        self._flights.pop(flight.id, None)
        actions: list[Action] = [End(flight.request_id, flight.choice, tokens or [], flight.finish, error)]
        if error is not None:
            actions += self._let_go(flight)
            for rider in riders:
                actions += self._end(rider, now, error=error)
            return actions
        if flight.entry is not None:
            actions.append(Remove(flight.entry))
        return [*actions, *self._promote(flight, now)]
