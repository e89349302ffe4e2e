"""UCX's own settings, which must stand in the environment before its first context. What the operator has set wins."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

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
    # By itself UCX waits for a TCP connection on the thread that asks for it, which serves all peers: for two minutes if one is silent.
    "UCX_TCP_CONN_NB": "y",
    # A killed peer is reported after about a second.
    "UCX_KEEPALIVE_INTERVAL": "1s",
    # UCX would remember which memory is a GPU's by watching who allocates; torch has by then. UCXX sets this too, after UCX has read it.
    "UCX_MEMTYPE_CACHE": "n",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    # A lost peer is an event here, not a line on stderr.
    "UCX_LOG_LEVEL": "fatal",
}

BRIDGES, DEVICES = "UCX_TCP_BRIDGE_ENABLE", "UCX_NET_DEVICES"
SIOCGIFADDR = 0x8915


def prepare() -> None:
    """Set what is not set yet."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def follow(host: str) -> None:
    """Let pages go by TCP over the bridge that has this IPv4 address, if one has; before the first context.

    UCX leaves bridges out, because those of containers often have the same address on every host. So all others stay out.
    """
    bridges = _bridges()
    others = sorted(name for name, address in bridges.items() if address != host)
    if len(others) == len(bridges) or BRIDGES in os.environ:
        return
    os.environ[BRIDGES] = "y"
    if others and os.environ.get(DEVICES, "all") == "all":
        os.environ[DEVICES] = "^" + ",".join(others)


def _bridges() -> dict[str, str]:
    """This machine's bridges with their IPv4 addresses, "" where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        names = [name for _, name in socket.if_nameindex() if os.path.isdir(f"/sys/class/net/{name}/bridge")]
        return {name: _address(probe, name) for name in names}


def _address(probe: socket.socket, name: str) -> str:
    try:
        answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("40s", name.encode()))
    except OSError:
        return ""
    return socket.inet_ntoa(answer[20:24])
