"""API keys: who may use the gateway. Only digests are kept, and a shown key is compared with all of them in constant time.

An entry is `[NAME:]KEY [OPTION...]`. Where a key would stand, `sha256:` and its digest say the same, so that no file need hold a key
(`./scripts/key` makes both): keys are random, so that their plain digest gives nothing away that could be guessed. Options are
`running=N`, `requests=N`, `tokens=N` (the limits of this key) and `priority`.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import RequestError, SettingError
from gateway.limits import Allowance

MOST_KEYS = 1000
"""A shown key is compared with every one."""
MOST_FILE_BYTES = 1 << 20
LEAST_CHARACTERS = 16
KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")
"""What a bearer token may consist of (RFC 6750), so that no key needs quoting and none holds a comma or a colon."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HASH = "sha256"
DIGEST = re.compile(r"[0-9a-f]{64}")
LIMITS = ("running", "requests", "tokens")
MOST = 10**9


class Unauthorized(RequestError):
    """401: no key, or not one of ours."""

    status = 401

    def __init__(self, message: str, *, shown: bool) -> None:
        super().__init__(message, code="invalid_api_key")
        self.challenge = 'Bearer realm="baton"' + (', error="invalid_token"' if shown else "")
        """For `WWW-Authenticate`."""


@dataclass(frozen=True, slots=True)
class Given:
    """One entry. `key`: None if only its digest was given."""

    name: str
    digest: bytes
    key: str | None
    allowance: Allowance


class Keys:
    """The keys of a gateway, as digests. Several keys of one name are one client, which has them to change from one to the next."""

    def __init__(self, given: Iterable[Given]) -> None:
        entries = list(given)
        self._names = [(one.digest, one.name) for one in entries]
        self.allowances = {one.name: one.allowance for one in entries}
        """By name."""

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
        shown = digest(token.strip())
        found = None
        for known, name in self._names:
            if hmac.compare_digest(known, shown):
                found = name
        if found is None:
            raise Unauthorized("this API key is not known here", shown=True)
        return found


def read_keys(listed: str, file: str | None) -> Keys | None:
    """Keys from the settings `api_keys` and `api_keys_file`; None if neither is given. Raises SettingError, which never holds a key.

    A setting that is given and holds no key is a mistake, not a gateway for everybody.
    """
    entries = given_keys(listed, file)
    if not listed and file is None:
        return None
    if len(entries) > MOST_KEYS:
        raise SettingError(f"api_keys: {len(entries)} keys are given, at most {MOST_KEYS} are possible")
    owners: dict[bytes, str] = {}
    allowed: dict[str, Allowance] = {}
    for one in entries:
        if owners.setdefault(one.digest, one.name) != one.name:
            raise SettingError(f"api_keys: {owners[one.digest]} and {one.name} have the same key")
        if allowed.setdefault(one.name, one.allowance) != one.allowance:
            raise SettingError(f"api_keys: the keys of {one.name} are one client and need the same options")
    return Keys(entries)


def given_keys(listed: str, file: str | None) -> list[Given]:
    """Each entry, the listed ones first. Raises SettingError, which never holds a key."""
    entries = _entries(listed.split(","), "api_keys", "entry") if listed else []
    return entries + (_entries(_lines(file), "api_keys_file", "line") if file is not None else [])


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


def _entries(lines: list[str], setting: str, what: str) -> list[Given]:
    """Each that is not blank; one without a name is called by its place."""
    found = []
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{what} {place}"
        before, colon, rest = (part.strip() for part in line.rpartition(":"))
        key, *options = rest.split() or [""]
        hashed = before == HASH or before.endswith(f":{HASH}")
        name = before.removesuffix(HASH).removesuffix(":") if hashed else before
        if (name or (colon and not hashed)) and not NAME.fullmatch(name):
            raise SettingError(f"{setting}: the name in {where} must have 1 to 64 letters, digits, dots, dashes or underscores")
        one = Given(name or f"{what}-{place}", *_secret(key, setting, where, hashed=hashed), Allowance())
        found.append(replace(one, allowance=_allowance(options, setting, where)))
    if not found:
        raise SettingError(f"{setting} holds no key")
    return found


def _secret(key: str, setting: str, where: str, *, hashed: bool) -> tuple[bytes, str | None]:
    """(digest, key)."""
    if hashed:
        if not DIGEST.fullmatch(key):
            raise SettingError(f"{setting}: {HASH}: in {where} must be followed by 64 hex digits: ./scripts/key makes them")
        return bytes.fromhex(key), None
    if not KEY.fullmatch(key):
        raise SettingError(f"{setting}: the key in {where} must consist of letters, digits and . _ ~ + / = -")
    if len(key) < LEAST_CHARACTERS:
        raise SettingError(f"{setting}: the key in {where} has less than {LEAST_CHARACTERS} characters: ./scripts/key makes one")
    return digest(key), key


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _allowance(options: list[str], setting: str, where: str) -> Allowance:
    limits: dict[str, int] = {}
    for option in options:
        name, equals, number = option.partition("=")
        if name in limits:
            raise SettingError(f"{setting}: {name} is said twice in {where}")
        if name in LIMITS and equals and number.isascii() and number.isdigit() and len(number) <= 10 and 1 <= int(number) <= MOST:
            limits[name] = int(number)
        elif option != "priority":
            known = ", ".join(f"{limit}=N" for limit in LIMITS)
            raise SettingError(f"{setting}: what follows the key in {where} must be of {known} (N from 1 to {MOST}) and priority")
    return Allowance(**limits, priority="priority" in options)
