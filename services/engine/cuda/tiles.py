"""How a product of few rows is cut into programs: enough of them for the whole device, each with enough reads under way. Pure."""

from __future__ import annotations

from dataclasses import dataclass

MOST_ROWS = 64
"""Beyond that a library's product is as fast: the weights are no longer all that counts."""
FEW_ROWS = 32
"""Up to so many, what is read again by every program, and the parts that are added up later, weigh little."""
MOST_PARTS = {True: 8, False: 4}
"""By whether rows are few, into which the inputs are divided: their sums are added up by whoever reads them."""
WAVES = {True: 2, False: 1}
"""By the same, programs for each multiprocessor, about."""


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

    def shared_bytes(self, gated: bool) -> int:
        """For the tiles under way, elements being of 2 bytes."""
        return self.stages * (self.rows + self.outputs * (2 if gated else 1)) * self.depth * 2


@dataclass(frozen=True, slots=True)
class Device:
    """What counts of a GPU here."""

    multiprocessors: int
    shared_bytes: int
    """That one program may use."""


@dataclass(frozen=True, slots=True)
class Cut:
    tile: Tile
    parts: int


def tile(rows: int, gated: bool, shared_bytes: int) -> Tile | None:
    """For so many rows, with as many stages as fit; None: not even two do. Reasoned, not measured yet (`scripts/gpu/sweep.py`)."""
    height = max(16, 1 << (rows - 1).bit_length())
    # Many rows are read again by every program: each then has twice the outputs.
    outputs, depth = (64 if gated else 128, 64) if height > FEW_ROWS else (32 if gated else 64, 128)
    for stages in (4, 3, 2):
        found = Tile(height, outputs, depth, 4, stages)
        if found.shared_bytes(gated) <= shared_bytes:
            return found
    return None


def cut(rows: int, outputs: int, inputs: int, device: Device, *, gated: bool, whole: bool) -> Cut | None:
    """None if the shape does not divide, or there are too many rows, or the device is too small. `whole`: in one part."""
    of = tile(rows, gated, device.shared_bytes) if rows <= MOST_ROWS else None
    if of is None or outputs % of.outputs or inputs % of.depth:
        return None
    parts = 1
    if not (gated or whole):
        few, programs = rows <= FEW_ROWS, outputs // of.outputs
        while (
            2 * parts <= MOST_PARTS[few] and programs * parts < WAVES[few] * device.multiprocessors and inputs % (2 * parts * of.depth) == 0
        ):
            parts *= 2
    return Cut(of, parts)
