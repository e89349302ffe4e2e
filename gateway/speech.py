"""An answer's tokens to pieces of text, with stop strings, logprobs and the reason it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from common.errors import RequestError
from common.messages import FinishReason, Token
from gateway.ask import Answer, Ask, Timeline
from gateway.text import Stops, Tokenizer, detokenizer


class Broken(RequestError):
    """500: the fault is ours."""

    status = 500
    type = "server_error"


@dataclass(frozen=True, slots=True)
class Spoken:
    """One token, and the position in the answer's text (characters) at which its own text begins."""

    token: Token
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that can be shown now, and the tokens it begins or completes. The last piece has `finish`."""

    text: str
    tokens: list[Spoken] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass(slots=True)
class Usage:
    """Counts of one answer."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's: their KV was there already."""


class Speech:
    """One answer on its way to one client. Take its pieces to the end, or cancel it."""

    def __init__(self, answer: Answer, ask: Ask, stops: list[str], tokenizer: Tokenizer, *, before: str = "") -> None:
        self._answer = answer
        self._stops = Stops(stops)
        self._text = detokenizer(tokenizer)
        self._stop_ids = frozenset(ask.stop_ids)
        self._before = before
        """Text that comes before the answer's own."""
        self._waiting: deque[Spoken] = deque()
        """Tokens of which no text has been shown yet."""
        self._decoded = 0
        self._shown = 0
        """Characters, without and with what the stop strings hold back."""
        self.usage = Usage(len(ask.prompt))
        self.finish: FinishReason | None = None

    @property
    def timeline(self) -> Timeline:
        return self._answer.timeline

    @property
    def computed_tokens(self) -> int:
        """Of the answer, whether or not the client has taken them; `usage` counts those that it was given."""
        return self._answer.tokens - self.usage.prompt_tokens

    def cancel(self) -> None:
        self._answer.cancel()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Raises the RequestError with which the answer failed."""
        try:
            async for update in self._answer:
                if update.error is not None:
                    raise update.error
                piece = self._piece(update.tokens, update.finish)
                self.finish = piece.finish
                if self._before:
                    piece, self._before = replace(piece, text=self._before + piece.text), ""
                if piece.finish is not None:
                    self._answer.cancel()
                if piece.text or piece.tokens or piece.finish is not None:
                    yield piece
                if piece.finish is not None:
                    return
            raise Broken("the answer ended without a reason")
        finally:
            self._answer.cancel()

    def _piece(self, tokens: list[Token], finish: FinishReason | None) -> Piece:
        shown = ""
        for token in tokens:
            self.usage.completion_tokens += 1
            if token.id in self._stop_ids:
                continue
            self._waiting.append(Spoken(token, self._decoded))
            text = self._text.add(token.id)
            self._decoded += len(text)
            shown += self._stops.add(text)
            if self._stops.hit:
                return self._cut(shown)
        if finish is None:
            return Piece(shown, self._begun(len(shown)))
        shown += self._stops.add(self._text.end())
        if self._stops.hit:
            return self._cut(shown)
        said, self._waiting = list(self._waiting), deque()
        return Piece(shown + self._stops.end(), said, finish)

    def _cut(self, shown: str) -> Piece:
        """The last piece before a stop string."""
        return Piece(shown, self._begun(len(shown)), "stop")

    def _begun(self, characters: int) -> list[Spoken]:
        """The tokens whose text begins in what is shown, now that these characters more are."""
        self._shown += characters
        said = []
        while self._waiting and self._waiting[0].offset < self._shown:
            said.append(self._waiting.popleft())
        return said
