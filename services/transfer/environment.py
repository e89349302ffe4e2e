"""UCX's own settings, which must stand in the environment before its first context. What the operator has set wins."""

from __future__ import annotations

import os

DEFAULTS = {
    # Only the receiver moves bytes: it reads from the sender's pages, so a late sender cannot write anywhere.
    "UCX_RNDV_SCHEME": "get_zcopy",
    # Every page is a rendezvous, however small: an eager message would be buffered and could arrive late.
    "UCX_RNDV_THRESH": "0",
    # Shared-memory transports hide their error support; without this, error handling falls back to TCP at a twentieth of the rate.
    "UCX_MM_ERROR_HANDLING": "y",
    # A killed peer is reported after about a second.
    "UCX_KEEPALIVE_INTERVAL": "1s",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_LOG_LEVEL": "fatal",
}


def prepare() -> None:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
