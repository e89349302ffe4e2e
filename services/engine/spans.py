"""Free pages as runs of neighbours: pages that are taken together lie together, and what lies together travels as one message. Pure.

Best fit: the shortest run that is long enough, else the longest and on. Single pages so use up the shortest runs. Last in, first out
instead leaves, after some thousand requests, hardly two pages of a prompt side by side (docs/notes.md, "Runs of pages").
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator


class FreePages:
    """Pages 0 to `total` - 1, all free at first. Taking and adding `n` pages costs O(n log total), and a move of the list of runs each."""

    def __init__(self, total: int) -> None:
        self._count = 0
        self._is_free = bytearray(total)
        self._end: dict[int, int] = {}
        """First page of each run → one past its last."""
        self._first: dict[int, int] = {}
        """The reverse."""
        self._by_length: list[tuple[int, int]] = []
        """(length, first page), sorted."""
        self.add(range(total))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for first, end in self._end.items():
            yield from range(first, end)

    def take(self, count: int) -> tuple[int, ...]:
        """`count` of them, neighbours in rising order as far as possible. Raises AssertionError if there are not as many."""
        if count > self._count:
            raise AssertionError(f"{count} pages of {self._count}")
        taken: list[int] = []
        while len(taken) < count:
            missing = count - len(taken)
            at = min(bisect_left(self._by_length, (missing, 0)), len(self._by_length) - 1)
            length, first = self._by_length[at]
            self._remove(first)
            cut = first + min(length, missing)
            if cut < first + length:
                self._insert(cut, first + length)
            taken += range(first, cut)
            self._is_free[first:cut] = bytes(cut - first)
        return tuple(taken)

    def add(self, pages: Iterable[int]) -> None:
        """They are free again. Raises AssertionError if one is already, and those before it are free then."""
        for first, end in runs(sorted(pages)):
            if self._is_free.find(1, first, end) >= 0:
                raise AssertionError(f"a page of {first} to {end - 1} is free twice")
            self._is_free[first:end] = b"\1" * (end - first)
            before, behind = self._first.get(first), self._end.get(end)
            if before is not None:
                self._remove(before)
            if behind is not None:
                self._remove(end)
            self._insert(first if before is None else before, end if behind is None else behind)

    def _insert(self, first: int, end: int) -> None:
        self._end[first], self._first[end] = end, first
        self._count += end - first
        insort(self._by_length, (end - first, first))

    def _remove(self, first: int) -> None:
        end = self._end.pop(first)
        del self._first[end], self._by_length[bisect_left(self._by_length, (end - first, first))]
        self._count -= end - first


def runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Of pages in rising order: each run's first page and one past its last."""
    first = end = None
    for page in pages:
        if end != page:
            if first is not None and end is not None:
                yield first, end
            first = page
        end = page + 1
    if first is not None and end is not None:
        yield first, end
