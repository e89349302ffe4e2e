"""From a job to the engine's sequence, and what a worker refuses to run."""

from __future__ import annotations

import secrets

from common.messages import PROTOCOL, Choice, Job, Key
from services.engine.sequence import Sequence


def live_choice(job: Job) -> Choice:
    """The one live choice: n > 1 is not served yet, and the gateway refuses it."""
    return job.choices[0]


def claim_key(job: Job) -> Key:
    """A key with a fresh execution: every claim of a job is an execution of its own."""
    choice = live_choice(job)
    return Key(job.request_id, choice.choice, choice.attempt, secrets.token_hex(8))


def sequence_of(job: Job, key: Key, *, parks: bool, now: float) -> Sequence:
    """The engine's view of a job: prompt and accepted ids are one run of known ids, drawing goes on behind them."""
    choice = live_choice(job)
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
        alone=job.alone,
    )


def unfit(job: Job, max_request_tokens: int) -> str | None:
    """Why this worker cannot run the job at all, or None. The gateway should have refused it."""
    if job.protocol != PROTOCOL:
        return f"protocol {job.protocol}, this worker speaks {PROTOCOL}"
    if len(job.choices) != 1:
        return f"{len(job.choices)} live choices, this worker runs one"
    if not job.prompt:
        return "an empty prompt"
    if live_choice(job).index >= job.max_tokens:
        return "nothing left to generate"
    if len(job.prompt) + job.max_tokens > max_request_tokens:
        return f"{len(job.prompt)} + {job.max_tokens} tokens, this fleet serves {max_request_tokens}"
    return None
