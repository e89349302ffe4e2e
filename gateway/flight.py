"""One choice of one request as the gateway sees it, and the actions its ledger asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from common.errors import RequestError
from common.messages import Cancel, Choice, FinishReason, Incarnation, Job, Key, Resend, Role, Token, Tokens
from common.names import CLASSES
from common.queue import Entry, Pending
from gateway.ask import Ask, Timeline

# ------------------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class Put:
    """Put the job into its class of the queue; tell the ledger by `put` or `put_failed`.

    `silent_since`: the last word on it of a worker that was lost, if that is why.
    """

    job: Job
    job_class: str
    silent_since: float | None = None


@dataclass(frozen=True, slots=True)
class Remove:
    """Acknowledge and delete a queue entry."""

    entry: Entry


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a control message to a worker."""

    to: Incarnation
    body: Cancel | Resend


@dataclass(frozen=True, slots=True)
class Confirm:
    """Send a beat to this worker at once: it waits to hear that it is known to launch a suspect."""

    to: Incarnation


@dataclass(frozen=True, slots=True)
class Show:
    """New tokens for the client, each once and in order."""

    request_id: str
    choice: int
    tokens: list[Token]


@dataclass(frozen=True, slots=True)
class End:
    """The answer is complete with these last tokens, or has failed."""

    request_id: str
    choice: int
    tokens: list[Token]
    finish: FinishReason | None
    error: RequestError | None


@dataclass(frozen=True, slots=True)
class Bury:
    """Put the job into the dead-letter stream."""

    job: Job
    reason: str


Action: TypeAlias = Put | Remove | Tell | Confirm | Show | End | Bury


# -------------------------------------------------------------------------------------------------------------- flight


