"""A worker's links to the gateways it works for: what it publishes, what they cancel, and when they are gone."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import zip_longest

from msgspec.structs import replace

from common.beats import Liveness
from common.control import ControlServer
from common.faults import NONE, MessageFault
from common.logs import get_logger
from common.messages import PROTOCOL, Cancel, GatewayBeat, Incarnation, Job, Key, Letter, Mismatch, Resend, WorkerBeat
from common.seal import Seal
from common.tokens import TokenPublisher
from services.worker.outbox import Outbox

log = get_logger(__name__)

MOST_LOST = 1024


class Gateways:
    """Outbox, token sockets and liveness of gateways in one place. Callbacks: an execution is cancelled, or over and acknowledged; a
    gateway has said which executions it knows, and which it knows to be launched."""

    def __init__(
        self,
        incarnation: Incarnation,
        fleet: str,
        fingerprint: str,
        server: ControlServer,
        *,
        on_cancel: Callable[[Key], None],
        on_over: Callable[[Key], None],
        on_seen: Callable[[Sequence[Key]], None],
        seal: Seal | None = None,
        fault: MessageFault = NONE,
    ) -> None:
        self.outbox = Outbox()
        self._fleet = fleet
        self._fingerprint = fingerprint
        self._server = server
        self._publisher = TokenPublisher(incarnation, seal=seal, fault=fault)
        self._liveness = Liveness()
        self._lost: OrderedDict[Incarnation, None] = OrderedDict()
        """Who has fallen silent and not been heard since; of those the last `MOST_LOST`."""
        self._waiting: dict[Incarnation, list[int]] = {}
        """Prompt tokens that wait at each gateway, by class."""
        self._on_cancel = on_cancel
        self._on_over = on_over
        self._on_seen = on_seen

    @property
    def alive(self) -> set[Incarnation]:
        return set(self._liveness.alive)

    def works_for(self, job: Job) -> bool:
        """Meet the gateway of a claimed job; False if it has fallen silent and left the job behind while others live, before whose jobs its
        backlog would be computed. One that was only stopped puts again what is gone (rule 4). If nobody is heard, it is this worker that
        was cut off."""
        if job.gateway in self._lost and self._liveness.alive - self._lost.keys():
            return False
        self.meet(job.gateway, job.tokens_address)
        return True

    def meet(self, gateway: Incarnation, tokens_address: str) -> None:
        """A gateway has been heard of, by its beat or its job: publish to it, and expect its beats from now on."""
        if gateway not in self._liveness.alive:
            self._liveness.heard(gateway, time.monotonic())
        if not self._publisher.knows(gateway):
            self._publisher.open(gateway, tokens_address)

    def letter(self, letter: Letter) -> bool:
        """Handle a letter if a gateway sent it; False if it is somebody else's."""
        match letter.body:
            case GatewayBeat() as beat:
                self._beat(letter.sender, beat)
            case Cancel() | Resend() if letter.sender not in self._liveness.alive:
                self._server.refusals.note("stranger", sender=letter.sender)
            case Cancel(key):
                for own in self.outbox.meant_by(key) or [key]:
                    self.outbox.forget(own)
                    self._on_cancel(own)
            case Resend(key, index):
                self.outbox.resend(letter.sender, key, index)
                self.flush()
            case _:
                return False
        return True

    def flush(self) -> None:
        """Send what is new, one message per gateway. What cannot be sent stays in the outbox: beats reveal it, `Resend` brings it."""
        for gateway, events in self.outbox.take().items():
            self._publisher.send(gateway, events)

    def beat(self, facts: WorkerBeat) -> None:
        """Our beat to every gateway, each with its own requests."""
        for gateway in self._liveness.alive:
            others = [tokens for other, tokens in self._waiting.items() if other != gateway]
            elsewhere = [sum(column) for column in zip_longest(*others, fillvalue=0)]
            self._publisher.send(gateway, [replace(facts, holding=self.outbox.holding(gateway), elsewhere_tokens=elsewhere)])

    def reap(self) -> list[Incarnation]:
        """Forget gateways that have fallen silent, and all their requests with them."""
        dead = []
        for gateway, reason in self._liveness.dead(time.monotonic()):
            log.warning("gateway lost", gateway=gateway, reason=reason)
            self._liveness.forget(gateway)
            self._publisher.close(gateway)
            self._waiting.pop(gateway, None)
            self._lost[gateway] = None
            if len(self._lost) > MOST_LOST:
                self._lost.popitem(last=False)
            for key in self.outbox.of(gateway):
                self.outbox.forget(key)
                self._on_cancel(key)
            dead.append(gateway)
        return dead

    def close(self) -> None:
        self._publisher.close_all()

    def _beat(self, gateway: Incarnation, beat: GatewayBeat) -> None:
        mine, theirs = (self._fleet, self._fingerprint, PROTOCOL), (beat.fleet, beat.fingerprint, beat.protocol)
        if mine != theirs:
            self._server.refusals.note("mismatch", sender=gateway)
            self._server.send(gateway, Mismatch(f"fleet, fingerprint, protocol are {mine} here and {theirs} there"))
            return
        self._lost.pop(gateway, None)
        self.meet(gateway, beat.tokens_address)
        self._liveness.heard(gateway, time.monotonic())
        self._waiting[gateway] = beat.waiting_tokens
        for key in self.outbox.seen(beat.seen):
            self._on_over(key)
        self._on_seen(beat.launched)
