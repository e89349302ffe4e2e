"""The demand of a running fleet as a workload."""

from __future__ import annotations

import msgspec
import pytest

from gateway.ask import Timeline
from gateway.metrics import Metrics
from scripts.load.workloads import WorkloadError
from scripts.planning.live import Asked, Demand, demanded, workload


def test_ages_of_several_gateways_become_one_trace() -> None:
    found, rate = workload([Asked(10.0, 100, 5), Asked(4.0, 300, 7), Asked(8.0, 200, 6)])
    assert [(shape.at_s, shape.input_tokens, shape.output_tokens) for shape in found.shapes] == [
        (0.0, 100, 5),
        (2.0, 200, 6),
        (6.0, 300, 7),
    ]
    assert found.timed and rate == pytest.approx(2 / 6)


@pytest.mark.parametrize("asked", [[], [Asked(3.0, 10, 2)], [Asked(3.0, 10, 2)] * 2])
def test_too_few_tell_no_rate(asked: list[Asked]) -> None:
    with pytest.raises(WorkloadError, match="too few"):
        workload(asked)


def test_a_gateway_that_is_not_there_is_named() -> None:
    with pytest.raises(WorkloadError, match=r"http://127\.0\.0\.1:9/fleet/demand"):
        demanded(["http://127.0.0.1:9/"], None)


def test_a_gateway_tells_whole_answers_and_their_prompts_once() -> None:
    metrics = Metrics()
    metrics.ended("stop", Timeline(ttft_s=0.1, total_s=2.0), 30, 11)
    metrics.ended("stop", Timeline(ttft_s=0.1, total_s=2.0), 0, 9)
    metrics.ended("cancelled", Timeline(ttft_s=0.1, total_s=1.0), 40, 3)
    (one,) = msgspec.convert(metrics.demand.body(1e9), Demand).requests
    assert (one.input_tokens, one.output_tokens) == (30, 11)
