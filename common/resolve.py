"""Settings whose value only the running machine knows: its own address, and a password that stands in a file."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from common import names
from common.errors import SettingError, StartError
from common.logs import get_logger
from common.settings import CommonSettings

log = get_logger(__name__)

AUTO = "auto"
LOOPBACK = "127.0.0.1"
REDIS_PORT = 6379

S = TypeVar("S", bound=CommonSettings)


class NoWayError(StartError):
    """Redis' name is not known, or no network leads there: this may pass, as where containers and their names come up together."""


async def settled(settings: S) -> S:
    """`resolved`, waiting `PATIENCE_S` for a way to Redis. Raises SettingError and StartError."""
    give_up = time.monotonic() + names.PATIENCE_S
    said = False
    while True:
        try:
            return await asyncio.to_thread(resolved, settings)
        except NoWayError as error:
            if time.monotonic() >= give_up:
                raise
            if not said:
                log.warning("no way leads to Redis: waiting for one", reason=error, wait_s=names.PATIENCE_S)
                said = True
        await asyncio.sleep(names.BEAT_S)


def resolved(settings: S) -> S:
    """The settings with `host` and `redis_url` as they are to be used. Raises SettingError and StartError."""
    url = settings.redis_url
    if settings.redis_password_file is not None:
        url = with_password(url, _read(settings.redis_password_file))
    host = own_address(url) if settings.host == AUTO else settings.host
    return replace(settings, redis_url=url, host=host)


def with_password(url: str, password: str) -> str:
    """The URL with this password, of the user it names or of the default one. Raises SettingError if it has another already."""
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss"):
        raise SettingError("redis_password_file goes with a redis_url like redis://host:6379/0")
    if parts.password is not None:
        raise SettingError("redis_password_file is set and redis_url holds a password: leave one out")
    user, at, place = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user if at else ''}:{quote(password, safe='')}@{place}"))


def own_address(url: str) -> str:
    """The IPv4 address from which this machine reaches Redis: the one on the network it shares with its peers. Sends nothing.

    Raises StartError for a URL that cannot be read, NoWayError for a name that is not known (yet).
    """
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix" or not parts.hostname:
            return LOOPBACK
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or REDIS_PORT))
            address: str = probe.getsockname()[0]
            return address
    except ValueError as error:
        raise StartError(f"host is auto, and redis_url cannot be read: {error}") from error
    except OSError as error:
        raise NoWayError(f"host is auto, but no way leads to Redis: {error}") from error


def _read(path: str) -> str:
    try:
        password = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"redis_password_file is {path!r}; it cannot be read: {error}") from error
    if not password:
        raise SettingError(f"redis_password_file is {path!r}; it is empty")
    return password
