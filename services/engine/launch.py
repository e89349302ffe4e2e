"""A plan as arrays: what any forward pass needs to know of a launch, without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Launch:
    """Chunks packed one behind the other; all arrays are int64 and contiguous."""

    ids: Ints
    """`[T]` token ids."""
    positions: Ints
    """`[T]` each token's place in its sequence."""
    chunks: Ints
    """`[chunks, 4]`: first row, tokens, position of the first token, and where the sequence's page ids begin in `table`. Prompts first,
    then one-token chunks, the longest first."""
    table: Ints
    """Page ids of each chunk's sequence: those up to the page that its last token goes into, and any behind it that it has already."""
    keep: Ints
    """`[draws]` rows whose logits are wanted."""
    sources: Ints | None = None
    """`[T]`: which of the ids that the launch before this one draws each token is; -1: what stands in `ids`, and so does None for all."""
