"""Key names in Redis and the timings every process agrees on: one place per fact."""

from __future__ import annotations

import secrets

BEAT_S = 0.5
"""Between two beats on any link."""
DEAD_S = 2.0
"""Silence on a link for this long is death."""
INTRODUCTION_TTL_S = 10
"""A process refreshes its introduction in Redis every BEAT_S; it vanishes this long after the last time."""
PATIENCE_S = 15.0
"""Who starts waits this long for a Redis that does not answer or whose name is not known: it may be starting too, or be restarted just
now."""
WISH_TTL_S = 60
"""A worker that has not looked by then is not there."""

CLASSES = ("resume", "priority", "interactive", "batch")
"""Classes of jobs, in the order in which prefills read them."""
GROUP = "prefill"
"""The one consumer group on every job stream; consumers are incarnations."""

REDIS_USER = "baton"
REDIS_RIGHTS = "~baton:* resetchannels +@read +@write +@connection +@transaction +time +eval -@dangerous"
"""Of the user by which a fleet uses Redis: its own keys, and no command that looks at or harms anything else."""


def incarnation() -> str:
    """A name for this start of this process, or for its next role: 16 hex digits."""
    return secrets.token_hex(8)


def stream(fleet: str, fingerprint: str, job_class: str) -> str:
    return f"baton:{fleet}:{fingerprint}:jobs:{job_class}"


def dead_letters(fleet: str) -> str:
    return f"baton:{fleet}:dead"


def identity(fleet: str) -> str:
    return f"baton:{fleet}:identity"


def introduction(fleet: str, name: str) -> str:
    return f"baton:{fleet}:peer:{name}"


def wish(fleet: str, name: str) -> str:
    """The role that an operator wants of a worker."""
    return f"baton:{fleet}:role:{name}"


def members(fleet: str) -> str:
    """Set of the incarnations that may have an introduction: so that nobody has to scan a Redis that others use too."""
    return f"baton:{fleet}:members"


def alone(fleet: str) -> str:
    """Lock held while a suspicious request runs alone."""
    return f"baton:{fleet}:alone"
