"""`./scripts/transfer_bench` and the transfer section of `./scripts/gpu_check` measure by this."""

from __future__ import annotations

import sys

import pytest
import torch

from services.transfer import bench
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


@pytest.mark.parametrize(
    "words",
    ["--sizes 0", "--sizes 4096 -1", "--page-bytes 0", "--page-bytes 6", "--repeats 0", "--repeats x", "--run-bytes -5", "--device cuda"],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["transfer_bench", *words.split()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it has begun"))
    with pytest.raises(SystemExit) as end:
        bench.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1 and words.split()[0].strip("-") in err
