"""Policies: what shares a launch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.policies import LEAST_TOKENS, POLICIES, Limits, Policy, Share, chunked, decode_first, prefill_first

LIMITS = Limits(budget_tokens=100, chunk_tokens=60, max_batch=8)


@pytest.mark.parametrize(
    ("lacking", "running", "share"),
    [
        ([], 3, Share(3, ())),
        ([], 30, Share(8, ())),
        ([10], 3, Share(0, (10,))),
        ([30, 30, 30, 30], 3, Share(0, (30, 30, 30))),
        ([50, 55, 10], 0, Share(0, (50,))),  # first come first served: the small one behind does not overtake
        ([200], 0, Share(0, (60,))),
        ([10, 200], 0, Share(0, (10, 60))),
        ([50, 200], 0, Share(0, (50, 50))),  # it is cut anyway, so it fills the budget
        ([40, 60, 5], 0, Share(0, (40, 60))),
    ],
)
def test_prefill_first(lacking: list[int], running: int, share: Share) -> None:
    assert prefill_first(lacking, running, LIMITS) == share


def test_decode_first_lets_no_prompt_in_before_all_have_ended() -> None:
    assert decode_first([10], 3, LIMITS) == Share(3, ())
    assert decode_first([10, 200], 0, LIMITS) == prefill_first([10, 200], 0, LIMITS)


def test_prefill_first_runs_one_chunk_beyond_the_budget_but_nothing_beside_it() -> None:
    limits = Limits(budget_tokens=100, chunk_tokens=400, max_batch=8)
    assert prefill_first([1000, 10], 5, limits) == Share(0, (400,))


@pytest.mark.parametrize(
    ("lacking", "running", "share"),
    [
        ([], 3, Share(3, ())),
        ([200], 0, Share(0, (60,))),
        ([200, 200], 5, Share(5, (60, 35))),
        ([50, 55, 10], 0, Share(0, (50, 50))),
        ([50], 30, Share(8, (50,))),
    ],
)
def test_chunked(lacking: list[int], running: int, share: Share) -> None:
    assert chunked(lacking, running, LIMITS) == share


def test_chunked_gives_a_prompt_a_little_though_running_sequences_fill_the_budget() -> None:
    """Or it would never begin while as many run."""
    assert chunked([50], 10, Limits(budget_tokens=4, chunk_tokens=4, max_batch=8)) == Share(8, (4,))
    assert chunked([50, 9], 64, Limits(budget_tokens=64, chunk_tokens=64, max_batch=64)) == Share(64, (LEAST_TOKENS,))


@pytest.mark.parametrize("numbers", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, -1)])
def test_limits_that_allow_nothing_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError):
        Limits(*numbers)


@given(
    st.sampled_from(sorted(POLICIES.values(), key=str)),
    st.lists(st.integers(1, 300), max_size=12),
    st.integers(0, 20),
    st.builds(Limits, st.integers(1, 200), st.integers(1, 200), st.integers(1, 12)),
)
def test_every_share_is_within_limits_in_turn_and_never_empty_without_reason(
    policy: Policy, lacking: list[int], running: int, limits: Limits
) -> None:
    share = policy(lacking, running, limits)
    assert 0 <= share.decodes <= min(running, limits.max_batch)
    assert len(share.prefill) <= len(lacking)
    assert all(0 < tokens <= min(lack, limits.chunk_tokens) for tokens, lack in zip(share.prefill, lacking, strict=False))
    assert sum(share.prefill[1:]) + share.prefill[0] <= max(limits.budget_tokens, share.prefill[0]) if share.prefill else True
    assert share.decodes or share.prefill or not (lacking or running)
