"""Simulated decodes: what services/decode/worker.py must do with each action."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.beats import Liveness
from common.messages import (
    Letter,
    Offer,
    PeerBeat,
    Pushed,
    Role,
    Withdraw,
)
from services.decode import inbound
from services.decode.core import DecodeCore
from services.decode.inbound import Inbound
from services.transfer.protocol import Arrived, Landed, NotPosted, Posted, TransferEvent
from tests.unit.recovery.fabric import PAGE_TOKENS
from tests.unit.recovery.worker import Worker

if TYPE_CHECKING:
    from tests.unit.recovery.world import World


class Decode(Worker):
    """services/decode/worker.py."""

    role: Role = "decode"

    def __init__(self, world: World, name: str, pages: int, depth: int) -> None:
        super().__init__(world, name, pages, depth)
        self.core: DecodeCore = DecodeCore(
            self.outbox, Inbound(PAGE_TOKENS, world.max_request_tokens, run_pages=3), max_request_tokens=world.max_request_tokens
        )
        self.prefills = Liveness()

    def introduced(self, name: str, role: Role) -> None:
        pass

    def peer_letter(self, letter: Letter) -> None:
        body, now = letter.body, self.world.now
        assert isinstance(body, PeerBeat | Offer | Pushed | Withdraw), body
        if isinstance(body, PeerBeat):
            self.prefills.heard(letter.sender, now)
        if isinstance(body, Offer):
            self.meet(body.job.gateway)
        self.do(self.core.letter(letter.sender, body, now))

    def tick(self, now: float) -> list[Any]:
        actions: list[Any] = []
        for peer, _ in self.prefills.dead(now):
            self.prefills.forget(peer)
            actions += self.core.peer_dead(peer, now)
        for peer in sorted(self.prefills.alive):
            self.send(peer, self.facts())
        return actions + self.core.tick(now)

    def perform(self, action: Any) -> None:
        match action:
            case inbound.Send(to, body):
                self.send(to, body)
            case inbound.Reserve(handoff, sequence):
                self.post(self.scheduler.reserve, handoff, sequence)
            case inbound.Lapse(handoff):
                self.post(self.scheduler.lapse, handoff)
            case inbound.Land(handoff):
                self.post(self.scheduler.landed, handoff)
            case inbound.Expect(handoff, grant, pages, indices, starts):
                for page in pages:
                    self.owner[page] = grant
                self.carrier.expect(handoff[0], grant, pages, indices, starts)
            case inbound.Abandon(grant, told):
                self.carrier.abandon(grant, told=told)
            case inbound.ClosePeer(peer):
                self.carrier.close_peer(peer)
            case inbound.Commit(handoff, offer, token, _):
                self.meet(offer.job.gateway)  # it may have died since the offer: expect its beats anew, or nobody would ever cancel
                self.post(self.scheduler.admit, handoff, token)
            case _:
                raise AssertionError(action)

    def transferred(self, event: TransferEvent) -> None:
        match event:
            case Posted():
                self.do(self.core.posted(event, self.world.now))
            case NotPosted():
                self.do(self.core.not_posted(event, self.world.now))
            case Arrived():
                self.do(self.core.arrived(event, self.world.now))
            case Landed():
                self.do(self.core.landed(event, self.world.now))
            case _:
                raise AssertionError(event)

    def leftovers(self) -> list[str]:
        way = self.core.inbound
        state = len(way._arrivals) + len(way._by_grant)
        return super().leftovers() + ([f"{self.name} arrivals: {state}"] if state else [])
