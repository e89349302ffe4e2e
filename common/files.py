"""How many files this process may open: each connection is one, and a socket of ZeroMQ's or a UCX endpoint a few."""

from __future__ import annotations

import resource

MOST_FILES = 65_536
"""More than any process here needs; without a limit, whatever counts what it may open would count for ever."""


def allow_files(wanted: int = MOST_FILES) -> int:
    """Raise this process' own limit to `wanted`, as far as the system lets it, and give how many of these it may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # a system whose own bound (fs.nr_open) is below the hard limit
        return soft
    return allowed
