"""To which decode a prompt is offered: the less loaded of two, unless another one holds its beginning and is not much busier. Pure.

A decode that holds the beginning saves the transfer of those pages and the room for a second copy; one more sequence makes every step
of a decode a little slower (about 3 ms of 45 on a CPU core, docs/notes.md). So the beginning decides between decodes that are about
equally busy, and never against the load.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.messages import Incarnation

MOST_HASHES = 1 << 16
"""Pages remembered at most, of the most recent handoffs: about a million tokens of 16 a page, less than 20 MB."""
MOST_HOLDERS = 8
"""Decodes remembered for one page."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a decode's latest beat says, for choosing among them; `running` counts what was offered to it meanwhile as well."""

    running: int
    free_pages: int


class Holders:
    """Which decodes were handed which beginnings, by the chain hash of each full page; the least recently handed are forgotten.

    A memory and no knowledge: a decode may have given the pages up since. Its grant says what it lacks.
    """

    def __init__(self, most: int = MOST_HASHES) -> None:
        self._most = most
        self._holders: OrderedDict[bytes, tuple[Incarnation, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def handed(self, hashes: Sequence[bytes], to: Incarnation) -> None:
        """`to` holds these pages now."""
        # Backwards: the end of a beginning is to be forgotten first, it is of no use without the rest.
        for digest in reversed(hashes):
            others = [peer for peer in self._holders.pop(digest, ()) if peer != to]
            self._holders[digest] = (to, *others[: MOST_HOLDERS - 1])
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)

    def held(self, hashes: Sequence[bytes]) -> dict[Incarnation, int]:
        """For each decode that was handed the first of these pages: how many of them from there on."""
        found: dict[Incarnation, int] = {}
        for at, digest in enumerate(hashes):
            still = [peer for peer in self._holders.get(digest, ()) if found.get(peer, 0) == at]
            if not still:
                break
            found.update(dict.fromkeys(still, at + 1))
        return found


def choose(least: Incarnation, loads: Mapping[Incarnation, Load], held: Mapping[Incarnation, int], pages: int) -> Incarnation:
    """`least`, the less loaded of two; instead of it the decode that holds most of the prompt's `pages`, if it is busier by at most one
    sequence or a quarter and has room. `loads` has every candidate, `held` pages by holder."""
    bound = loads[least].running + max(1, loads[least].running // 4)
    # Free pages count those that are only kept for their hash, so what it holds takes room as well, unless somebody uses it just now.
    room = min(pages + 1, loads[least].free_pages)
    fit = [
        name
        for name in sorted(set(held) & set(loads))
        if held[name] > held.get(least, 0) and loads[name].running <= bound and loads[name].free_pages >= room
    ]
    return max(fit, key=lambda name: (held[name], -loads[name].running), default=least)
