"""Computes plans with torch: packs their chunks, runs the model over the pages, draws tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from common.messages import Key
from services.engine.forward import Forward
from services.engine.launch import Launch
from services.engine.plan import Chunk, Draw, Plan, StepOutput
from services.engine.sampler import Row, draw

DEPTH = 4
"""Launches back from which a pending chunk may take its id."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A launch under way: what it draws, by position in the plan. On a CPU it is done."""

    draws: tuple[Draw | None, ...]


class Runner:
    """One model over one pool with pages of `page_tokens`. Not thread-safe: it belongs to the engine's thread."""

    def __init__(self, forward: Forward, page_tokens: int) -> None:
        self._forward = forward
        self._page_tokens = page_tokens
        self._drawn: deque[dict[Key, int]] = deque(maxlen=DEPTH)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Ticket:
        """Prompt chunks first, then one-token chunks, the longest first; logits only where a token is drawn."""
        draws: list[Draw | None] = [None] * len(plan.chunks)
        if not plan.chunks:
            return Ticket(tuple(draws))
        order = sorted(range(len(plan.chunks)), key=lambda i: (plan.chunks[i].tokens == 1, -plan.chunks[i].start))
        logits = self._forward(self.arrays([plan.chunks[i] for i in order]))
        drawing = [i for i in order if plan.chunks[i].draws]
        if drawing:
            for i, one in zip(drawing, draw(logits, [self._row(plan.chunks[i]) for i in drawing]), strict=True):
                draws[i] = one
        self._drawn.append({c.sequence.key: one.id for c, one in zip(plan.chunks, draws, strict=True) if one is not None})
        return Ticket(tuple(draws))

    def collect(self, ticket: Ticket) -> StepOutput:
        return StepOutput(ticket.draws)

    def arrays(self, chunks: list[Chunk]) -> Launch:
        """Chunks packed in this order: prompts must come first, and the longer of two one-token chunks."""
        ids: list[int] = []
        table: list[int] = []
        rows: list[tuple[int, int, int, int]] = []
        for chunk in chunks:
            rows.append((len(ids), chunk.tokens, chunk.start, len(table)))
            table += chunk.sequence.pages[: (chunk.start + chunk.tokens - 1) // self._page_tokens + 1]
            ids += self._ids(chunk)
        packed = np.asarray(rows, dtype=np.int64)
        ends = accumulate(chunk.tokens for chunk in chunks)
        return Launch(
            ids=np.asarray(ids, dtype=np.int64),
            positions=np.arange(len(ids)) + np.repeat(packed[:, 2] - packed[:, 0], packed[:, 1]),
            chunks=packed,
            table=np.asarray(table, dtype=np.int64),
            keep=np.asarray([end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.draws], dtype=np.int64),
        )

    # ---------------------------------------------------------------------------------------------------------- inside

    def _ids(self, chunk: Chunk) -> list[int]:
        if chunk.pending:
            return [self._pending(chunk)]
        return chunk.sequence.ids[chunk.start : chunk.start + chunk.tokens]

    def _pending(self, chunk: Chunk) -> int:
        """What the newest launch that drew for this sequence drew."""
        key = chunk.sequence.key
        return next(drawn[key] for drawn in reversed(self._drawn) if key in drawn)

    def _row(self, chunk: Chunk) -> Row:
        """A pending id counts as output though the sequence does not have it yet."""
        sequence = chunk.sequence
        ids = [*sequence.ids, self._pending(chunk)] if chunk.pending else sequence.ids
        return Row(sequence.sampling, sequence.key.choice, chunk.index, ids, sequence.prompt_tokens)
