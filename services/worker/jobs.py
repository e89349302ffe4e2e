"""From a job to the engine's sequence, and what a worker refuses to run."""

from __future__ import annotations

import secrets

from msgspec.structs import replace

from common.messages import PROTOCOL, Choice, Job, Key
from services.engine.sequence import Sequence


def leader(job: Job) -> Choice:
    """The choice whose prompt is computed and handed over; the others start on its pages."""
    return job.choices[0]


def forked(job: Job, key: Key) -> list[tuple[Key, Job]]:
    """The other choices, each as an execution of its own: the leader's execution under their own names."""
    return [
        (Key(key.request_id, choice.choice, choice.attempt, key.execution), replace(job, choices=[choice])) for choice in job.choices[1:]
    ]


def claim_key(job: Job) -> Key:
    """A key with a fresh execution: every claim of a job is an execution of its own."""
    choice = leader(job)
    return Key(job.request_id, choice.choice, choice.attempt, secrets.token_hex(8))


def sequence_of(job: Job, key: Key, *, parks: bool, now: float) -> Sequence:
    """The engine's view of a job: prompt and accepted ids are one run of known ids, drawing goes on behind them. A sequence that parks
    takes no forks along: they start where it goes on."""
    choice = leader(job)
    return Sequence(
        key=key,
        ids=[*job.prompt, *choice.accepted],
        prompt_tokens=len(job.prompt),
        sampling=job.sampling,
        max_tokens=job.max_tokens,
        stop_ids=frozenset(job.stop_ids),
        order=now - job.age_s,
        parks=parks,
        reserve_all=job.reserve_all,
        suspect=job.suspicion > 0,
        alone=job.alone,
        forks=() if parks else tuple(sequence_of(own, its, parks=False, now=now) for its, own in forked(job, key)),
    )


def unfit(job: Job, max_request_tokens: int) -> str | None:
    """Why this worker cannot run the job at all, or None. The gateway should have refused it."""
    if job.protocol != PROTOCOL:
        return f"protocol {job.protocol}, this worker speaks {PROTOCOL}"
    if not job.choices:
        return "no choices"
    if not job.prompt:
        return "an empty prompt"
    if any(choice.index >= job.max_tokens for choice in job.choices):
        return "nothing left to generate"
    if len(job.prompt) + job.max_tokens > max_request_tokens:
        return f"{len(job.prompt)} + {job.max_tokens} tokens, this fleet serves {max_request_tokens}"
    return None
