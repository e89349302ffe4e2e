"""Ids to text while they come: never half a character, never a word that a stop string would have ended."""

from __future__ import annotations

import codecs
from typing import Protocol

HALF = "\ufffd"
"""What a tokenizer shows for bytes that are no character (yet)."""
WINDOW = 16
"""An incomplete character ends within this many further tokens, or it never does."""


class Tokenizer(Protocol):
    """The part of a model that turning ids into text needs."""

    byte_level: bool

    def decode(self, ids: list[int]) -> str: ...

    def raw(self, token: int) -> bytes: ...

    def shows(self, token: int) -> bool: ...


class Detokenizer(Protocol):
    """Text of a growing list of ids."""

    def add(self, token: int) -> str:
        """The text that this id completes, possibly none."""

    def end(self) -> str:
        """The text still held back; bytes that stayed incomplete appear as U+FFFD."""


def detokenizer(tokenizer: Tokenizer) -> Detokenizer:
    return ByteText(tokenizer) if tokenizer.byte_level else WindowText(tokenizer)


class ByteText:
    """For byte-level BPE, where a token's bytes do not depend on its neighbours: exactly the tokenizer's own text, by a look-up a token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.raw(token)) if self._tokenizer.shows(token) else ""

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowText:
    """For every other tokenizer (SentencePiece's, say). Decodes only a window: the ids since the last whole character, and those of the
    piece before them, because tokenizers strip or add spaces at the start of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        """Ids at the start of the window whose text has been given out."""

    def add(self, token: int) -> str:
        if not self._tokenizer.shows(token):
            return ""
        self._ids.append(token)
        return self._next(final=False)

    def end(self) -> str:
        return self._next(final=True)

    def _next(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        after = self._tokenizer.decode(self._ids)
        if not final and len(self._ids) - self._shown < WINDOW and (len(after) <= len(before) or after.endswith(HALF)):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return after[len(before) :]


class Stops:
    """Holds back what may still become a stop string; cuts before the one that is complete first, whatever pieces the text comes in."""

    def __init__(self, strings: list[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.hit = False

    def add(self, text: str) -> str:
        """The part of the text so far that can be shown now. After a hit: nothing any more."""
        if self.hit:
            return ""
        self._held += text
        found = [(at + len(string), at) for string in self._strings if (at := self._held.find(string)) >= 0]
        if found:
            self.hit = True
            _, start = min(found)
            shown, self._held = self._held[:start], ""
            return shown
        keep = max((self._overlap(string) for string in self._strings), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def end(self) -> str:
        """What was held back in vain."""
        held, self._held = self._held, ""
        return held

    def _overlap(self, string: str) -> int:
        """Length of the longest end of the held text that begins the stop string."""
        for length in range(min(len(string) - 1, len(self._held)), 0, -1):
            if self._held.endswith(string[:length]):
                return length
        return 0
