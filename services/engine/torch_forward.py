"""A launch through the model as transformers has it, with this engine's attention: every supported model, every device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from services.engine.attention import Batch, Segment, Step
from services.engine.launch import Ints, Launch
from services.engine.model import LoadedModel, body_of
from services.engine.pool import Pool

SMALL_PAGES = 8
"""One-token chunks of no more pages than this share a batch, whatever their lengths."""


class TorchForward:
    """One module over one pool."""

    def __init__(self, loaded: LoadedModel, pool: Pool) -> None:
        self._body = body_of(loaded.module)
        self._head = loaded.module.lm_head
        self._device = loaded.device
        self._pool = pool

    def __call__(self, launch: Launch) -> Tensor:
        """Logits of the launch's `keep` rows `[draws, vocabulary]`, in the model's type."""
        return self.logits(self.hidden(launch)[self._tensor(launch.keep)])

    def hidden(self, launch: Launch, given: Tensor | None = None) -> Tensor:
        """What the last of its layers makes of every token, `[T, hidden]`; `given`: what the layers before them have made."""
        self._pool.clear(self._opened(launch))
        begin = {"input_ids": self._tensor(launch.ids)[None]} if given is None else {"inputs_embeds": given[None]}
        found: Tensor = self._body(
            **begin, position_ids=self._tensor(launch.positions)[None], use_cache=False, baton_step=self.step(launch)
        ).last_hidden_state[0]
        return found

    def logits(self, rows: Tensor) -> Tensor:
        """`[n, hidden]` → `[n, vocabulary]`."""
        found: Tensor = self._head(rows)
        return found

    def step(self, launch: Launch) -> Step:
        """The launch as attention sees it."""
        size = self._pool.layout.page_tokens
        places = np.repeat(launch.chunks[:, 3], launch.chunks[:, 1]) + launch.positions // size
        prompts = launch.chunks[launch.chunks[:, 1] > 1]
        singles = launch.chunks[launch.chunks[:, 1] == 1]
        return Step(
            pool=self._pool,
            slots=self._tensor(self._pool.slots(launch.table[places], launch.positions % size)),
            segments=tuple(
                Segment(first, tokens, start, self._behind(launch.table[at:], start, tokens))
                for first, tokens, start, at in prompts.tolist()
            ),
            batches=self._batches(singles, launch.table),
        )

    # ---------------------------------------------------------------------------------------------------------- inside

    def _opened(self, launch: Launch) -> list[int]:
        """Pages that chunks write the first token of, but not the last one: batched decode reads all of such a page, with weights of 0
        beyond the sequence's end, and 0 times a number that is none is none."""
        _, tokens, start, at = launch.chunks.T
        last, filled = np.divmod(start + tokens, self._pool.layout.page_tokens)
        opens = (filled > 0) & (last * self._pool.layout.page_tokens >= start)
        found: list[int] = launch.table[(at + last)[opens]].tolist()
        return found

    def _behind(self, pages: Ints, start: int, tokens: int) -> Tensor | None:
        """Runs of a prompt chunk's pages, its own included, if it has any context."""
        return self._tensor(self._pool.runs(pages[: self._pool.layout.pages(start + tokens)])) if start else None

    def _batches(self, singles: Ints, table: Ints) -> tuple[Batch, ...]:
        """One-token chunks, the longest first, in batches that padding makes at most twice as large."""
        counts = (singles[:, 2] // self._pool.layout.page_tokens + 1).tolist()
        batches: list[Batch] = []
        begin = 0
        while begin < len(counts):
            least = counts[begin] / 2 if counts[begin] > SMALL_PAGES else 0
            end = begin + 1
            while end < len(counts) and counts[end] > least:
                end += 1
            batches.append(self._batch(singles[begin:end], table))
            begin = end
        return tuple(batches)

    def _batch(self, chunks: Ints, table: Ints) -> Batch:
        size = self._pool.layout.page_tokens
        first, _, start, at = chunks.T
        last = start // size
        places = np.minimum(np.arange(last[0] + 1), last[:, None])
        mask = np.where(np.arange((last[0] + 1) * size) > start[:, None], np.float32("-inf"), np.float32(0))
        return Batch(
            int(first[0]),
            len(chunks),
            self._tensor(self._pool.runs(table[at[:, None] + places])),
            torch.as_tensor(mask, device=self._device)[:, None, None],
        )

    def _tensor(self, values: Ints) -> Tensor:
        return torch.as_tensor(values, device=self._device)
