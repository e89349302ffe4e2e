"""Text to ids and ids to text: the model's tokenizer and chat template, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jinja2
from tokenizers import decoders

from common.errors import BadRequest, StartError
from common.model_files import context_tokens, eos_ids, folder, tokenizer_hash, vocabulary


def _byte_characters() -> dict[str, int]:
    """How byte-level BPE writes bytes as characters: printable Latin-1 as itself, the others from U+0100 on (GPT-2, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_characters()


class Model:
    """One served model, as the gateway knows it. Raises StartError if its files cannot be read. Usable from several threads."""

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        where = folder(path)
        self.name = name or where.name
        self.hash = tokenizer_hash(where)
        self.eos_ids = eos_ids(where)
        self.context_tokens = context_tokens(where)
        self.vocabulary = vocabulary(where)
        self._tokenizer = _load(where)
        self._backend: Any = self._tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        """Every token is a run of bytes, whatever stands beside it: text needs no window."""
        self._special = frozenset(id for id, token in self._backend.get_added_tokens_decoder().items() if token.special)
        self._longest = max(map(len, self._backend.get_vocab()))

    # -------------------------------------------------------------------------------------------------------- text to ids

    def encode(self, text: str, *, special: bool = True, param: str = "prompt") -> list[int]:
        """Ids of a text. Raises BadRequest where it cannot fit, is no text, or holds a token without a row in the model's embedding.

        Text that is too long for the context even if all of it were the longest token is refused unread. `encode_batch_fast` lets go of
        the interpreter lock, `encode` does not: with it a long prompt on a thread would stall every stream.
        """
        if len(text) > self._longest * self.context_tokens:
            raise BadRequest(
                f"the prompt has {len(text)} characters; that cannot fit into the context of {self.context_tokens} tokens",
                param=param,
                code="context_length_exceeded",
            )
        try:
            ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        except (UnicodeError, TypeError) as error:
            raise BadRequest(f"{param} is not valid Unicode text", param=param) from error
        if max(ids, default=0) >= self.vocabulary:  # tokens added to the tokenizer and not to the model
            raise BadRequest(f"{param} holds {self._backend.id_to_token(max(ids))!r}, a token that this model does not have", param=param)
        return ids

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation by the model's own template. Raises BadRequest if the template refuses it or there is none."""
        if not self._tokenizer.chat_template:
            raise BadRequest("this model has no chat template: use /v1/completions", param="messages")
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
        return self.encode(text, special=False, param="messages")

    # -------------------------------------------------------------------------------------------------------- ids to text

    def decode(self, ids: list[int]) -> str:
        """Text of ids, without special tokens."""
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def shows(self, token: int) -> bool:
        """Whether the token is part of the text: special ones are not."""
        return token not in self._special

    def raw(self, token: int) -> bytes:
        """One token's bytes by itself, special ones' names included; exact where the tokenizer is byte-level. Empty for an id without a
        token (vocabularies are padded)."""
        name: str | None = self._backend.id_to_token(token)
        if name is None:
            return b""
        if not self.byte_level or token in self._special:
            return str(self._backend.decode([token], skip_special_tokens=False)).encode()
        try:
            return bytes(BYTES[character] for character in name)
        except KeyError:
            return name.encode()


def _load(where: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise StartError(f"the tokenizer in {where} cannot be read: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise StartError(f"the tokenizer in {where} is not one of the `tokenizers` library: it needs a tokenizer.json")
    return tokenizer
