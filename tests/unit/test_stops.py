"""Stop strings: held back no longer than needed, cut at the first one, whatever pieces the text comes in."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.text import Stops

LETTERS = st.text("ab ", max_size=30)
STOPS = st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow reference: what stands before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


@given(text=LETTERS, strings=STOPS, cuts=st.lists(st.integers(0, 30), max_size=10))
def test_any_pieces_give_the_reference(text: str, strings: list[str], cuts: list[int]) -> None:
    stops = Stops(strings)
    shown = "".join(stops.add(piece) for piece in pieces(text, cuts))
    shown += stops.end()
    assert (shown, stops.hit) == cut(text, strings)


@given(text=LETTERS, strings=STOPS)
def test_only_what_may_become_a_stop_is_held_back(text: str, strings: list[str]) -> None:
    stops = Stops(strings)
    shown = ""
    for at, character in enumerate(text):
        shown += stops.add(character)
        if stops.hit:
            return
        held = text[len(shown) : at + 1]
        assert held == "" or any(string.startswith(held) for string in strings)


def test_a_stop_string_across_pieces() -> None:
    stops = Stops(["of Fra"])
    assert [stops.add(piece) for piece in ("The capital", " o", "f", " F", "rance", " is")] == ["The capital", " ", "", "", "", ""]
    assert stops.hit and stops.end() == ""


def test_the_stop_that_is_complete_first_counts() -> None:
    """In one piece as in three: the longer one begins earlier, but ends later."""
    together, apart = Stops(["abc", "b"]), Stops(["abc", "b"])
    assert together.add("abc") == "a" == "".join(apart.add(character) for character in "abc")


def test_a_false_alarm_is_shown() -> None:
    stops = Stops(["ab!"])
    assert [stops.add("xab"), stops.add("c"), stops.add("ab"), stops.end()] == ["x", "abc", "", "ab"]
    assert not stops.hit


def test_nothing_is_shown_after_a_hit() -> None:
    stops = Stops(["."])
    assert stops.add("one. two") == "one"
    assert stops.add(" three") == "" and stops.end() == ""
