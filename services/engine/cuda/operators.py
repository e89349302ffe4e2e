"""What the forward pass is made of besides matrix products: Triton kernels on a GPU, plain torch as their reference on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

BLOCK_ROWS = {2: 128, 4: 32}
"""By bytes of an element: as many as a program's registers hold."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What a layer's attention is like."""

    heads: int
    kv_heads: int
    dim: int
    page_tokens: int
    scale: float
    """What scores are multiplied by."""
    epsilon: float
    """Of the norms."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The launch's tokens, int32 `[T]` each, on the device."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    """`page * page_tokens + place`, where each one's KV goes; below 0: padding."""
    sources: Tensor | None = None
    """Which of the ids drawn last each one is; below 0: what stands in `ids`."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What an attention that knows no pages needs of chunks of several tokens, on the device: chunk after chunk, the tokens each sees."""

    pages: Tensor
    """int64 `[K]`: of each token that is seen, the page it lies in."""
    places: Tensor
    """int64 `[K]`: where in it."""
    row_ends: Tensor
    """int32 `[chunks + 1]`: 0, and where each chunk's queries end."""
    key_ends: Tensor
    """The same of what it sees."""
    most_rows: int
    most_keys: int
    """Of a chunk."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Chunks of several tokens, whose rows come first. int32, on the device."""

    chunks: Tensor
    """`[chunks, 4]`: first row, tokens, context, where its pages begin in `table`."""
    blocks: Tensor
    """`[blocks, 2]`: a chunk and the first of its rows that the block computes; below 0: padding."""
    block_rows: int
    """Rows that a block computes: `BLOCK_ROWS` of the queries' type."""
    table: Tensor
    packed: Packed | None = None
    """For operators that ask for it."""


@dataclass(frozen=True, slots=True)
class Singles:
    """One-token chunks. int32, on the device."""

    begins: Tensor
    """`[B]`: where each one's pages begin in `table`."""
    lengths: Tensor
    """`[B]`: tokens it sees, its own included; 0: padding."""
    table: Tensor
    splits: int
    """Into how many parts each one's keys are divided: a power of 2."""


class Operators(Protocol):
    """`pages` is one layer's `[pages, 2, kv_heads, page_tokens, head_dim]`. Row counts are those of the tensors; nothing is read back."""

    @property
    def packs(self) -> bool:
        """Whether prompts are wanted `packed`, too."""

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """`x / rms(x) * weight` of `[T, hidden]`."""

    def add_norm(self, x: Tensor, delta: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Adds `delta`, or the sum of its parts, to `x` in place, then `norm` of it."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, whole: bool = False) -> Tensor:
        """x `[T, inputs]`, weight `[outputs, inputs]` → `[T, outputs]`; or, unless it must be `whole`, float32 parts `[parts, T, outputs]`,
        which are to be added up."""

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x `[T, inputs]`, weight `[2 * inner, inputs]` → `silu(left half) * right half` of their product, `[T, inner]`."""

    def put(self, qkv: Tensor, pages: Tensor, angles: tuple[Tensor, Tensor], norms: Tensor | None, rows: Rows, like: Heads) -> Tensor:
        """qkv `[T, (heads + 2 * kv_heads) * dim]`, or parts of it: keys and values into the pages, queries returned as `[T, heads, dim]`;
        queries and keys normed by `norms` `[2, dim]` and turned by `angles` (cosines, sines, float32 `[positions, dim / 2]`)."""

    def prefill(self, queries: Tensor, pages: Tensor, prompts: Prompts, like: Heads, out: Tensor) -> None:
        """queries `[T, heads, dim]` → `out`, alike: row i of a chunk sees `context + i + 1` positions."""

    def decode(self, queries: Tensor, pages: Tensor, singles: Singles, like: Heads, out: Tensor) -> None:
        """queries `[B, heads, dim]` → `out`, alike; what padding gives is zeros."""

    def gather(self, pages: Tensor, ids: Tensor, layers: tuple[int, int], heads: tuple[int, int]) -> Tensor:
        """From all of a pool `[pages, layers, 2, kv_heads, page_tokens, dim]`: these layers and KV heads (from, to) of the pages `ids`
        (int32 `[n]`) → `[n, layers, 2, heads, page_tokens, dim]`."""

    def scatter(self, pages: Tensor, ids: Tensor, layers: tuple[int, int], heads: tuple[int, int], packed: Tensor) -> None:
        """The way back."""
