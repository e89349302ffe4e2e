"""How a product of few rows is cut into programs: enough of them for the whole device, each with enough reads under way. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MOST_ROWS = 64
"""Beyond that a library's product is as fast: the weights are no longer all that counts."""
MOST_PARTS = 8
"""Into which the inputs are divided: their sums are added up by whoever reads them."""
WAVES = 2
"""Programs for each multiprocessor, about."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of `kernels.product` computes."""

    rows: int
    outputs: int
    depth: int
    """Inputs at a time."""
    warps: int
    stages: int
    """Tiles whose reads are under way at a time."""


@dataclass(frozen=True, slots=True)
class Cut:
    tile: Tile
    parts: int


def tile(rows: int, gated: bool) -> Tile:
    """For so many rows: what was fastest, or near it, for every product of Llama-3-8B's shape on one H200."""
    height = max(16, 1 << (rows - 1).bit_length())
    return Tile(height, 32 if gated else 64, 128, 4, 4)


def cut(rows: int, outputs: int, inputs: int, *, gated: bool, whole: bool, multiprocessors: int) -> Cut | None:
    """None if the shape does not divide, or there are too many rows. `whole`: in one part."""
    if rows > MOST_ROWS:
        return None
    of = tile(rows, gated)
    if outputs % of.outputs or inputs % of.depth:
        return None
    parts = 1
    if not (gated or whole):
        programs = outputs // of.outputs
        while 2 * parts <= MOST_PARTS and programs * parts < WAVES * multiprocessors and inputs % (2 * parts * of.depth) == 0:
            parts *= 2
    return Cut(of, parts)
