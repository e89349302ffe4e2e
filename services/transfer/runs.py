"""Runs of pages that travel as one message: which those are, and which pages a message carries. Pure.

The receiver chooses them when it posts its receives: neighbours in its pool that are neighbours in the sender's too. It names the index at
which each begins (`starts`); none at all: each page is a message of its own. Ranks that hold different parts of a page always do that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import pairwise

RUN_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
"""A message's most, by where the pages lie. Both sides sum a run whole, one after the other: on a core a longer one leaves its cache and
loses more than its messages cost (docs/notes.md, "Runs of pages")."""


def most_pages(page_bytes: int, run_bytes: int) -> int:
    """Of a message of so many bytes at most."""
    return max(run_bytes // page_bytes, 1)


def breaks(pages: Sequence[int]) -> tuple[int, ...]:
    """Indices of pages that do not lie behind the page before them; never 0."""
    return tuple(i for i in range(1, len(pages)) if pages[i] != pages[i - 1] + 1)


def message_starts(first: int, pages: Sequence[int], apart: Collection[int], most: int) -> tuple[int, ...]:
    """Where messages begin when `pages[i]` takes the sequence's page `first + i`: also at the sender's breaks (`apart`), and so that
    none has more than `most` pages."""
    found: list[int] = []
    for i, page in enumerate(pages):
        index = first + i
        if not i or page != pages[i - 1] + 1 or index in apart or index - found[-1] == most:
            found.append(index)
    return tuple(found)


def can_send(starts: Sequence[int], indices: Sequence[int], apart: Collection[int]) -> bool:
    """Whether a sender with these breaks can send `indices` as messages that begin there."""
    if not starts:
        return True
    begun, wanted = set(starts), set(indices)
    follows = all(index in begun or (index - 1 in wanted and index not in apart) for index in indices)
    return follows and begun <= wanted and list(starts) == sorted(begun)


def messages(indices: Sequence[int], starts: Collection[int]) -> list[slice]:
    """`indices`, whole messages in order, cut into these."""
    begun = set(starts)
    cuts = [i for i, index in enumerate(indices) if not i or not begun or index in begun]
    return [slice(one, other) for one, other in pairwise([*cuts, len(indices)])]


def complete(final: int, starts: Sequence[int]) -> int:
    """Of the pages below `final`, all but those of a message that is not complete yet: pages below this index may go."""
    if not starts:
        return final
    begun = bisect_right(starts, final)
    return starts[begun - 1] if begun else 0
