"""The sequences in a scheduler's care: how far each one's launches are, and when its pages may go. Pure: no torch."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from enum import Enum, auto
from operator import attrgetter

from common.messages import Key
from services.engine.pages import PagePool
from services.engine.sequence import Sequence


class Stage(Enum):
    WAITING = auto()
    """Submitted; has no pages."""
    PREFILLING = auto()
    """Has its prefill pages; some of its known ids are in no launch yet."""
    RUNNING = auto()
    """All known ids are in launches; draws token after token."""
    PARKED = auto()
    """Has drawn its one token here and keeps its pages for the handoff."""
    GONE = auto()
    """Ended; its pages go when no launch names them any more."""


@dataclass(eq=False, slots=True)
class Run:
    """A sequence and how far its launches are. Sorted by `rank`: order, then arrival."""

    sequence: Sequence
    rank: tuple[float, int]
    stage: Stage
    known: int
    """Tokens to prefill; those behind them are drawn."""
    most: int
    """Tokens of KV it can need here at most."""
    room: int = 0
    """Tokens its pages hold."""
    ahead: int = 0
    """Draws in flight."""
    flights: int = 0
    """Launches in flight that name it."""

    @property
    def lacking(self) -> int:
        """Tokens of the prompt that are in no launch yet."""
        return self.known - self.sequence.planned


def most_here(sequence: Sequence) -> int:
    """Tokens of KV it can need on this engine: one that parks leaves before its second token."""
    return len(sequence.ids) if sequence.parks else sequence.most_tokens


class Roster:
    """Runs by key and by stage, each stage in order of acceptance."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._arrivals = 0
        self.runs: dict[Key, Run] = {}
        self.waiting: list[Run] = []
        self.prefilling: list[Run] = []
        self.running: list[Run] = []
        self.parked: list[Run] = []
        self._lists = {
            Stage.WAITING: self.waiting,
            Stage.PREFILLING: self.prefilling,
            Stage.RUNNING: self.running,
            Stage.PARKED: self.parked,
        }
        self.inside: set[Sequence] = set()
        """Sequences that have pages, granted ones and such as are leaving included: what an `alone` one must not meet, but for parked ones,
        which no launch names."""
        self._alone: set[Sequence] = set()
        """Those of them that must run alone."""
        self.leaving_pages = 0
        """Pages of sequences that are gone, named by launches in flight."""
        self.unplanned_tokens = 0
        """Tokens that waiting and prefilling runs lack."""

    def accept(self, sequence: Sequence, stage: Stage) -> Run:
        """Raises ValueError if its key is here already."""
        if sequence.key in self.runs:
            raise ValueError(f"{sequence.key} is here already")
        self._arrivals += 1
        run = Run(sequence, (sequence.order, self._arrivals), stage, len(sequence.ids), most_here(sequence))
        self.runs[sequence.key] = run
        insort(self._lists[stage], run, key=attrgetter("rank"))
        if stage is Stage.WAITING:
            self.unplanned_tokens += run.known
        return run

    def move(self, run: Run, stage: Stage) -> None:
        self._lists[run.stage].remove(run)
        run.stage = stage
        insort(self._lists[stage], run, key=attrgetter("rank"))

    def give(self, run: Run, pages: tuple[int, ...]) -> None:
        """More pages for it, behind those it has."""
        run.sequence.pages += pages
        run.room = len(run.sequence.pages) * self._pool.page_tokens
        self.enter(run.sequence)

    def enter(self, sequence: Sequence) -> None:
        """It has pages, or a grant of some."""
        self.inside.add(sequence)
        if sequence.alone:
            self._alone.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It has none any more."""
        self.inside.discard(sequence)
        self._alone.discard(sequence)

    def drop(self, run: Run) -> None:
        """It is gone from here; its pages follow when no launch names them any more."""
        del self.runs[run.sequence.key]
        self._lists[run.stage].remove(run)
        if run.stage in (Stage.WAITING, Stage.PREFILLING):
            self.unplanned_tokens -= run.lacking
        run.stage = Stage.GONE
        if run.flights:
            self.leaving_pages += len(run.sequence.pages)
        else:
            self._free(run)

    def collected(self, run: Run) -> bool:
        """A launch that names it is over. False: it has ended meanwhile, and what the launch drew for it is void."""
        run.flights -= 1
        if run.stage is not Stage.GONE:
            return True
        if not run.flights:
            self.leaving_pages -= len(run.sequence.pages)
            self._free(run)
        return False

    def youngest(self) -> Run:
        """Whom to preempt: the last accepted of those that compute or draw and are not reserved in full."""
        victims = [run for run in (*self.prefilling, *self.running) if not run.sequence.reserve_all]
        return max(victims, key=attrgetter("rank"))

    def may_enter(self, sequence: Sequence) -> bool:
        """Whether it may get its first pages beside what has pages now."""
        if sequence.alone:
            return len(self.inside) == len(self.parked)
        parked = {run.sequence for run in self.parked} if self._alone else set()
        return self._alone <= parked

    def _free(self, run: Run) -> None:
        self._pool.release(run.sequence.pages)
        run.sequence.pages = []
        self.leave(run.sequence)
