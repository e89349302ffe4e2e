"""A prefill's links to the decodes of its fleet: control sockets, beats both ways, and who of them lives."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from common.beats import Liveness
from common.control import ControlClient
from common.faults import NONE, MessageFault
from common.logs import get_logger
from common.messages import Incarnation, Introduction, Layout, Letter, Mismatch, Offer, PeerBeat, Pushed, Shard, Withdraw, WorkerBeat
from common.seal import Seal
from services.prefill.routing import Load

log = get_logger(__name__)


class Peers:
    """Decodes by incarnation. `pursued(peer)` names the handoffs a beat speaks of; `on_letter` gets the answers to handoffs; `on_beat`
    gets what each of their beats says: its load, None if it takes no offers."""

    def __init__(
        self,
        incarnation: Incarnation,
        fleet: str,
        fingerprint: str,
        layout: Layout,
        shards: list[Shard],
        checksums: bool,
        pursued: Callable[[Incarnation], list[int]],
        on_letter: Callable[[Letter], None],
        on_beat: Callable[[Incarnation, Load | None], None],
        seal: Seal | None = None,
        fault: MessageFault = NONE,
    ) -> None:
        self._client = ControlClient(incarnation, self._receive, seal, fault)
        self._on_letter = on_letter
        self._on_beat = on_beat
        self._liveness = Liveness()
        self._words = PeerBeat(0, 0, fleet, fingerprint, layout, shards, checksums=checksums)
        self._pursued = pursued
        self._links: dict[Incarnation, int] = {}
        self._closed = 0
        """Links closed so far: the number of the next one, so that a decode that comes back sees that its link is another."""
        self._members: set[Incarnation] = set()
        """Whom Redis names at present."""
        self._sequence = 0

    def introduced(self, members: dict[Incarnation, Introduction]) -> bool:
        """Redis names the decodes to knock at; it never says who lives. False if some cannot be knocked at now."""
        all_met = True
        for name, member in members.items():
            if member.role == "decode" and name not in self._client.peers:
                if self._client.connect(name, member.control_address):
                    self.beat(name)
                else:
                    all_met = False
        self._members = set(members)
        for name in self._client.peers - self._members:
            self._part(name)
        return all_met

    def _receive(self, letter: Letter) -> None:
        """Beats are handled here, everything else goes to `on_letter`."""
        match letter.body:
            case WorkerBeat() as beat:
                self._liveness.beat(letter.sender, beat.step, beat.busy, beat.longest_step_s, time.monotonic())
                self._on_beat(letter.sender, None if beat.draining else Load(beat.running + beat.waiting, beat.free_pages))
            case Mismatch(reason):
                log.error("a decode refuses this prefill", decode=letter.sender, reason=reason)
            case _:
                self._on_letter(letter)

    def beat(self, *only: Incarnation) -> None:
        self._sequence += 1
        for peer in only or tuple(self._client.peers):
            link = self._links.setdefault(peer, self._closed)
            words = replace(self._words, sequence=self._sequence, link=link, handoffs=self._pursued(peer))
            self._client.send(peer, words)

    def send(self, peer: Incarnation, body: Offer | Pushed | Withdraw) -> None:
        self._client.send(peer, body)

    def reset_link(self, peer: Incarnation) -> None:
        """Our side of the transfer link is closed; the decode hears of it before it hears anything else."""
        self._forget_link(peer)
        if peer in self._client.peers:
            self.beat(peer)

    def reap(self) -> list[Incarnation]:
        """Decodes that have died since the last time."""
        dead = []
        for peer, reason in self._liveness.dead(time.monotonic()):
            log.warning("decode lost", decode=peer, reason=reason)
            self._liveness.forget(peer)
            if peer not in self._members:
                self._part(peer)
            dead.append(peer)
        return dead

    def _part(self, peer: Incarnation) -> None:
        """Redis does not name it any more: if it is silent too, nobody is there."""
        if peer not in self._liveness.alive:
            self._client.disconnect(peer)
            self._forget_link(peer)

    def _forget_link(self, peer: Incarnation) -> None:
        self._closed += 1
        self._links.pop(peer, None)

    def close(self) -> None:
        self._client.close()
