"""What carries the bytes, in UCX's own words: its report on an endpoint, through the C library that UCXX has loaded."""

from __future__ import annotations

import ctypes
import os
import re

_LANE = re.compile(r"lane\[\d+\]:\s*\d+:(\w+)/")
_ROW = re.compile(r"\|\s*(\S+?)\.\.(\S+)\s*\|\s*(.*?)\s*\|\s*([^|]+?)\s*\|")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def endpoint_report(handle: int) -> str:
    """`ucp_ep_print_info` of the endpoint; "" where the C library cannot be asked."""
    try:
        libc, ucp = ctypes.CDLL(None), ctypes.CDLL("libucp.so.0", mode=os.RTLD_NOLOAD)
    except OSError:
        return ""
    libc.open_memstream.restype = ctypes.c_void_p
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(size))
    if not stream:
        return ""
    ucp.ucp_ep_print_info(ctypes.c_void_p(handle), ctypes.c_void_p(stream))
    libc.fclose(ctypes.c_void_p(stream))
    if text.value is None:
        return ""
    words = ctypes.string_at(text.value, size.value).decode(errors="replace")
    libc.free(text)
    return words


def carriers(report: str) -> str:
    """Every transport of the endpoint's lanes ("sysv+cma"): pages of a machine go by the last of them if it can read remotely."""
    return "+".join(dict.fromkeys(_LANE.findall(report)))


def way(report: str, size: int) -> tuple[str, str]:
    """How a message of `size` bytes goes: (protocol, carrier), as ("rendezvous zero-copy read from remote", "cma"). Empty if unknown."""
    for low, high, protocol, resource in _ROW.findall(report):
        if _bytes(low) <= size <= _bytes(high):
            return protocol.removeprefix("(?) "), resource.split("/")[0]
    return "", ""


def _bytes(text: str) -> float:
    if text == "inf":
        return float("inf")
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    return int(match[1]) * _UNITS[match[2]] if match else float("nan")
