"""Computes plans with torch: packs their chunks, runs the model over the pages, draws tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.messages import Key
from services.engine.attention import Batch, Segment, Step
from services.engine.model import LoadedModel
from services.engine.plan import Chunk, Draw, Plan, StepOutput
from services.engine.pool import Pool
from services.engine.sampler import Row, draw

Ints = NDArray[np.int64]

DEPTH = 4
"""Launches back from which a pending chunk may take its id."""
SMALL_PAGES = 8
"""One-token chunks of no more pages than this share a batch, whatever their lengths."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A launch under way: what it draws, by position in the plan. On a CPU it is done."""

    draws: tuple[Draw | None, ...]


class Runner:
    """One model over one pool. Not thread-safe: it belongs to the engine's thread."""

    def __init__(self, loaded: LoadedModel, pool: Pool) -> None:
        self.loaded = loaded
        self._pool = pool
        self._drawn: deque[dict[Key, int]] = deque(maxlen=DEPTH)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Ticket:
        """Prompt chunks first, then one-token chunks, the longest first; logits only where a token is drawn."""
        draws: list[Draw | None] = [None] * len(plan.chunks)
        if not plan.chunks:
            return Ticket(tuple(draws))
        order = sorted(range(len(plan.chunks)), key=lambda i: (plan.chunks[i].tokens == 1, -plan.chunks[i].start))
        chunks = [plan.chunks[i] for i in order]
        self._pool.clear([page for chunk in chunks for page in self._opened(chunk)])
        ids, positions, step = self._inputs(chunks)
        drawing = [i for i, chunk in enumerate(chunks) if chunk.draws]
        ends = list(accumulate(chunk.tokens for chunk in chunks))
        keep = self._tensor(np.asarray([ends[i] - 1 for i in drawing] or [0]))
        logits = self.loaded.module(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep, baton_step=step).logits[0]
        if drawing:
            for i, one in zip(drawing, draw(logits, [self._row(chunks[i]) for i in drawing]), strict=True):
                draws[order[i]] = one
        self._drawn.append({c.sequence.key: one.id for c, one in zip(plan.chunks, draws, strict=True) if one is not None})
        return Ticket(tuple(draws))

    def collect(self, ticket: Ticket) -> StepOutput:
        return StepOutput(ticket.draws)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _opened(self, chunk: Chunk) -> list[int]:
        """The page that this chunk writes the first token of, but not the last one: batched decode reads all of it, with weights of 0
        beyond the sequence's end, and 0 times a number that is none is none."""
        size = self._pool.layout.page_tokens
        last, filled = divmod(chunk.start + chunk.tokens, size)
        return [chunk.sequence.pages[last]] if filled and last * size >= chunk.start else []

    def _inputs(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor, Step]:
        """Packed ids and positions `[1, T]`, and where each token's KV goes."""
        size = self._pool.layout.page_tokens
        ids: list[int] = []
        positions: list[Ints] = []
        pages: list[Ints] = []
        segments: list[Segment] = []
        singles: list[Chunk] = []
        for chunk in chunks:
            end = chunk.start + chunk.tokens
            first = chunk.start // size
            own = np.asarray(chunk.sequence.pages[first : (end - 1) // size + 1], dtype=np.int64)
            where = np.arange(chunk.start, end)
            positions.append(where)
            pages.append(own[where // size - first])
            if chunk.tokens == 1:
                singles.append(chunk)
            else:
                segments.append(Segment(len(ids), chunk.tokens, chunk.start, self._behind(chunk)))
            ids += self._ids(chunk)
        where = np.concatenate(positions)
        step = Step(
            pool=self._pool,
            slots=self._tensor(self._pool.slots(np.concatenate(pages), where % size)),
            segments=tuple(segments),
            batches=self._batches(singles, len(ids) - len(singles)),
        )
        return self._tensor(np.asarray([ids], dtype=np.int64)), self._tensor(where)[None], step

    def _ids(self, chunk: Chunk) -> list[int]:
        if chunk.pending:
            return [self._pending(chunk)]
        return chunk.sequence.ids[chunk.start : chunk.start + chunk.tokens]

    def _pending(self, chunk: Chunk) -> int:
        """What the newest launch that drew for this sequence drew."""
        key = chunk.sequence.key
        return next(drawn[key] for drawn in reversed(self._drawn) if key in drawn)

    def _behind(self, chunk: Chunk) -> Tensor | None:
        """Runs of a prompt chunk's pages, its own included, if it has any context."""
        if not chunk.start:
            return None
        count = self._pool.layout.pages(chunk.start + chunk.tokens)
        return self._tensor(self._pool.runs(np.asarray(chunk.sequence.pages[:count], dtype=np.int64)))

    def _batches(self, singles: list[Chunk], first: int) -> tuple[Batch, ...]:
        """One-token chunks, the longest first and from row `first` on, in batches that padding makes at most twice as large."""
        counts = [chunk.start // self._pool.layout.page_tokens + 1 for chunk in singles]
        batches: list[Batch] = []
        begin = 0
        while begin < len(singles):
            least = counts[begin] / 2 if counts[begin] > SMALL_PAGES else 0
            end = begin + 1
            while end < len(singles) and counts[end] > least:
                end += 1
            batches.append(self._batch(singles[begin:end], counts[begin:end], first + begin))
            begin = end
        return tuple(batches)

    def _batch(self, chunks: list[Chunk], counts: list[int], first: int) -> Batch:
        size = self._pool.layout.page_tokens
        table = np.empty((len(chunks), counts[0]), dtype=np.int64)
        for row, (chunk, count) in enumerate(zip(chunks, counts, strict=True)):
            table[row, :count] = chunk.sequence.pages[:count]
            table[row, count:] = chunk.sequence.pages[count - 1]
        ends = np.asarray([chunk.start for chunk in chunks])
        mask = np.where(np.arange(counts[0] * size) > ends[:, None], np.float32("-inf"), np.float32(0))
        return Batch(
            first, len(chunks), self._tensor(self._pool.runs(table)), torch.as_tensor(mask, device=self.loaded.device)[:, None, None]
        )

    def _tensor(self, values: Ints) -> Tensor:
        return torch.as_tensor(values, device=self.loaded.device)

    def _row(self, chunk: Chunk) -> Row:
        """A pending id counts as output though the sequence does not have it yet."""
        sequence = chunk.sequence
        ids = [*sequence.ids, self._pending(chunk)] if chunk.pending else sequence.ids
        return Row(sequence.sampling, sequence.key.choice, chunk.index, ids, sequence.prompt_tokens)
