"""From settings to who may use the gateway: keys with their limits, and the origins of web pages."""

from __future__ import annotations

from urllib.parse import urlsplit

from common.errors import SettingError
from common.settings import GatewaySettings
from gateway.gate import Access
from gateway.keys import read_keys
from gateway.limits import Meters


def access_of(settings: GatewaySettings) -> Access | None:
    """None without keys. Raises SettingError."""
    keys = read_keys(settings.api_keys, settings.api_keys_file)
    if keys is not None:
        limits = (settings.key_running, settings.key_requests_per_minute, settings.key_tokens_per_minute)
        return Access(keys, Meters(keys.names, *limits, keys.allowances))
    for name in ("key_running", "key_requests_per_minute", "key_tokens_per_minute"):
        if getattr(settings, name) is not None:
            raise SettingError(f"{name} is set, but there are no keys: set api_keys or api_keys_file")
    return None


def origins_of(listed: str) -> list[str]:
    """Raises SettingError for what no browser would ever send as `Origin`."""
    origins = [origin for origin in (part.strip() for part in listed.split(",")) if origin]
    for origin in origins:
        if origin != "*" and not _is_origin(origin):
            raise SettingError(
                f"cors_origins holds {origin!r}; an origin is like https://chat.example.org or http://localhost:3000, or * for all"
            )
    return origins


def _is_origin(text: str) -> bool:
    """Scheme, host and port only, in the lower case of browsers (RFC 6454)."""
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        return False
    return named and parts.scheme in ("http", "https") and text == f"{parts.scheme}://{parts.netloc}".lower()
