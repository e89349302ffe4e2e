"""Computes plans with torch: packs their chunks, runs the model over the pages, draws tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.engine.forward import Forward
from services.engine.launch import Ints, Launch
from services.engine.plan import Chunk, Draw, Plan, StepOutput
from services.engine.sampler import Row, draw
from services.engine.sequence import Sequence

DEPTH = 4
"""Launches back from which a pending chunk may take its id."""
LONGEST = 1 << 40
"""More tokens than any sequence has: what puts one-token chunks behind prompts."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A launch under way: what it draws, by position in the plan. On a CPU it is done; on a GPU it is when `done` has come."""

    draws: tuple[Draw | None, ...]
    done: torch.cuda.Event | None = None


class Runner:
    """One model over one pool with pages of `page_tokens`. Not thread-safe: it belongs to the engine's thread."""

    depth = 1
    """Launches that are worth having under way at a time."""

    def __init__(self, forward: Forward, page_tokens: int) -> None:
        self._forward = forward
        self._page_tokens = page_tokens
        self._drawn: deque[tuple[Plan, tuple[Draw | None, ...]]] = deque(maxlen=DEPTH)
        """What the newest launches drew, the newest first."""
        self._ids: dict[Sequence, int] | None = None
        """The ids among them, by sequence: made when the first pending chunk asks."""
        self._tables: dict[Sequence, tuple[list[int], Ints]] = {}
        """Page ids of the last launch's sequences: the list, and the array made of it. Making them anew at each step would cost more than
        all else that is done here."""

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Ticket:
        """Prompt chunks first, then one-token chunks, the longest first; logits only where a token is drawn."""
        if not plan.chunks:
            return Ticket(())
        order = self.order(plan)
        logits = self._forward(self.arrays([plan.chunks[i] for i in order]))
        draws = self.draws(plan, order, logits)
        self._drawn.appendleft((plan, draws))
        self._ids = None
        return Ticket(draws, mark(logits.device))

    def collect(self, ticket: Ticket) -> StepOutput:
        """Waits: the pages of a collected launch may be sent, and whoever sends them knows nothing of streams."""
        if ticket.done is not None:
            ticket.done.synchronize()
        return StepOutput(ticket.draws)

    @staticmethod
    def order(plan: Plan) -> list[int]:
        """In which the plan's chunks are packed."""
        keys = [LONGEST - chunk.start if chunk.tokens == 1 else -chunk.start for chunk in plan.chunks]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def draws(self, plan: Plan, order: list[int], logits: Tensor) -> tuple[Draw | None, ...]:
        """What the plan draws, by position in it, from logits in the order in which it was packed."""
        chunks = plan.chunks
        draws: list[Draw | None] = [None] * len(chunks)
        drawing = [i for i in order if chunks[i].draws]
        if drawing:
            for i, one in zip(drawing, draw(logits, self._rows([chunks[i] for i in drawing])), strict=True):
                draws[i] = one
        return tuple(draws)

    def arrays(self, chunks: list[Chunk]) -> Launch:
        """Chunks packed in this order: prompts must come first, and the longer of two one-token chunks."""
        ids: list[int] = []
        for chunk in chunks:
            if chunk.pending:
                ids.append(self._pending(chunk))
            elif chunk.tokens == 1:
                ids.append(chunk.sequence.ids[chunk.start])
            else:
                ids += chunk.sequence.ids[chunk.start : chunk.start + chunk.tokens]
        tables = self._paged(chunks)
        tokens = np.asarray([chunk.tokens for chunk in chunks], dtype=np.int64)
        start = np.asarray([chunk.start for chunk in chunks], dtype=np.int64)
        ends = tokens.cumsum()
        pages = np.asarray([len(table) for table in tables])
        return Launch(
            ids=np.asarray(ids, dtype=np.int64),
            positions=np.arange(len(ids)) + np.repeat(start - ends + tokens, tokens),
            chunks=np.stack((ends - tokens, tokens, start, pages.cumsum() - pages), 1),
            table=np.concatenate(tables),
            keep=ends[[chunk.draws for chunk in chunks]] - 1,
        )

    # ---------------------------------------------------------------------------------------------------------- inside

    def _paged(self, chunks: list[Chunk]) -> list[Ints]:
        """Page ids of each chunk's sequence. An array is as good as new while the sequence has the same list of pages, which only grows."""
        before, self._tables = self._tables, {}
        for chunk in chunks:
            sequence = chunk.sequence
            pages = sequence.pages
            kept = before.get(sequence)
            if kept is None or kept[0] is not pages or len(pages) != len(kept[1]):
                kept = pages, np.asarray(pages, dtype=np.int64)
            self._tables[sequence] = kept
        return [table for _, table in self._tables.values()]

    def _pending(self, chunk: Chunk) -> int:
        """What the newest launch that drew for this sequence drew."""
        if self._ids is None:
            self._ids = {}
            for plan, draws in reversed(self._drawn):
                self._ids.update((c.sequence, one.id) for c, one in zip(plan.chunks, draws, strict=True) if one is not None)
        return self._ids[chunk.sequence]

    def _rows(self, chunks: list[Chunk]) -> list[Row]:
        """A pending id counts as output though the sequence does not have it yet."""
        return [
            Row(
                (sequence := chunk.sequence).sampling,
                sequence.key.choice,
                chunk.index,
                [*sequence.ids, self._pending(chunk)] if chunk.pending else sequence.ids,
                sequence.prompt_tokens,
            )
            for chunk in chunks
        ]


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Comes when everything that has been launched on a GPU so far is done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
