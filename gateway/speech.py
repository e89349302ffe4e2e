"""An answer's tokens to pieces of text, with stop strings, logprobs and the reason it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from common.errors import RequestError
from common.messages import FinishReason, Token
from gateway.ask import Answer, Timeline
from gateway.parameters import Wish
from gateway.prompts import Model
from gateway.text import Detokenizer, Stops


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that can be shown now, and the tokens taken since the last piece. The last piece has `finish`."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass(slots=True)
class Usage:
    """Counts of one answer."""

    prompt_tokens: int
    completion_tokens: int = 0


class Speech:
    """One answer on its way to one client. Iterate to the end; leaving early cancels the answer."""

    def __init__(self, answer: Answer, wish: Wish, model: Model) -> None:
        self._answer = answer
        self._stops = Stops(wish.stops)
        self._text = Detokenizer(model)
        self._stop_ids = frozenset(wish.ask.stop_ids)
        self.usage = Usage(len(wish.ask.prompt))

    @property
    def timeline(self) -> Timeline:
        return self._answer.timeline

    def cancel(self) -> None:
        self._answer.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises the RequestError with which the answer failed."""
        try:
            async for update in self._answer:
                if update.error is not None:
                    raise update.error
                piece = self._piece(update.tokens, update.finish)
                if piece is not None:
                    yield piece
                    if piece.finish is not None:
                        return
            raise RequestError("the answer ended without a reason")
        finally:
            self._answer.cancel()

    def _piece(self, tokens: list[Token], finish: FinishReason | None) -> Piece | None:
        shown = ""
        taken: list[Token] = []
        for token in tokens:
            taken.append(token)
            self.usage.completion_tokens += 1
            if token.id not in self._stop_ids:
                shown += self._stops.add(self._text.add([token.id]))
            if self._stops.hit:
                return Piece(shown, taken, "stop")
        if finish is not None:
            shown += self._stops.add(self._text.end())
            if self._stops.hit:
                return Piece(shown, taken, "stop")
            return Piece(shown + self._stops.end(), taken, finish)
        return Piece(shown, taken) if shown or taken else None
