"""API keys: who may use the gateway. Only digests are kept, and a shown key is compared with all of them in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from common.errors import RequestError, SettingError

MOST_KEYS = 1000
"""A shown key is compared with every one."""
MOST_FILE_BYTES = 1 << 20
LEAST_CHARACTERS = 16
KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")
"""What a bearer token may consist of (RFC 6750), so that no key needs quoting and none holds a comma or a colon."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Unauthorized(RequestError):
    """401: no key, or not one of ours."""

    status = 401

    def __init__(self, message: str, *, shown: bool) -> None:
        super().__init__(message, code="invalid_api_key")
        self.challenge = 'Bearer realm="baton"' + (', error="invalid_token"' if shown else "")
        """For `WWW-Authenticate`."""


class Keys:
    """The keys of a gateway, as digests. Several keys of one name are one client, which has them to change from one to the next."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._names = [(hashlib.sha256(key.encode()).digest(), name) for name, key in pairs]

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> list[str]:
        """Each name once."""
        return list(dict.fromkeys(name for _, name in self._names))

    def name(self, authorization: str | None) -> str:
        """Whose key an `Authorization` header shows. Raises Unauthorized; its words never repeat what was shown."""
        scheme, _, token = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("an API key is needed: send it as `Authorization: Bearer KEY`", shown=False)
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, name in self._names:
            if hmac.compare_digest(known, digest):
                found = name
        if found is None:
            raise Unauthorized("this API key is not known here", shown=True)
        return found


def read_keys(listed: str, file: str | None) -> Keys | None:
    """Keys from the settings `api_keys` and `api_keys_file`; None if neither is given. Raises SettingError, which never holds a key.

    A setting that is given and holds no key is a mistake, not a gateway for everybody.
    """
    pairs = given_keys(listed, file)
    if not listed and file is None:
        return None
    if len(pairs) > MOST_KEYS:
        raise SettingError(f"api_keys: {len(pairs)} keys are given, at most {MOST_KEYS} are possible")
    owners: dict[str, str] = {}
    for name, key in pairs:
        if owners.setdefault(key, name) != name:
            raise SettingError(f"api_keys: {owners[key]} and {name} have the same key")
    return Keys(pairs)


def given_keys(listed: str, file: str | None) -> list[tuple[str, str]]:
    """(name, key) of each, the listed ones first. Raises SettingError, which never holds a key."""
    pairs = _pairs(listed.split(","), "api_keys", "entry") if listed else []
    return pairs + (_pairs(_lines(file), "api_keys_file", "line") if file is not None else [])


def _lines(file: str) -> list[str]:
    try:
        with Path(file).open("rb") as opened:
            text = opened.read(MOST_FILE_BYTES + 1)
        if len(text) > MOST_FILE_BYTES:
            raise SettingError(f"api_keys_file is {file!r}; it is larger than {MOST_FILE_BYTES} bytes")
        return [line.partition("#")[0] for line in text.decode().splitlines()]
    except OSError as error:
        raise SettingError(f"api_keys_file is {file!r}; it cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise SettingError(f"api_keys_file is {file!r}; it is not a text") from None


def _pairs(entries: list[str], setting: str, what: str) -> list[tuple[str, str]]:
    """(name, key) of each entry that is not blank; one without a name is called by its place."""
    pairs = []
    for place, entry in enumerate((entry.strip() for entry in entries), 1):
        if not entry:
            continue
        name, colon, key = entry.rpartition(":")
        name, key = name.strip(), key.strip()
        if colon and not NAME.fullmatch(name):
            raise SettingError(f"{setting}: the name in {what} {place} must have 1 to 64 letters, digits, dots, dashes or underscores")
        if not KEY.fullmatch(key):
            raise SettingError(f"{setting}: the key in {what} {place} must consist of letters, digits and . _ ~ + / = -")
        if len(key) < LEAST_CHARACTERS:
            raise SettingError(
                f"{setting}: the key in {what} {place} has less than {LEAST_CHARACTERS} characters: `openssl rand -hex 24` makes one"
            )
        pairs.append((name or f"{what}-{place}", key))
    if not pairs:
        raise SettingError(f"{setting} holds no key")
    return pairs
