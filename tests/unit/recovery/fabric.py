"""What the simulated processes stand on: a clock with events, lossy wires, a queue with Redis Streams' semantics, a model made of sums."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from common.messages import Job, decode, encode
from common.names import CLASSES
from common.queue import Absent, Claimed, Entry, EntryState, Pending, Queued

MASK = (1 << 61) - 1
VOCABULARY = 40
PAGE_TOKENS = 4


# --------------------------------------------------------------------------------------------------------------- model


KV_ROOT = 97


def kv_next(before: int, token: int) -> int:
    """The KV of a position: it depends on every token so far, as a real one does."""
    return (before * 6364136223846793005 + token + 1442695040888963407) & MASK


def next_token(kv: int, seed: int, choice: int = 0) -> int:
    """Every seed and every choice draws its own, from KV that is the same for all of them."""
    return ((kv >> 13) + 11 * seed + 7 * choice) % VOCABULARY


def undisturbed(prompt: list[int], seed: int, max_tokens: int, stop_ids: list[int], choice: int = 0) -> list[int]:
    """What a request must bring, whatever dies on the way."""
    kv = KV_ROOT
    for token in prompt:
        kv = kv_next(kv, token)
    out: list[int] = []
    while len(out) < max_tokens and (not out or out[-1] not in stop_ids):
        out.append(next_token(kv, seed, choice))
        kv = kv_next(kv, out[-1])
    return out


def pages_of(ids: list[int]) -> list[list[int]]:
    """What has to lie in each full page of these tokens."""
    kvs, kv = [], KV_ROOT
    for token in ids:
        kv = kv_next(kv, token)
        kvs.append(kv)
    return [kvs[at : at + PAGE_TOKENS] for at in range(0, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS)]


# --------------------------------------------------------------------------------------------------------------- clock


class Clock:
    """Events in order of time, then of planning."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._planned = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        self._planned += 1
        heapq.heappush(self._events, (self.now + delay_s, self._planned, what))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
        self.now = until


@dataclass(eq=False)
class Process:
    """Something that lives, may be frozen (SIGSTOP) and dies. Everything that reaches it goes through `deliver`."""

    name: str
    alive: bool = True
    frozen: bool = False
    mail: dict[str, deque[Callable[[], None]]] = field(default_factory=dict)
    """What arrived while it was frozen, by channel: each channel keeps its order, nothing else does."""

    def deliver(self, channel: str, what: Callable[[], None]) -> None:
        if not self.alive:
            return
        if self.frozen:
            self.mail.setdefault(channel, deque()).append(what)
        else:
            what()

    def thaw(self, rng: random.Random) -> None:
        self.frozen = False
        while self.mail and self.alive:
            channel = rng.choice(sorted(self.mail))
            what = self.mail[channel].popleft()
            if not self.mail[channel]:
                del self.mail[channel]
            what()


# --------------------------------------------------------------------------------------------------------------- wires


@dataclass
class Weather:
    """What goes wrong by chance. `calm` is the weather in which everything has to end."""

    token_loss: float = 0.0
    control_cut: float = 0.0
    """Chance that a message tears its control link, which then loses everything for a moment (a reconnect)."""
    put_trouble: float = 0.0
    """Chance that an XADD fails, half of the time after the job has entered."""
    claim_loss: float = 0.0
    duplicate_put: float = 0.0
    corrupt: float = 0.0
    not_posted: float = 0.0
    push_fail: float = 0.0
    push_stall: float = 0.0
    launch_fail: float = 0.0


class Wires:
    """Ordered channels between processes, with latency and loss."""

    def __init__(self, clock: Clock, rng: random.Random, weather: Weather) -> None:
        self._clock, self._rng, self.weather = clock, rng, weather
        self._free_at: dict[tuple[str, str, str], float] = {}
        self._cut_until: dict[tuple[str, str], float] = {}
        self.drop: Callable[[str, str, object], bool] = lambda source, to, message: False
        """For single tests: whether to lose this very message."""

    def latency(self) -> float:
        return self._rng.choice((0.0002, 0.0005, 0.001, 0.01))

    def send(self, kind: str, source: Process, to: Process, message: object, what: Callable[[], None]) -> None:
        if self.drop(source.name, to.name, message):
            return
        if kind == "tokens" and self._rng.random() < self.weather.token_loss:
            return
        if kind == "control" and self._torn(source.name, to.name):
            return
        channel = (kind, source.name, to.name)
        at = max(self._clock.now + self.latency(), self._free_at.get(channel, 0.0))
        self._free_at[channel] = at
        self._clock.after(at - self._clock.now, lambda: to.deliver(f"{kind} {source.name}", what))

    def _torn(self, source: str, to: str) -> bool:
        link = (min(source, to), max(source, to))
        if self._rng.random() < self.weather.control_cut:
            self._cut_until[link] = self._clock.now + self._rng.choice((0.05, 0.4, 1.2))
        return self._clock.now < self._cut_until.get(link, 0.0)


# --------------------------------------------------------------------------------------------------------------- queue


@dataclass
class _Row:
    data: bytes
    put_at: float
    consumer: str | None = None
    delivered_at: float = 0.0


class Streams:
    """One stream per class, one group. Restarted empty it forgets everything; ids go on, as Redis' clock does."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = 0
        self.rows: dict[str, dict[str, _Row]] = {job_class: {} for job_class in CLASSES}
        self.dead_letters: list[Job] = []
        self.away = False

    def put(self, job: Job, job_class: str) -> Entry:
        self._last += 1
        entry = Entry(job_class, f"{self._last}-0")
        self.rows[job_class][entry.id] = _Row(encode(job), self._clock.now)
        return entry

    def claim(self, consumer: str) -> Claimed | None:
        for job_class in CLASSES:
            for entry_id, row in self.rows[job_class].items():
                if row.consumer is None:
                    row.consumer, row.delivered_at = consumer, self._clock.now
                    return Claimed(Entry(job_class, entry_id), decode(row.data, Job), self._clock.now - row.put_at)
        return None

    def remove(self, entry: Entry) -> None:
        self.rows[entry.job_class].pop(entry.id, None)

    def state(self, entry: Entry) -> EntryState:
        row = self.rows[entry.job_class].get(entry.id)
        if row is None:
            return Absent()
        return Queued() if row.consumer is None else Pending(row.consumer, self._clock.now - row.delivered_at)

    def pending(self) -> list[tuple[Entry, Pending, Job]]:
        return [
            (Entry(job_class, entry_id), Pending(row.consumer, self._clock.now - row.delivered_at), decode(row.data, Job))
            for job_class, rows in self.rows.items()
            for entry_id, row in rows.items()
            if row.consumer is not None
        ]

    def restart_empty(self) -> None:
        for rows in self.rows.values():
            rows.clear()

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))
