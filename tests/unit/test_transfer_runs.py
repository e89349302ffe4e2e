"""Which pages travel together: what one side chooses, the other can send, and both cut alike."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.transfer.runs import breaks, can_send, complete, message_starts, messages, most_pages

pages = st.lists(st.integers(0, 40), unique=True, max_size=20).map(lambda drawn: sorted(drawn) if len(drawn) % 2 else drawn)


def test_breaks_are_where_pages_do_not_follow() -> None:
    assert breaks(()) == breaks((4,)) == breaks((4, 5, 6)) == ()
    assert breaks((4, 5, 9, 8)) == (2, 3)


def test_a_message_ends_where_either_side_breaks_and_at_its_most() -> None:
    assert message_starts(2, (10, 11, 12, 20, 21, 22, 23), {3}, 3) == (2, 3, 5, 8)
    assert message_starts(0, (), {1}, 3) == ()


def test_without_starts_each_page_is_a_message() -> None:
    assert messages((2, 3, 5), ()) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert messages((), (1, 2)) == []


def test_pages_of_a_message_wait_for_its_last() -> None:
    assert [complete(final, (2, 4, 7)) for final in range(9)] == [0, 0, 2, 2, 4, 4, 4, 7, 7]
    assert complete(5, ()) == 5


def test_a_message_has_a_page_at_least() -> None:
    assert (most_pages(100, 250), most_pages(100, 0)) == (2, 1)


@given(pages, pages, st.integers(0, 5), st.integers(1, 6))
def test_what_is_chosen_can_be_sent_and_lies_together_on_both_sides(ours: list[int], theirs: list[int], shared: int, most: int) -> None:
    needed = min(len(ours), len(theirs))
    ours, theirs, shared = ours[:needed], theirs[:needed], min(shared, needed)
    indices = tuple(range(shared, needed))
    apart = set(breaks(theirs))
    starts = message_starts(shared, ours[shared:], apart, most)
    assert can_send(starts, indices, apart)
    cuts = messages(indices, starts)
    assert [index for cut in cuts for index in indices[cut]] == list(indices)
    assert tuple(indices[cut.start] for cut in cuts) == starts
    for cut in cuts:
        assert len(indices[cut]) <= most
        for side in (ours, theirs):
            assert breaks([side[index] for index in indices[cut]]) == ()
    for final in range(shared, needed):
        assert complete(final, starts) in (*starts, 0)