@dataclass(eq=False)
class Flight:
    """State of one (request, choice): the present attempt, who holds it, and what its client has been given."""

    request_id: str
    choice: int
    ask: Ask
    accepted_at: float
    attempt: int = 1
    accepted: list[int] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)
    # the present attempt
    entry: Entry | None = None
    put_at: float = 0.0
    put_again_at: float | None = None
    first_index: int = 0
    """Index of the first token this attempt has to bring."""
    announced: bool = False
    """Its job carries a suspicion, perhaps taken back meanwhile: whoever launches it says so first, and waits for `Confirm`."""
    execution: str | None = None
    prefill: Incarnation | None = None
    """The worker that claimed the job (a prefill, or a colocated one)."""
    decode: Incarnation | None = None
    pending: tuple[Incarnation, float] | None = None
    """Who has been seen with its entry and has not said a word of it, and since when."""
    handed: bool = False
    """The prefill has let go of it: what it still says of it is old."""
    holders: dict[Incarnation, float] = field(default_factory=dict)
    """Workers that claim the execution, with the moment of their latest word on it."""
    launched: dict[Incarnation, bool] = field(default_factory=dict)
    """Whether the request was part of a launch, by each holder's latest beat."""
    # for later attempts
    suspects: set[str] = field(default_factory=set)
    """Deaths during a launch of this request; one that proves to have been a mere silence is taken back."""
    alone: bool = False
    reserve_all: bool = False
    # choices of one request
    rides: int | None = None
    """The choice with whose job it travels, until a worker speaks of it by itself."""
    settled_at: float | None = None
    """Since when the present attempt is where its riders start."""

    @property
    def id(self) -> tuple[str, int]:
        return (self.request_id, self.choice)

    @property
    def key(self) -> Key:
        return Key(self.request_id, self.choice, self.attempt, self.execution or "")

    @property
    def index(self) -> int:
        """Absolute index of the next token to show."""
        return len(self.accepted)

    @property
    def tokens(self) -> int:
        """To be prefilled by the present attempt."""
        return len(self.ask.prompt) + self.index

    @property
    def job_class(self) -> str:
        """Of the queue: what has begun once goes before everything new."""
        return self.ask.job_class if self.attempt == 1 else CLASSES[0]

    @property
    def suspicion(self) -> int:
        return len(self.suspects)

    @property
    def deadline(self) -> float:
        return self.accepted_at + self.ask.deadline_s

    @property
    def finish(self) -> FinishReason | None:
        """Why the answer is complete, or None: the same rule by which the engine stops."""
        if self.accepted and self.accepted[-1] in self.ask.stop_ids:
            return "stop"
        return "length" if self.index >= self.ask.max_tokens else None

    @property
    def as_choice(self) -> Choice:
        return Choice(self.choice, self.attempt, list(self.accepted))

    def job(self, gateway: Incarnation, tokens_address: str, riders: list[Flight], now: float) -> Job:
        return Job(
            request_id=self.request_id,
            gateway=gateway,
            tokens_address=tokens_address,
            prompt=self.ask.prompt,
            choices=[self.as_choice, *(rider.as_choice for rider in riders)],
            sampling=self.ask.sampling,
            max_tokens=self.ask.max_tokens,
            stop_ids=self.ask.stop_ids,
            deadline_s=self.deadline - now,
            age_s=now - self.accepted_at,
            reserve_all=self.reserve_all,
            suspicion=self.suspicion,
            alone=self.alone,
        )

    def start(self, execution: str) -> None:
        self.execution = execution
        self.put_again_at = None
        self.rides = None

    def next_attempt(self, now: float) -> None:
        self.attempt += 1
        self.first_index = self.index
        self.timeline.attempts = self.attempt
        self.execution = self.prefill = self.decode = self.rides = self.settled_at = self.pending = None
        self.handed = False
        self.holders.clear()
        self.launched.clear()
        self._stage_s = {}

    def pending_s(self, state: Pending, now: float) -> float:
        """How long its entry has been with this consumer, which is noted.

        Redis tells it by a wall clock that may be stepped: what is longer than it has been in the queue at all is not believed, and we have
        looked ourselves.
        """
        if self.pending is None or self.pending[0] != state.consumer:
            self.pending = (state.consumer, now)
        told_s = state.idle_s if state.idle_s <= now - self.put_at else 0.0
        return max(told_s, now - self.pending[1])

    def drop_holder(self, worker: Incarnation) -> bool:
        """Whether the attempt is over because of it: nobody holds it any more, or its one decode is gone (an attempt has no second one,
        rule 1). A dead prefill leaves a decode that has committed undisturbed."""
        held = self.holders.pop(worker, None) is not None
        return held and (not self.holders or worker == self.decode)

    # ----------------------------------------------------------------------------------------------------- the timeline

    _stage_s: dict[str, float] = field(default_factory=dict)

    def spent(self, role: Role | None, words: Tokens, now: float) -> None:
        """A worker's own clock says how long it has been at this attempt; later words replace earlier ones. Until the first token, what was
        not prefill was waiting for it."""
        stage_s, queued_s = words.stage_s, words.queued_s
        if role != "decode" and words.tokens and words.tokens[0].index <= self.first_index:
            if self.index == self.first_index:
                self._stage("prefill_queue_s", now - self.put_at - stage_s)
            self._stage("prefill_s", stage_s)
        else:
            self._stage("decode_s", stage_s)
            self._stage("decode_queue_s", queued_s)

    def shown(self, now: float) -> None:
        """A token has reached the client's side."""
        self.timeline.total_s = now - self.accepted_at
        if self.index == 1:
            self.timeline.ttft_s = self.timeline.total_s

    def transferred(self, transfer_s: float) -> None:
        self._stage("transfer_s", transfer_s)

    def reused(self, tokens: int) -> None:
        """What a later attempt finds may be what an earlier one has computed: that is no gift to the client."""
        if self.timeline.attempts == 1:
            self.timeline.cached_tokens = max(self.timeline.cached_tokens, tokens)

    def _stage(self, name: str, seconds: float) -> None:
        before = self._stage_s.get(name, 0.0)
        if seconds > before:
            self._stage_s[name] = seconds
            setattr(self.timeline, name, getattr(self.timeline, name) + seconds - before)
