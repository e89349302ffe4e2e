"""All answers of one request, spoken at once: their pieces as they come, each with the number of its choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from gateway.ask import Timeline
from gateway.speech import Piece, Speech, Usage


class Chorus:
    """The choices of a request, those of one prompt beside each other. Take the pieces to the end, or cancel it."""

    def __init__(self, speeches: list[Speech], choices_per_prompt: int) -> None:
        self.speeches = speeches
        self._n = choices_per_prompt

    @property
    def timeline(self) -> Timeline:
        """The first choice's: it leads the others through prefill and transfer."""
        return self.speeches[0].timeline

    @property
    def usage(self) -> Usage:
        """Each prompt is counted once, however many answers it gets."""
        cached = sum(speech.timeline.cached_tokens for speech in self._leading)
        return Usage(self._prompt_tokens, sum(speech.usage.completion_tokens for speech in self.speeches), cached)

    @property
    def computed_tokens(self) -> int:
        """Prompts and answers as far as the fleet has come: what a client does not take has cost no less."""
        return self._prompt_tokens + sum(speech.computed_tokens for speech in self.speeches)

    @property
    def _leading(self) -> list[Speech]:
        """The first answer to each prompt."""
        return self.speeches[:: self._n]

    @property
    def _prompt_tokens(self) -> int:
        return sum(speech.usage.prompt_tokens for speech in self._leading)

    def leads(self, choice: int) -> bool:
        """Whether this is the first answer to its prompt."""
        return choice % self._n == 0

    def cancel(self) -> None:
        """The last one first: the others may travel with the first one."""
        for speech in reversed(self.speeches):
            speech.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(choice, piece). Raises the RequestError with which the first of them failed."""
        if len(self.speeches) == 1:
            async with aclosing(self.speeches[0].pieces()) as pieces:
                async for piece in pieces:
                    yield 0, piece
            return
        # Bounded: a client that does not read holds its own answers up, and nobody's memory.
        said: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(len(self.speeches))
        telling = [asyncio.create_task(_tell(index, speech, said)) for index, speech in enumerate(self.speeches)]
        try:
            silent = 0
            while silent < len(telling):
                word = await said.get()
                if isinstance(word, Exception):
                    raise word
                if word is None:
                    silent += 1
                else:
                    yield word
        finally:
            self.cancel()  # before the tasks, which would cancel the first one first
            for task in telling:
                task.cancel()
            await asyncio.gather(*telling, return_exceptions=True)


async def _tell(index: int, speech: Speech, said: asyncio.Queue[tuple[int, Piece] | Exception | None]) -> None:
    try:
        async with aclosing(speech.pieces()) as pieces:
            async for piece in pieces:
                await said.put((index, piece))
    except Exception as error:
        await said.put(error)
    else:
        await said.put(None)
