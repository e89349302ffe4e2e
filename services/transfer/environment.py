"""UCX's own settings, which must stand in the environment before its first context. What the operator has set wins."""

from __future__ import annotations

import os

DEFAULTS = {
    # Only the receiver moves bytes: it reads from the sender's pages, so a late sender cannot write anywhere.
    "UCX_RNDV_SCHEME": "get_zcopy",
    # Shared-memory transports hide their error support; without this, error handling falls back to TCP at a twentieth of the rate.
    "UCX_MM_ERROR_HANDLING": "y",
    # With error handling UCX uses zero-copy reads only where a registration can be withdrawn from a failed peer, and CMA does not claim
    # that by itself: pages would be copied twice, through shared memory. A read that comes too late harms nobody here: whoever
    # reads stale bytes has been given up by then, and checksums differ.
    "UCX_CMA_MEMORY_INVALIDATE": "y",
    # The same reads between GPUs. By itself UCX takes them on some platforms only, and would copy through host memory on the others (as
    # its source has it; not measured yet).
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
    # A killed peer is reported after about a second.
    "UCX_KEEPALIVE_INTERVAL": "1s",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    # A lost peer is an event here, not a line on stderr.
    "UCX_LOG_LEVEL": "fatal",
}


def prepare() -> None:
    """Set what is not set yet."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
