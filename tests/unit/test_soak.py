"""`./scripts/soak`: equal windows, so that any can be compared with any other."""

from __future__ import annotations

import pytest

from scripts.faults.soak import WINDOW_S, numbers, schedule, times
from scripts.load.client import Record


def test_every_window_is_the_first_one_later() -> None:
    window_s, windows = schedule(1800.0, 0.5, 1)
    assert (window_s, len(windows)) == (WINDOW_S, 6)
    assert len(windows[0]) == 150 and windows[0][0] >= 0 and windows[0][-1] < WINDOW_S
    for number, window in enumerate(windows):
        assert [at - number * WINDOW_S for at in window] == pytest.approx(windows[0])
    assert schedule(60.0, 1.0, 1)[0] == 15.0 and len(schedule(60.0, 1.0, 1)[1]) == 4


def test_windows_ask_the_same_lengths_and_never_the_same_text() -> None:
    """A question's number says both: its remainder the lengths, the number itself the text."""
    asked = numbers([[0.0] * 5, [0.0] * 5, [0.0] * 5], shapes=3)
    assert len(set(asked)) == 15
    assert [number % 3 for number in asked[:5]] == [number % 3 for number in asked[5:10]] == [number % 3 for number in asked[10:]]


def test_times_are_of_each_window() -> None:
    _, windows = schedule(1200.0, 0.05, 1)
    records = [
        Record(due_s=at, input_tokens=1, output_tokens=1, at_s=[at + 1 + n], got_tokens=1) for n, w in enumerate(windows) for at in w
    ]
    found = times(records, windows)
    assert [window["p50_ms"] for window in found] == [1000.0, 2000.0, 3000.0, 4000.0]
    assert all(window["requests"] == len(windows[0]) for window in found)
