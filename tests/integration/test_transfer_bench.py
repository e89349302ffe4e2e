"""`./scripts/transfer_bench` and the transfer section of `./scripts/gpu_check` measure by this."""

from __future__ import annotations

from services.transfer.bench import Work, measure


def test_every_kind_is_measured_between_two_processes() -> None:
    works = [Work(1, 4096, 1), Work(3, 368_640, 2)]
    medians, transport = measure(works)
    assert set(medians) == set(works) and transport
    assert all(set(seconds) == {"plain", "checked", "memcpy"} and min(seconds.values()) > 0 for seconds in medians.values())
