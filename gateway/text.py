"""Ids to text while they come: never half a character, never a word that a stop string would have ended."""

from __future__ import annotations

from gateway.prompts import Tokenizer

HALF = "\ufffd"
"""What a tokenizer shows for bytes that are no character (yet)."""
WINDOW = 8
"""An incomplete character ends within this many further tokens, or it never does."""


class Detokenizer:
    """Text of a growing list of ids. Decodes only a window: the ids since the last whole character, and a few before them, because
    tokenizers strip or add spaces at the start of a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0
        """Start of the window."""
        self._shown = 0
        """Ids whose text has been given out."""

    def add(self, ids: list[int]) -> str:
        """The text that these ids complete, possibly none."""
        fresh = ""
        for token in ids:
            self._ids.append(token)
            fresh += self._next(final=False)
        return fresh

    def end(self) -> str:
        """The text still held back; bytes that stayed incomplete appear as U+FFFD."""
        return self._next(final=True)

    def _next(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._context : self._shown])
        after = self._tokenizer.decode(self._ids[self._context :])
        waiting = len(self._ids) - self._shown
        if len(after) <= len(before) and not final:
            return ""
        if after.endswith(HALF) and not final and waiting < WINDOW:
            return ""
        self._context = self._shown
        self._shown = len(self._ids)
        return after[len(before) :]


class Stops:
    """Holds back what may still become a stop string; cuts at the first one."""

    def __init__(self, strings: list[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""
        self.hit = False

    def add(self, text: str) -> str:
        """The part of the text so far that can be shown now. After a hit: nothing any more."""
        if self.hit:
            return ""
        self._held += text
        found = [at for at in (self._held.find(string) for string in self._strings) if at >= 0]
        if found:
            self.hit = True
            shown, self._held = self._held[: min(found)], ""
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
