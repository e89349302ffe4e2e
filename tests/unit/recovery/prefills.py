"""Simulated workers that claim jobs: prefills and colocated ones. What their drivers must do with each action."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from common.beats import Liveness
from common.messages import (
    Job,
    Key,
    Letter,
    PeerBeat,
    Role,
    WorkerBeat,
)
from common.queue import Claimed, Entry
from services.engine.plan import Began, Drawn, Failed, Outcome, Preempted
from services.prefill import moves
from services.prefill.core import PrefillCore
from services.prefill.handoffs import Handoffs
from services.prefill.routing import Holders, Load
from services.transfer.protocol import PushFailed, Sent, TransferEvent
from services.worker.runs import Acknowledge, Runs
from tests.unit.recovery.carrier import SHARD
from tests.unit.recovery.fabric import PAGE_TOKENS
from tests.unit.recovery.worker import BUDGET_TOKENS, FINGERPRINT, FLEET, LAYOUT, ORPHAN_S, SWEEP_S, Worker

if TYPE_CHECKING:
    from tests.unit.recovery.world import World


class Claimant(Worker):
    """services/worker/claims.py: one job at a time, only while there is room for it."""

    def __init__(self, world: World, name: str, pages: int, depth: int) -> None:
        super().__init__(world, name, pages, depth)
        self._claiming = False
        for every, what in ((0.25, self.woken), (SWEEP_S, self.sweep)):
            self._forever(every, what)

    def _forever(self, every: float, what: Callable[[], None]) -> None:
        def again() -> None:
            what()
            self._forever(every, what)

        self.world.clock.after(every, lambda: self.deliver("claims", again))

    def woken(self) -> None:
        """Claim if there is room; the reply may be lost, and the entry is then pending here for ever."""
        if self._claiming or self.draining or self.wanted() <= 0 or self.world.queue.away:
            return
        claimed = self.world.queue.claim(self.name)
        if claimed is None or self.world.rng.random() < self.world.weather.claim_loss:
            return
        self._claiming = True
        self.world.clock.after(self.world.wires.latency(), lambda: self.deliver("redis", lambda: self._claimed(claimed)))

    def wanted(self) -> int:
        snapshot = self.snapshot
        return 0 if self.runs.unbegun or snapshot.pool.free + snapshot.pool.cached == 0 else BUDGET_TOKENS - snapshot.unplanned_tokens

    def _claimed(self, claimed: Claimed) -> None:
        self._claiming = False
        if self.draining:
            return
        if claimed.job.gateway in self.lost and self.gateways.alive - self.lost:
            self.do([Acknowledge(claimed.entry)])
            return
        self.meet(claimed.job.gateway)
        self.do([*self.claimed(claimed.entry, claimed.aged)])

    def claimed(self, entry: Entry, job: Job) -> Iterable[Any]:
        raise NotImplementedError

    def sweep(self) -> None:
        """Delivered entries of dead gateways; and those for which nobody waits any more: a copy of a job (doubled, replayed) whose holder
        died is known to no gateway."""
        for entry, state, job in self.world.queue.pending():
            if (state.idle_s > ORPHAN_S and job.gateway not in self.gateways.alive) or state.idle_s > job.deadline_s:
                self.world.queue.remove(entry)


class Colocated(Claimant):
    """services/colocated/worker.py: no handoff, only runs."""

    role: Role = "colocated"

    def __init__(self, world: World, name: str, pages: int, depth: int) -> None:
        super().__init__(world, name, pages, depth)
        self.core = Alone(Runs(self.outbox, world.max_request_tokens, parks=False))

    def claimed(self, entry: Entry, job: Job) -> Iterable[Any]:
        return self.runs.claimed(entry, job, self.world.now)

    def introduced(self, name: str, role: Role) -> None:
        pass

    def tick(self, now: float) -> list[Any]:
        return []


class Alone:
    """What the colocated worker does between its hooks and its runs."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def outcome(self, outcome: Outcome, now: float) -> list[Any]:
        match outcome:
            case Began():
                self.runs.began(outcome, now)
            case Drawn():
                self.runs.drawn(outcome, now)
            case Preempted() | Failed():
                self.runs.ended(outcome)
        return []

    def cancel(self, key: Key, now: float) -> list[Any]:
        return [*self.runs.cancel(key)]

    def over(self, key: Key) -> list[Any]:
        return [*self.runs.over(key)]

    def drain(self, now: float) -> list[Any]:
        return [*self.runs.drain()]


