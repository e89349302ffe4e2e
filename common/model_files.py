"""What can be read off a model's folder without torch: tokenizer hash, end-of-answer ids, context, fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from common.errors import StartError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
SLICES = 16
SLICE_BYTES = 4096


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise StartError(f"{path} is no JSON object")
    return found


def folder(path: str | Path) -> Path:
    """The model's folder. Raises StartError if it is none."""
    where = Path(path)
    if not str(path) or not (where / "config.json").is_file():
        raise StartError(f"model is {str(path)!r}: no folder with a config.json")
    return where


def tokenizer_hash(path: str | Path) -> str:
    """Of every file that turns text into ids and messages into text."""
    digest = hashlib.blake2b(digest_size=16)
    for name in TOKENIZER_FILES:
        file = folder(path) / name
        if file.is_file():
            digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def eos_ids(path: str | Path) -> list[int]:
    """Ids that end an answer: the generation configuration's, else the model's."""
    for name in ("generation_config.json", "config.json"):
        file = folder(path) / name
        if file.is_file():
            found = _json(file).get("eos_token_id")
            if found is not None:
                return list(found) if isinstance(found, list) else [int(found)]
    return []


def context_tokens(path: str | Path) -> int:
    """Prompt and answer together, as the model was made for."""
    return _number(path, "max_position_embeddings")


def vocabulary(path: str | Path) -> int:
    """Ids the model knows, padding included."""
    return _number(path, "vocab_size")


def _number(path: str | Path, name: str) -> int:
    file = folder(path) / "config.json"
    found = _json(file).get(name)
    if type(found) is not int:
        raise StartError(f"{file} has no {name}")
    return found


def fingerprint(path: str | Path, dtype: str, page_tokens: int) -> str:
    """Names a model, its number format and its pages: workers with equal ones can exchange KV.

    Over the configuration, the tokenizer, and of each weights file its size, its header and SLICES samples of its content: a full hash
    of a large model would take minutes at every start.
    """
    where = folder(path)
    digest = hashlib.blake2b(f"{dtype} {page_tokens} {tokenizer_hash(where)}".encode(), digest_size=16)
    digest.update((where / "config.json").read_bytes())
    for file in sorted(where.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            header = int.from_bytes(content.read(8), "little")
            digest.update(content.read(min(header, 64 << 20)))
            for part in range(SLICES):
                content.seek(max(0, size - SLICE_BYTES) * part // (SLICES - 1))
                digest.update(content.read(SLICE_BYTES))
    return digest.hexdigest()
