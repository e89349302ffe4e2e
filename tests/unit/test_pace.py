"""What an engine says of its own speed."""

from __future__ import annotations

import pytest

from common.messages import Key, Sampling
from services.engine.pace import Clocked, Pace
from services.engine.plan import Chunk, Plan
from services.engine.sequence import Sequence


def plan(*chunks: tuple[int, int]) -> Plan:
    """(start, tokens) of prompts of 100 tokens."""
    sequence = Sequence(Key("r", 0, 1, "e"), [1] * 100, 100, Sampling(), 100)
    return Plan(0, tuple(Chunk(sequence, start, tokens, True, 0) for start, tokens in chunks))


def test_nothing_measured_is_nothing_said() -> None:
    assert Clocked().pace == Pace(0.0, 0.0, 0.0)


def test_the_rate_is_of_prompt_tokens_and_follows_a_change() -> None:
    clocked = Clocked()
    for _ in range(3):
        clocked.note(plan((0, 50), (50, 50), (100, 1)), 0.2)
    assert clocked.pace.prefill_rate == pytest.approx(500)
    for _ in range(40):
        clocked.note(plan((0, 100)), 0.1)
    assert clocked.pace.prefill_rate == pytest.approx(1000, rel=0.05)


def test_a_step_s_time_is_a_line_over_the_batch() -> None:
    clocked = Clocked()
    for batch in (1, 4, 9, 2, 16, 3):
        clocked.note(plan(*[(120, 1)] * batch), 0.02 + 0.003 * batch)
    assert (clocked.pace.step_s, clocked.pace.each_s) == pytest.approx((0.02, 0.003))


def test_a_batch_that_never_changes_has_no_slope() -> None:
    clocked = Clocked()
    for took_s in (0.1, 0.2, 0.1, 0.2):
        clocked.note(plan((120, 1), (120, 1)), took_s)
    assert clocked.pace.each_s == 0.0 and 0.1 < clocked.pace.step_s < 0.2


def test_a_chunk_behind_the_prompt_of_a_resumed_request_is_no_step() -> None:
    """What it had written before is computed again in long chunks: as steps of one sequence they made decoding look slow."""
    clocked = Clocked()
    clocked.note(plan((150, 64)), 0.45)
    assert (clocked.pace.step_s, clocked.pace.prefill_rate) == (0.0, pytest.approx(64 / 0.45))
