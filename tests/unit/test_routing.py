"""Which decode a prompt is offered to: what the prefill remembers of beginnings, and how that weighs against load."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.prefill.routing import MOST_HOLDERS, Holders, Load, choose

CHAIN = [b"0", b"1", b"2", b"3"]
FORK = [b"0", b"1", b"x"]


def idle(**running: int) -> dict[str, Load]:
    return {name: Load(count, 100) for name, count in running.items()}


def test_a_beginning_is_remembered_for_everyone_to_whom_it_was_handed() -> None:
    holders = Holders()
    holders.handed(CHAIN, "a")
    holders.handed(FORK, "b")
    assert holders.held(CHAIN) == {"a": 4, "b": 2}
    assert holders.held(FORK) == {"a": 2, "b": 3}
    assert holders.held([b"y", b"1"]) == {} and holders.held([]) == {}


def test_the_least_recently_handed_is_forgotten_from_its_end() -> None:
    holders = Holders(most=5)
    holders.handed(CHAIN, "a")
    holders.handed([b"y", b"z"], "a")
    assert len(holders) == 5 and holders.held(CHAIN) == {"a": 3}
    holders.handed(CHAIN[:2], "a")
    holders.handed([b"u", b"v"], "a")
    assert holders.held(CHAIN) == {"a": 2} and holders.held([b"y"]) == {"a": 1}


def test_only_the_latest_holders_of_a_page_are_remembered() -> None:
    holders = Holders()
    for number in range(MOST_HOLDERS + 2):
        holders.handed(CHAIN, f"d{number}")
    assert sorted(holders.held(CHAIN)) == sorted(f"d{number}" for number in range(2, MOST_HOLDERS + 2))


@given(st.lists(st.tuples(st.sampled_from([CHAIN, CHAIN[:2], FORK]), st.sampled_from("abc")), max_size=12))
def test_whoever_is_remembered_was_handed_just_that(history: list[tuple[list[bytes], str]]) -> None:
    holders = Holders(most=100)
    for hashes, to in history:
        holders.handed(hashes, to)
    for asked in (CHAIN, FORK):
        handed = {to: max(common(asked, hashes) for hashes, other in history if other == to) for _, to in history}
        assert holders.held(asked) == {to: pages for to, pages in handed.items() if pages}


def common(one: list[bytes], other: list[bytes]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_without_a_holder_it_stays_with_the_less_loaded() -> None:
    assert choose("b", idle(a=2, b=1), {}, 4) == "b"


def test_a_holder_is_preferred_also_when_it_was_not_drawn() -> None:
    assert choose("b", idle(a=1, b=1, c=1), {"c": 3}, 4) == "c"
    assert choose("b", idle(a=1, b=1, c=1), {"a": 1, "c": 3}, 4) == "c"


def test_a_holder_that_is_much_busier_is_not() -> None:
    assert choose("b", idle(a=1, b=0), {"a": 4}, 4) == "a"
    assert choose("b", idle(a=2, b=0), {"a": 4}, 4) == "b"
    assert choose("b", idle(a=10, b=8), {"a": 4}, 4) == "a"
    assert choose("b", idle(a=11, b=8), {"a": 4}, 4) == "b"


def test_a_holder_without_room_for_the_rest_is_not() -> None:
    """What it holds may be kept and used by nobody: then it is among its free pages, and taken from them."""
    assert choose("b", {"a": Load(0, 4), "b": Load(0, 50)}, {"a": 3}, 4) == "b"
    assert choose("b", {"a": Load(0, 5), "b": Load(0, 50)}, {"a": 3}, 4) == "a"
    assert choose("b", {"a": Load(0, 2), "b": Load(0, 2)}, {"a": 3}, 4) == "a", "no tighter than the other"


def test_one_that_has_gone_is_not_offered_anything() -> None:
    assert choose("a", idle(a=5), {"gone": 4}, 4) == "a"


@given(
    st.dictionaries(st.sampled_from("abcd"), st.integers(0, 30), min_size=1), st.dictionaries(st.sampled_from("abcde"), st.integers(1, 6))
)
def test_nobody_is_chosen_that_is_much_busier_than_the_best_of_the_pair(running: dict[str, int], held: dict[str, int]) -> None:
    pair = sorted(running)[:2]
    loads = idle(**running)
    best = min(pair, key=running.__getitem__)
    chosen = choose(best, loads, held, 6)
    assert running[chosen] <= running[best] + max(1, running[best] // 4)
    assert chosen == best or held[chosen] >= 1
