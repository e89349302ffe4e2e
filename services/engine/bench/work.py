"""What a launch has to compute and to read at least, and how long that takes at the machine's ceilings. Pure arithmetic.

A launch is bounded by its floating-point operations at the rate of matrix products, and by its bytes at the rate of reads (the roofline
of Williams, Waterman and Patterson, 2009): the larger of the two times is its bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Limit = Literal["products", "reads"]


@dataclass(frozen=True)
class Shapes:
    """A decoder-only model in numbers."""

    layers: int
    width: int
    """Query heads times head_dim."""
    kv_width: int
    """KV heads times head_dim."""
    body_weights: int
    """Of all linear layers but the head."""
    head_weights: int
    vocabulary: int
    element_bytes: int
    products: tuple[tuple[int, int], ...]
    """(outputs, inputs) of the matrix products of one layer; those of equal input go as one."""

    @property
    def weight_bytes(self) -> int:
        """Read by every launch that draws."""
        return (self.body_weights + self.head_weights) * self.element_bytes

    @property
    def kv_token_bytes(self) -> int:
        return self.layers * 2 * self.kv_width * self.element_bytes


@dataclass(frozen=True)
class Work:
    flops: float
    """A multiplication and an addition count as two."""
    bytes: float


@dataclass(frozen=True)
class Bound:
    seconds: float
    by: Limit


def prefill(shapes: Shapes, lengths: Sequence[int]) -> Work:
    """Whole prompts in one launch, each drawing one token. Row i of a prompt attends to i + 1 positions, twice (scores and values)."""
    seen = sum(n * (n + 1) / 2 for n in lengths)
    flops = 2 * shapes.body_weights * sum(lengths) + 2 * shapes.head_weights * len(lengths) + 4 * shapes.width * shapes.layers * seen
    return Work(flops, shapes.weight_bytes)


def decode(shapes: Shapes, batch: int, context: int) -> Work:
    """One token for each of `batch` sequences whose KV has `context` tokens, the new one included."""
    flops = 2 * (shapes.body_weights + shapes.head_weights) * batch + 4 * shapes.width * shapes.layers * context * batch
    return Work(flops, shapes.weight_bytes + batch * context * shapes.kv_token_bytes)


def bound(work: Work, flops_per_s: float, bytes_per_s: float) -> Bound:
    products, reads = work.flops / flops_per_s, work.bytes / bytes_per_s
    return Bound(products, "products") if products > reads else Bound(reads, "reads")
