"""Computes plans with torch: packs their chunks, runs the model over the pages, draws tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.messages import Key
from services.engine.attention import Segment, Step
from services.engine.model import LoadedModel
from services.engine.plan import Chunk, Draw, Plan, StepOutput
from services.engine.pool import Pool
from services.engine.sampler import Row, draw


@dataclass(frozen=True, slots=True)
class Ticket:
    """A launch under way: what it draws, by position in the plan. On a CPU it is done."""

    draws: tuple[Draw | None, ...]


class Runner:
    """One model over one pool. Not thread-safe: it belongs to the engine's thread."""

    def __init__(self, loaded: LoadedModel, pool: Pool) -> None:
        self._model = loaded.module
        self._device = loaded.device
        self._pool = pool
        self._latest: dict[Key, int] = {}

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Ticket:
        """Prompt chunks first, then one-token chunks; logits only where a token is drawn."""
        order = sorted(range(len(plan.chunks)), key=lambda i: plan.chunks[i].tokens == 1)
        chunks = [plan.chunks[i] for i in order]
        ids, positions, step = self._inputs(chunks)
        ends = np.cumsum([chunk.tokens for chunk in chunks]) - 1
        drawing = [i for i, chunk in enumerate(chunks) if chunk.draws]
        keep = torch.as_tensor(ends[drawing] if drawing else ends[-1:], device=self._device)
        logits = self._model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep, baton_step=step).logits[0]
        draws: list[Draw | None] = [None] * len(chunks)
        if drawing:
            drawn = draw(logits, [self._row(chunks[i]) for i in drawing])
            for i, one in zip(drawing, drawn, strict=True):
                draws[order[i]] = one
        self._latest = {chunks[i].sequence.key: one.id for i, one in zip(drawing, drawn, strict=True)} if drawing else {}
        return Ticket(tuple(draws))

    def collect(self, ticket: Ticket) -> StepOutput:
        return StepOutput(ticket.draws)

    # ---------------------------------------------------------------------------------------------------------- inside

    def _inputs(self, chunks: list[Chunk]) -> tuple[Tensor, Tensor, Step]:
        """Packed ids and positions `[1, T]`, and where each token's KV goes."""
        size = self._pool.layout.page_tokens
        ids: list[int] = []
        positions: list[np.ndarray] = []
        pages: list[np.ndarray] = []
        segments: list[Segment] = []
        singles: list[Chunk] = []
        for chunk in chunks:
            where = np.arange(chunk.start, chunk.start + chunk.tokens)
            own = np.asarray(chunk.sequence.pages)
            positions.append(where)
            pages.append(own[where // size])
            if chunk.tokens == 1:
                singles.append(chunk)
            else:
                used = own[: -(-(chunk.start + chunk.tokens) // size)]
                segments.append(Segment(len(ids), chunk.tokens, chunk.start, self._tensor(used)))
            ids += self._ids(chunk)
        where = np.concatenate(positions)
        table, beyond = self._table(singles, size)
        step = Step(
            pool=self._pool,
            pages=self._tensor(np.concatenate(pages)),
            offsets=self._tensor(where % size),
            segments=tuple(segments),
            singles=len(singles),
            table=table,
            beyond=beyond,
        )
        return torch.tensor([ids], device=self._device), self._tensor(where)[None], step

    def _ids(self, chunk: Chunk) -> list[int]:
        if chunk.pending:
            return [self._latest[chunk.sequence.key]]
        return chunk.sequence.ids[chunk.start : chunk.start + chunk.tokens]

    def _table(self, singles: list[Chunk], size: int) -> tuple[Tensor, Tensor]:
        """Pages `[B, n]` of the one-token chunks, and which of their `n * size` positions lie beyond each."""
        counts = [chunk.start // size + 1 for chunk in singles]
        table = np.zeros((len(singles), max(counts, default=0)), dtype=np.int64)
        for row, (chunk, count) in enumerate(zip(singles, counts, strict=True)):
            table[row, :count] = chunk.sequence.pages[:count]
        ends = np.asarray([chunk.start for chunk in singles])
        beyond = np.arange(table.shape[1] * size)[None] > ends[:, None]
        return self._tensor(table), torch.as_tensor(beyond, device=self._device)[:, None, None]

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values.astype(np.int64, copy=False), device=self._device)

    @staticmethod
    def _row(chunk: Chunk) -> Row:
        sequence = chunk.sequence
        return Row(sequence.sampling, sequence.key.choice, chunk.index, sequence.ids, sequence.prompt_tokens)
