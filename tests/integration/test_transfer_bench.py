"""`./scripts/transfer_bench` and the transfer section of `./scripts/gpu_check` measure by this."""

from __future__ import annotations

from services.transfer.bench import Work, measure


def test_every_kind_is_measured_between_two_processes() -> None:
    works = [Work(1, 4096, 1), Work(3, 368_640, 2)]
    found = measure(works)
    assert set(found.medians) == set(works) and found.transport and found.error is None
    assert all(set(seconds) == {"plain", "checked", "memcpy"} and min(seconds.values()) > 0 for seconds in found.medians.values())


def test_what_was_measured_before_a_process_died_is_kept() -> None:
    """The second one is larger than any machine's memory."""
    works = [Work(1, 4096, 1), Work(1 << 20, 1 << 30, 1)]
    found = measure(works)
    assert set(found.medians) == set(works[:1]) and found.error