class Prefill(Claimant):
    """services/prefill/{worker,peers}.py."""

    role: Role = "prefill"

    def __init__(self, world: World, name: str, pages: int, depth: int) -> None:
        super().__init__(world, name, pages, depth)
        self.core: PrefillCore = PrefillCore(
            self.outbox, Handoffs(PAGE_TOKENS, world.rng, holders=Holders() if world.reuse else None, growth_pages=1),
            fingerprint=FINGERPRINT, page_tokens=PAGE_TOKENS, max_request_tokens=world.max_request_tokens,
            short_tokens=world.short_tokens,
        )  # fmt: skip
        self.decodes = Liveness()
        self.links: dict[str, int] = {}

    def wanted(self) -> int:
        """While a launch is under way and nothing is left to plan behind it, an idle prefill elsewhere is the better place."""
        return 0 if self.snapshot.in_flight and not self.snapshot.unplanned_tokens else super().wanted()

    def claimed(self, entry: Entry, job: Job) -> Iterable[Any]:
        return self.core.claimed(entry, job, self.world.now)

    def introduced(self, name: str, role: Role) -> None:
        if role == "decode" and name not in self.links:
            self.links[name] = 0
            self._beat_to(name)

    def _beat_to(self, peer: str) -> None:
        pursued = self.core.handoffs.pursued(peer)
        self.send(peer, PeerBeat(self._sequence, self.links[peer], FLEET, FINGERPRINT, LAYOUT, [SHARD], pursued))

    def peer_letter(self, letter: Letter) -> None:
        now = self.world.now
        if isinstance(letter.body, WorkerBeat):
            beat = letter.body
            self.decodes.beat(letter.sender, beat.step, beat.busy, beat.longest_step_s, now)
            load = None if beat.draining else Load(beat.running + beat.waiting, beat.free_pages)
            self.do(self.core.beat(letter.sender, load, now))
        else:
            self.do(self.core.letter(letter.sender, letter.body, now))  # type: ignore[arg-type]

    def tick(self, now: float) -> list[Any]:
        actions: list[Any] = []
        for peer, _ in self.decodes.dead(now):
            self.decodes.forget(peer)
            actions += self.core.peer_dead(peer, now)
        for peer in sorted(self.links):
            self._beat_to(peer)
        return actions + self.core.tick(now)

    def perform(self, action: Any) -> None:
        match action:
            case moves.Send(to, body):
                self.send(to, body)
            case moves.Push():
                self.carrier.push(action.to, action.rank, action.handoff, action.grant, action.pages, action.indices, action.starts)
            case moves.FinishPush(number, grant):
                self.carrier.finish_push(number, grant)
            case moves.Flush():
                self.carrier.flush(action.to, action.rank, action.handoff, action.grant, action.indices, action.starts)
            case moves.ResetLink(peer):
                self.carrier.close_peer(peer)
                self.links[peer] = self.links.get(peer, 0) + 1
                self._beat_to(peer)
            case _:
                raise AssertionError(action)

    def transferred(self, event: TransferEvent) -> None:
        match event:
            case Sent():
                self.do(self.core.sent(event, self.world.now))
            case PushFailed():
                self.do(self.core.push_failed(event, self.world.now))
            case _:
                raise AssertionError(event)

    def leftovers(self) -> list[str]:
        ways = self.core.handoffs
        state = len(ways) + len(ways._by_number) + len(ways._withdrawing) + sum(map(len, ways._uncounted.values()))
        return super().leftovers() + ([f"{self.name} handoffs: {state}"] if state else [])
