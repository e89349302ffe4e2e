"""What a decode decides, pure: offers in, arrivals in, outcomes in; engine commands, receives and letters out."""

from __future__ import annotations

from typing import TypeAlias

from common.messages import Committed, Incarnation, Key, Offer, PeerBeat, Pushed, Withdraw
from services.decode import inbound
from services.decode.inbound import Commit, Inbound
from services.engine.plan import Began, Computed, Drawn, Failed, Granted, Outcome, Preempted
from services.transfer.protocol import Arrived, Landed, NotPosted, Posted
from services.worker.jobs import forked
from services.worker.outbox import Outbox
from services.worker.runs import Acknowledge, Release, Runs, Stop, Submit

Action: TypeAlias = (
    Submit
    | Stop
    | Release
    | Acknowledge
    | inbound.Send
    | inbound.Reserve
    | inbound.Lapse
    | inbound.Land
    | inbound.Expect
    | inbound.Abandon
    | inbound.ClosePeer
    | inbound.Commit
)


class DecodeCore:
    """One decode's arrivals and executions. A `Commit` action still has to reach the engine (`admit`); its words are said already."""

    def __init__(self, outbox: Outbox, arrivals: Inbound, *, max_request_tokens: int) -> None:
        self.runs = Runs(outbox, max_request_tokens, parks=False)
        self.inbound = arrivals

    def letter(self, peer: Incarnation, body: PeerBeat | Offer | Pushed | Withdraw, now: float) -> list[Action]:
        match body:
            case PeerBeat():
                return self._resolve(self.inbound.beat(peer, body.link, body.handoffs), now)
            case Offer() if self._runs_here(body):
                return [inbound.Send(peer, Committed(body.handoff))]
            case Offer():
                return self._resolve(self.inbound.offer(peer, body, now), now)
            case Pushed():
                return self._resolve(self.inbound.pushed(peer, body, now), now)
            case Withdraw():
                return self._resolve(self.inbound.withdraw(peer, body.handoff), now)

    def outcome(self, outcome: Outcome, now: float) -> list[Action]:
        match outcome:
            case Granted():
                return self._resolve(self.inbound.granted(outcome.handoff, outcome.pages, outcome.shared), now)
            case Began():
                self.runs.began(outcome, now)
            case Drawn():
                self.runs.drawn(outcome, now)
            case Preempted() | Failed():
                self.runs.ended(outcome)
            case Computed():
                pass
        return []

    def posted(self, event: Posted, now: float) -> list[Action]:
        return self._resolve(self.inbound.posted(event), now)

    def not_posted(self, event: NotPosted, now: float) -> list[Action]:
        return self._resolve(self.inbound.not_posted(event), now)

    def arrived(self, event: Arrived, now: float) -> list[Action]:
        return self._resolve(self.inbound.arrived(event, now), now)

    def landed(self, event: Landed, now: float) -> list[Action]:
        return self._resolve(self.inbound.landed(event.grant), now)

    def peer_dead(self, peer: Incarnation, now: float) -> list[Action]:
        return self._resolve(self.inbound.peer_dead(peer), now)

    def tick(self, now: float) -> list[Action]:
        return self._resolve(self.inbound.tick(now), now)

    def cancel(self, key: Key, now: float) -> list[Action]:
        return [*self._resolve(self.inbound.cancel(key), now), *self.runs.cancel(key)]

    def over(self, key: Key) -> list[Action]:
        return [*self.runs.over(key)]

    def drain(self, now: float) -> list[Action]:
        return [*self._resolve(self.inbound.drain(), now), *self.runs.drain()]

    def _resolve(self, actions: list[inbound.Action], now: float) -> list[Action]:
        resolved: list[Action] = []
        for action in actions:
            if isinstance(action, Commit) and self._runs_here(action.offer):
                resolved += [inbound.Lapse(action.handoff), inbound.Land(action.handoff)]
                continue
            if isinstance(action, Commit):
                self.runs.committed(action.offer.key, action.offer.job, action.token, action.transfer_s, now)
            resolved.append(action)
        return resolved

    def _runs_here(self, offer: Offer) -> bool:
        """Whether it, or another choice that began with it, came by an earlier handoff and runs, or its end is not acknowledged yet: it
        keeps its words, and is not computed twice."""
        return any(self.runs.get(key) is not None for key in (offer.key, *(its for its, _ in forked(offer.job, offer.key))))
