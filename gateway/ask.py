"""What the HTTP side asks of the desk, and what it gets back: the seam between OpenAI's API and the recovery machinery."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from common.errors import RequestError
from common.messages import FinishReason, Identity, Incarnation, Sampling, Token, WorkerBeat


@dataclass(frozen=True, slots=True)
class Ask:
    """A validated, tokenised request for `n` answers to one prompt."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: list[int] = field(default_factory=list)
    deadline_s: float = 600.0
    job_class: str = "interactive"
    n: int = 1


@dataclass(frozen=True, slots=True)
class Update:
    """New tokens, in order and each exactly once; the last update has `finish` or `error`."""

    tokens: list[Token]
    finish: FinishReason | None = None
    error: RequestError | None = None


@dataclass(slots=True)
class Timeline:
    """The five stages of a request in seconds, summed over its attempts, on the clocks of their owners; `other` is what remains."""

    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_queue_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0
    attempts: int = 1
    cached_tokens: int = 0
    """Tokens of the prompt that prefill did not have to compute."""

    @property
    def other_s(self) -> float:
        stages = self.prefill_queue_s + self.prefill_s + self.transfer_s + self.decode_queue_s + self.decode_s
        return self.total_s - stages

    def settled(self) -> Timeline:
        """A copy in which no stage is below zero. The prefill queue contains the first token's way to the gateway, during which the
        handoff is under way already; what is counted twice is taken from there."""
        twice = max(0.0, -self.other_s)
        return replace(self, prefill_queue_s=max(0.0, self.prefill_queue_s - twice))


class Answer(Protocol):
    """A running answer. Iterate to the end, or `cancel`: an abandoned answer must not run on."""

    timeline: Timeline

    @property
    def tokens(self) -> int:
        """The prompt's, and of the answer those that have come so far, whether or not anybody has taken them."""

    def __aiter__(self) -> AsyncIterator[Update]: ...

    def cancel(self) -> None:
        """The client is gone or has enough (a stop string): free everything. Idempotent."""


class Desk(Protocol):
    """Takes asks, and sees each through whatever workers die on the way."""

    @property
    def identity(self) -> Identity | None:
        """The fleet's model and limits; None while no worker has ever joined."""

    @property
    def draining(self) -> bool:
        """It takes no more asks."""

    @property
    def away(self) -> bool:
        """Whether Redis is: no ask is taken meanwhile."""

    @property
    def most_running(self) -> int:
        """Answers that it accepts at once."""

    def roles(self) -> dict[str, int]:
        """Live workers by role, those that drain not counted."""

    @property
    def workers(self) -> Mapping[Incarnation, WorkerBeat]:
        """The latest beat of every live worker."""

    @property
    def running(self) -> int:
        """Answers accepted and not ended."""

    @property
    def queued(self) -> int:
        """Of these, those that no worker has started yet."""

    @property
    def recoveries(self) -> int:
        """Attempts started anew since the start."""

    def submit(self, ask: Ask) -> Sequence[Answer]:
        """One answer for each choice. Raises Unavailable (a role has no live worker, Redis is away), Overloaded, or BadRequest (larger
        than the fleet allows).

        Answers that are not wanted any more must be cancelled, the last choice first: the others may depend on the first one."""


def lacking(desk: Desk) -> list[str]:
    """What an ask would be refused for now: roles without a live worker, `identity`, `gateway` while it drains, `redis`. Empty: nothing."""
    roles = desk.roles()
    missing = [] if roles.get("colocated") else [role for role in ("prefill", "decode") if not roles.get(role)]
    missing += [] if desk.identity is not None else ["identity"]
    missing += ["gateway"] if desk.draining else []
    return missing + (["redis"] if desk.away else [])
