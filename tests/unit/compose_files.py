"""Compose files read as Compose reads them: merged in order, `!reset` taken out, variables filled in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
BASE = ROOT / "docker-compose.yml"
OVERLAYS = sorted((ROOT / "compose").glob("*.yml"))
APPENDED = ("ports", "volumes", "networks", "devices", "cap_add", "cap_drop", "security_opt")
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?:(:?[-?+])([^{}]*))?\}")


class Reset:
    """A value that an overlay takes away."""


class Loader(yaml.SafeLoader):
    """YAML with Compose's own tags."""


Loader.add_constructor("!reset", lambda loader, node: Reset())


def read(path: Path) -> dict[str, Any]:
    found = yaml.load(path.read_text(), Loader)
    assert isinstance(found, dict)
    return found


def merged(*paths: Path) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for path in paths:
        whole = _merge(whole, read(path))
    return whole


def _merge(under: Any, over: Any, key: str = "") -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        keys = {k: _merge(under[k], v, k) if k in under else v for k, v in over.items()}
        return {k: v for k, v in {**under, **keys}.items() if not isinstance(v, Reset)}
    if isinstance(under, list) and isinstance(over, list) and key in APPENDED:
        return [*under, *(item for item in over if item not in under)]
    return over


def filled(value: Any, environ: dict[str, str]) -> Any:
    """With variables from `environ` and the defaults; one that is required and missing raises KeyError."""
    if isinstance(value, dict):
        return {key: filled(inner, environ) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, environ) for inner in value]
    if not isinstance(value, str):
        return value

    def put(match: re.Match[str]) -> str:
        name, kind, other = match[1], match[2] or "", match[3] or ""
        if "?" in kind and name not in environ:
            raise KeyError(f"{name}: {other}")
        return environ.get(name) or (other if "-" in kind else "")

    return VARIABLE.sub(put, value.replace("$$", "\0")).replace("\0", "$")
