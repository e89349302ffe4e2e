"""A launch as int32 arrays on the device: one copy from the host, whatever is in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.engine.cuda.operators import BLOCK_ROWS, Heads, Packed, Prompts, Rows, Singles
from services.engine.cuda.splits import splits
from services.engine.launch import Ints, Launch

ALIGNED = 64
"""Ints from one array's beginning to the next one's, or a multiple: kernels are compiled for addresses that divide by 16 bytes."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the forward pass reads of a launch."""

    rows: Rows
    prompt_rows: int
    prompts: Prompts | None
    singles: Singles | None
    """Their rows follow those of the prompts."""
    keep: Tensor | None
    """int32 `[draws]`: rows whose logits are wanted; None: all."""


def inputs(launch: Launch, like: Heads, dtype: torch.dtype, device: torch.device, *, packs: bool = False) -> Inputs:
    """For any launch. `packs`: with what an attention needs that knows no pages."""
    tile = BLOCK_ROWS[dtype.itemsize]
    prompts, singles = split(launch.chunks)
    parts = [launch.ids, launch.positions, slots(launch, like.page_tokens), launch.table, prompts, blocks(prompts, tile)]
    parts += [singles[:, 3], singles[:, 2] + 1, launch.keep, launch.ids[:0] if launch.sources is None else launch.sources]
    seen = seen_by(prompts, launch.table, like.page_tokens) if packs else launch.ids[:0]
    row_ends, key_ends = _ends(prompts[:, 1]), _ends(prompts[:, 1:3].sum(1))
    there = shipped([*parts, seen, row_ends, key_ends], device)
    ids, positions, where, table, chunks, tiles, begins, lengths, keep, sources, keys, rows_end, keys_end = there
    packed = None
    if packs and len(prompts):
        most = int(np.diff(row_ends).max()), int(np.diff(key_ends).max())
        packed = Packed(keys.long() // like.page_tokens, keys.long() % like.page_tokens, rows_end, keys_end, *most)
    return Inputs(
        rows=Rows(ids, positions, where, None if launch.sources is None else sources),
        prompt_rows=int(row_ends[-1]),
        prompts=Prompts(chunks.view(-1, 4), tiles.view(-1, 2), tile, table, packed) if len(prompts) else None,
        singles=Singles(begins, lengths, table, splits(len(singles), like.kv_heads, device)) if len(singles) else None,
        keep=keep,
    )


def split(chunks: Ints) -> tuple[Ints, Ints]:
    """Chunks of several tokens, and of one."""
    several = chunks[:, 1] > 1
    return chunks[several], chunks[~several]


def slots(launch: Launch, page_tokens: int) -> Ints:
    """`[T]` where each token's KV goes."""
    places = np.repeat(launch.chunks[:, 3], launch.chunks[:, 1]) + launch.positions // page_tokens
    found: Ints = launch.table[places] * page_tokens + launch.positions % page_tokens
    return found


def seen_by(prompts: Ints, table: Ints, page_tokens: int) -> Ints:
    """`[K]`: chunk after chunk, where the KV of each token lies that it sees, as `slots` say it."""
    lengths = prompts[:, 1] + prompts[:, 2]
    place = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    found: Ints = table[np.repeat(prompts[:, 3], lengths) + place // page_tokens] * page_tokens + place % page_tokens
    return found


def _ends(counts: Ints) -> Ints:
    return np.concatenate((np.zeros(1, dtype=np.int64), counts.cumsum()))


def blocks(prompts: Ints, block_rows: int) -> Ints:
    """`[blocks, 2]`: chunk and first row of every block of queries; those that see most first: the short ones then fill the end."""
    counts = -(-prompts[:, 1] // block_rows)
    chunk = np.repeat(np.arange(len(prompts)), counts)
    first = (np.arange(len(chunk)) - np.repeat(counts.cumsum() - counts, counts)) * block_rows
    seen = prompts[chunk, 2] + first
    return np.stack((chunk, first), 1)[np.argsort(-seen, kind="stable")]


def shipped(parts: list[Ints], device: torch.device) -> list[Tensor]:
    """The same, flat, as int32 on the device."""
    sizes = [part.size for part in parts]
    begins = np.cumsum([0, *(-(-size // ALIGNED) * ALIGNED for size in sizes)]).tolist()
    flat: NDArray[np.int32] = np.zeros(begins[-1], dtype=np.int32)
    for part, begin, size in zip(parts, begins, sizes, strict=False):
        flat[begin : begin + size] = part.ravel()
    here = torch.from_numpy(flat)
    # From pinned memory: any other copy to a GPU would wait for the launch under way.
    there = here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)
    return [there[begin : begin + size] for begin, size in zip(begins, sizes, strict=False)]
