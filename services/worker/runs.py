"""Executions on this worker, from claim or commit to the last acknowledged word: what every role shares. Pure: no socket, no clock.

It turns the engine's outcomes into words for the gateways (through the outbox) and remembers which queue entry to acknowledge when.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from common.messages import Finished, Handed, Incarnation, Job, Key, Lost, LostReason, Token
from common.queue import Entry
from services.engine.binding import stays
from services.engine.plan import Began, Drawn, Failed, Preempted
from services.engine.sequence import Sequence
from services.worker.jobs import claim_key, forked, leader, sequence_of, unfit
from services.worker.outbox import Outbox

# ------------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Submit:
    """Give the sequence to the engine."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Stop:
    """Take the execution out of the engine and free its pages."""

    key: Key


@dataclass(frozen=True, slots=True)
class Release:
    """Handed over: the parked sequence's pages may go."""

    key: Key


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Take the job out of the queue: somebody else answers for it now."""

    entry: Entry


Action: TypeAlias = Submit | Stop | Release | Acknowledge


@dataclass(eq=False)
class Run:
    """One execution here."""

    key: Key
    job: Job
    entry: Entry | None
    parks: bool
    """It leaves after its first token here."""
    phase_at: float
    """Start of its present phase on this worker: claim or commit, then the first launch, then (colocated) the first token."""
    began: bool = False
    prefilling: bool = True
    queued_s: float = 0.0
    in_engine: bool = False


class Runs:
    """Executions by key, and the outbox that speaks of them."""

    def __init__(self, outbox: Outbox, max_request_tokens: int, *, parks: bool, short_tokens: int = 0) -> None:
        """`parks`: answers go elsewhere after their first token, but for those of no more than `short_tokens` more."""
        self.outbox = outbox
        self._max_request_tokens = max_request_tokens
        self._parks = parks
        self._short_tokens = short_tokens
        self._runs: dict[Key, Run] = {}
        self._withheld: dict[Key, Sequence] = {}
        """Suspects that wait until their gateway knows of them here: only then a death in their launch is known for one (rule 11)."""

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, key: Key) -> Run | None:
        return self._runs.get(key)

    @property
    def unbegun_tokens(self) -> int:
        """Tokens of claimed jobs that no launch has contained yet."""
        return sum(len(run.job.prompt) + leader(run.job).index for run in self._coming())

    @property
    def unbegun(self) -> int:
        return sum(1 for _ in self._coming())

    def _coming(self) -> Iterator[Run]:
        """Those that some launch will contain. One that is over here already, expired as it was claimed, only waits to be acknowledged."""
        return (run for run in self._runs.values() if not run.began and (run.in_engine or run.key in self._withheld))

    # ---------------------------------------------------------------------------------------------------- coming in

    def claimed(self, entry: Entry, job: Job, now: float) -> list[Action]:
        """A job from the queue: into the engine, unless it cannot be run at all. A suspect waits for `acknowledged` first."""
        key = claim_key(job)
        left = job.max_tokens - leader(job).index
        parks = self._parks and not stays(left, len(job.choices), self._short_tokens)
        run = self._runs[key] = Run(key, job, entry, parks, now)
        self.outbox.hold(job.gateway, key, leader(job).index)
        if job.deadline_s <= 0:
            return self.lose(key, "expired", "its deadline had passed when it was claimed")
        reason = unfit(job, self._max_request_tokens)
        if reason is not None:
            return self.lose(key, "refused", reason)
        sequence = sequence_of(job, key, parks=parks, now=now)
        if sequence.suspect:
            self._withheld[key] = sequence
            return []
        run.in_engine = True
        return [Submit(sequence)]

    def acknowledged(self) -> list[Action]:
        """Gateways have been heard: suspects that they know of here may run."""
        ready = [key for key in self._withheld if self.outbox.known(key)]
        for key in ready:
            self._runs[key].in_engine = True
        return [Submit(self._withheld.pop(key)) for key in ready]

    def committed(self, key: Key, job: Job, first: Token, transfer_s: float, now: float) -> None:
        """A decode has taken it over: say so, and repeat the first token, so that the order across two sockets does not matter."""
        self._runs[key] = Run(key, job, None, False, now, prefilling=False, in_engine=True)
        self.outbox.hold(job.gateway, key, first.index)
        self.outbox.start(key, transfer_s)
        self.outbox.tokens(key, [first], stage_s=0.0)
        self._fork(key, job, transfer_s, now)

    # --------------------------------------------------------------------------------------------- what the engine says

    def began(self, outcome: Began, now: float) -> Run | None:
        """The run if it is still wanted: one given up meanwhile is being taken out of the engine."""
        run = self._runs.get(outcome.key)
        if run is None or not run.in_engine:
            return None
        run.began = True
        if run.prefilling:
            self.outbox.start(run.key, reused_tokens=outcome.reused)
        else:
            run.queued_s = now - run.phase_at
        run.phase_at = now
        self.outbox.launched(run.key, True)
        return run

    def drawn(self, outcome: Drawn, now: float) -> Run | None:
        """A token for the client; the run is over if it finishes the choice, and parked if the rest is written elsewhere."""
        run = self._runs.get(outcome.key)
        if run is None:
            return None
        self.outbox.tokens(run.key, [outcome.token], stage_s=now - run.phase_at, queued_s=run.queued_s)
        if run.prefilling:
            run.prefilling, run.phase_at = False, now
            if not run.parks:
                self._fork(run.key, run.job, 0.0, now)
        if run.parks:
            self.outbox.launched(run.key, False)
        if outcome.finish is not None:
            run.in_engine = False
            self.outbox.end(Finished(run.key, outcome.token.index + 1, outcome.finish))
        return run

    def ended(self, outcome: Preempted | Failed) -> None:
        """The engine has let go of it by itself."""
        run = self._runs.get(outcome.key)
        if run is None:
            return
        run.in_engine = False
        if isinstance(outcome, Preempted):
            self.outbox.end(Lost(run.key, "preempted"))
        else:
            self.outbox.end(Lost(run.key, "failed", outcome.error))

    # ------------------------------------------------------------------------------------------------------- going out

    def lose(self, key: Key, reason: LostReason, detail: str = "") -> list[Action]:
        """Give it up in order. Its entry is acknowledged when the gateway has acknowledged the word."""
        run = self._runs.get(key)
        if run is None:
            return []
        self.outbox.end(Lost(key, reason, detail))
        stop = self._stop(run)
        run.in_engine = False
        return stop

    def handed(self, key: Key, to: Incarnation) -> list[Action]:
        """A decode has committed it: the pages go, the job is done with."""
        run = self._runs.pop(key, None)
        if run is None:
            return [Release(key)]
        self.outbox.end(Handed(key, to))
        return [Release(key), *self._acknowledge(run)]

    def over(self, key: Key) -> list[Action]:
        """The gateway has acknowledged the last word."""
        run = self._runs.pop(key, None)
        return [] if run is None else self._acknowledge(run)

    def cancel(self, key: Key) -> list[Action]:
        """The gateway wants no more of it; it has removed the entry itself, or is dead."""
        run = self._runs.pop(key, None)
        if run is None:
            return [Stop(key)]
        return [*self._stop(run), *self._acknowledge(run)]

    def drain(self) -> list[Action]:
        """Hand everything back, uncounted (rule 12)."""
        actions: list[Action] = []
        for key in self.outbox.unended():
            actions += self.lose(key, "drained")
        return actions

    def _fork(self, key: Key, job: Job, transfer_s: float, now: float) -> None:
        """The other choices run from here on as well."""
        for its, own in forked(job, key):
            self._runs[its] = Run(its, own, None, False, now, prefilling=False, in_engine=True)
            self.outbox.hold(own.gateway, its, leader(own).index)
            self.outbox.start(its, transfer_s)

    def _stop(self, run: Run) -> list[Action]:
        """Out of the engine, and with it the forks that may have begun there before we have heard of it."""
        self._withheld.pop(run.key, None)
        if not run.in_engine:
            return []
        unheard = forked(run.job, run.key) if run.prefilling and not run.parks else []
        return [Stop(run.key), *(Stop(its) for its, _ in unheard)]

    @staticmethod
    def _acknowledge(run: Run) -> list[Action]:
        return [] if run.entry is None else [Acknowledge(run.entry)]
