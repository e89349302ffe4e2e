"""Liveness: silence, work without progress, and an observer that was itself stopped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.beats import PAUSE_S, Liveness
from common.names import BEAT_S, DEAD_S


def watch(liveness: Liveness, start: float, end: float, *beating: str) -> list[tuple[str, str]]:
    """Look every beat from `start` to `end`, while these peers beat; the deaths seen."""
    found = []
    now = start
    while now <= end:
        for peer in beating:
            liveness.heard(peer, now)
        found += liveness.dead(now)
        now += BEAT_S
    return found


def test_silence_is_death_after_dead_s_and_not_before() -> None:
    liveness = Liveness()
    liveness.heard("a", 0.0)
    assert watch(liveness, 0.0, DEAD_S) == []
    [(peer, reason)] = liveness.dead(DEAD_S + 0.1)
    assert peer == "a" and "silent" in reason


def test_the_dead_are_named_until_they_are_forgotten() -> None:
    liveness = Liveness()
    liveness.heard("a", 0.0)
    watch(liveness, 0.0, DEAD_S)
    assert liveness.dead(DEAD_S + 0.1) and liveness.dead(DEAD_S + 0.2)
    assert liveness.alive == {"a"}
    liveness.forget("a")
    liveness.forget("a")
    assert liveness.alive == set() and liveness.dead(DEAD_S + 0.3) == []


def test_one_death_is_not_another() -> None:
    liveness = Liveness()
    liveness.heard("silent", 0.0)
    assert {peer for peer, _ in watch(liveness, 0.0, 10.0, "beating")} == {"silent"}


def busy(liveness: Liveness, steps: list[int], *, longest_s: float = 3.0, work: bool = True, start: float = 0.0) -> set[str]:
    """One beat of peer `a` for each step number; who was found dead."""
    found = set()
    for number, step in enumerate(steps):
        now = start + number * BEAT_S
        liveness.beat("a", step, work, longest_s, now)
        found |= {peer for peer, _ in liveness.dead(now)}
    return found


def test_work_without_a_step_is_death_although_beats_come() -> None:
    assert busy(Liveness(), [7] * 7) == set()
    assert busy(Liveness(), [7] * 8) == {"a"}


def test_idle_is_not_death() -> None:
    assert busy(Liveness(), [7] * 100, work=False) == set()


def test_the_clock_of_a_step_starts_with_the_work() -> None:
    liveness = Liveness()
    assert busy(liveness, [7] * 20, work=False) == set()
    assert busy(liveness, [7] * 7, start=10.0) == set()
    assert busy(liveness, [7] * 7, start=13.5) == {"a"}


def test_every_step_starts_the_clock_anew() -> None:
    assert busy(Liveness(), [step for step in range(10) for _ in range(6)]) == set()


def test_the_worker_says_how_long_a_step_may_take() -> None:
    assert busy(Liveness(), [7] * 30, longest_s=20.0) == set()


def test_an_observer_that_was_stopped_gives_everybody_a_fresh_grace() -> None:
    liveness = Liveness()
    liveness.beat("stuck", 1, True, 1.5, 0.0)
    liveness.heard("silent", 0.0)
    assert liveness.dead(0.5) == []
    resumed = 60.0
    assert liveness.dead(resumed) == []
    deaths = watch(liveness, resumed + BEAT_S, resumed + 1.5)
    assert deaths == []
    assert {peer for peer, _ in liveness.dead(resumed + 1.6)} == {"stuck"}
    watch(liveness, resumed + 1.8, resumed + DEAD_S)
    assert {peer for peer, _ in liveness.dead(resumed + DEAD_S + 0.1)} == {"silent", "stuck"}


@given(gaps=st.lists(st.floats(0.01, 5.0), min_size=1, max_size=60), beats=st.lists(st.booleans(), min_size=60, max_size=60))
def test_nobody_dies_who_was_heard_within_dead_s_and_everybody_who_was_not(gaps: list[float], beats: list[bool]) -> None:
    liveness = Liveness()
    liveness.heard("a", 0.0)
    now, grace = 0.0, 0.0
    liveness.dead(now)
    for gap, beat in zip(gaps, beats, strict=False):
        now += gap
        if beat:
            liveness.heard("a", now)
            grace = now
        if gap > PAUSE_S:
            grace = now
        assert bool(liveness.dead(now)) == (now - grace > DEAD_S)
