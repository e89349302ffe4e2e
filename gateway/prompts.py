"""Text to ids: the model's tokenizer and chat template, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from common.errors import BadRequest, StartError
from common.model_files import context_tokens, eos_ids, folder, tokenizer_hash, vocabulary

MOST_BYTES_A_TOKEN = 16
"""Text longer than this many bytes per token of the context is refused unread: real text has three to five."""


class Tokenizer(Protocol):
    """The part of a tokenizer that turning ids into text needs."""

    def decode(self, ids: list[int]) -> str: ...


class Model:
    """One served model, as the gateway knows it. Raises StartError if its files cannot be read."""

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        from transformers import AutoTokenizer

        where = folder(path)
        self.name = name or where.name
        self.hash = tokenizer_hash(where)
        self.eos_ids = eos_ids(where)
        self.context_tokens = context_tokens(where)
        self.vocabulary = vocabulary(where)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(where)
        except (OSError, ValueError) as error:
            raise StartError(f"the tokenizer in {where} cannot be read: {error}") from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text. Raises BadRequest where it cannot fit or is no text."""
        if len(text) > MOST_BYTES_A_TOKEN * self.context_tokens:
            raise BadRequest(
                f"the prompt has {len(text)} characters; that cannot fit into the context of {self.context_tokens} tokens",
                param="prompt",
                code="context_length_exceeded",
            )
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special)
        except (UnicodeError, TypeError) as error:
            raise BadRequest("the prompt is not valid Unicode text", param="prompt") from error
        return ids

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation by the model's own template. Raises BadRequest if the template refuses it or there is none."""
        if not self._tokenizer.chat_template:
            raise BadRequest("this model has no chat template: use /v1/completions", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
        return self.encode(text, special=False)

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def piece(self, token: int) -> str:
        """One token's text by itself, special ones included; incomplete characters appear as U+FFFD."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
