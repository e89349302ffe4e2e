"""Many fleets through random trouble: every answer is the undisturbed one, every request ends, and nothing is left behind."""

from __future__ import annotations

import pytest

from tests.unit.recovery.trouble import troubled

SEEDS = 120
CHUNK = 20


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_trouble_does_no_harm(first: int) -> None:
    for seed in range(first, first + CHUNK):
        try:
            troubled(seed).settle()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
