"""The whole search on a small machine: when to disaggregate and when not, on how many devices, and which placements are looked at."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from common.slo import Objectives
from services.planner import paper
from services.planner.candidates import Cluster, algorithm_for, pairs, parallels
from services.planner.costs import Costs, Parallel
from services.planner.goodput import Rated, Wanted, rated
from services.planner.latency import Coefficients, LaunchModel
from services.planner.placement import Colocated, Disaggregated, Group
from services.planner.planner import Answer, PlanError, plan
from services.planner.requests import Ask
from tests.unit.planner.machines import LAUNCH, machine

ONE = Parallel(1, 1)


def want(ttft_s: float, tpot_s: float, *, prompt: int = 1000, output: int = 20) -> Wanted:
    def source(count: int, seed: int) -> Sequence[Ask]:
        draw = random.Random(seed)
        at, asks = 0.0, []
        for _ in range(count):
            asks.append(Ask(at, prompt, output))
            at += draw.expovariate(1.0)
        return asks

    return Wanted(source, Objectives(ttft_s, tpot_s), 0.9, prompt, output)


def found(costs: Costs, wanted: Wanted, gpus: int, rate: float | None = None) -> Answer:
    said: list[str] = []
    answer = plan(costs, wanted, Cluster(gpus), 1100, said.append, rate=rate, seeds=(1, 2, 3), most_stages=1)
    assert len(said) >= len(answer.prefills) + len(answer.decodes) + len(answer.tried)
    return answer


def test_strict_pace_wants_prefill_and_decode_apart() -> None:
    """A prompt stalls everybody for 110 ms; a pace of 16 ms leaves no room for even one stall in twenty tokens."""
    answer = found(machine(32768), want(0.5, 0.016), 3)
    assert answer.verdict == "disaggregate"
    assert isinstance(answer.chosen.where, Disaggregated)
    assert answer.best_colocated is None or answer.best_colocated.per_device < answer.chosen.per_device
    assert answer.chosen.low <= answer.chosen.goodput <= answer.chosen.high


def test_a_loose_pace_does_not() -> None:
    """Twenty tokens may take 20 s: whoever has both phases on each device wastes nothing."""
    answer = found(machine(32768), want(0.5, 1.0), 2)
    assert answer.verdict == "do not disaggregate"
    assert isinstance(answer.chosen.where, Colocated)
    assert answer.best_disaggregated is not None
    assert answer.best_disaggregated.per_device < answer.chosen.per_device


def test_one_device_cannot_be_two_workers() -> None:
    answer = found(machine(32768), want(0.5, 0.05), 1)
    assert answer.verdict == "do not disaggregate"
    assert answer.best_disaggregated is None


def test_a_rate_is_reached_on_the_fewest_devices() -> None:
    little = found(machine(32768), want(0.5, 0.016), 3, rate=4.0)
    assert little.reaches_rate and little.chosen.goodput >= 4.0
    assert little.chosen.where.devices == 2
    assert not found(machine(32768), want(0.5, 0.016), 2, rate=100.0).reaches_rate


def test_nothing_to_choose_from_is_said() -> None:
    with pytest.raises(PlanError, match="can hold a request of 1100 tokens"):
        found(machine(512), want(0.5, 0.05), 4)
    with pytest.raises(PlanError, match="meets the objectives at any rate"):
        found(machine(32768), want(0.05, 0.05), 2)


def test_a_mix_follows_the_work() -> None:
    """Prompts that take long and answers that are short: more prefills than decodes."""
    where = found(machine(32768, page_s=1e-5), want(0.6, 0.016, prompt=1000, output=10), 3).best_disaggregated
    assert where is not None and where.where == Disaggregated(Group(ONE, 2), Group(ONE, 1))


# -------------------------------------------------------------------------------------------------------------- candidates


def test_degrees_that_hold_the_model_and_the_longest_request() -> None:
    large = paper.costs("distserve-a100-opt-66b")
    assert parallels(Cluster(8), large, 2048) == [
        Parallel(2, 1),
        Parallel(4, 1),
        Parallel(2, 2),
        Parallel(8, 1),
        Parallel(4, 2),
        Parallel(2, 4),
    ]
    assert Parallel(8, 1) not in parallels(Cluster(8, 2), large, 2048), "tensor parallelism stays within a node"
    assert all(parallel.devices > 2 for parallel in parallels(Cluster(8), large, 20_000))
    odd = Costs(**{**{name: getattr(large, name) for name in large.__slots__}, "layers": 30})
    assert {parallel.pp for parallel in parallels(Cluster(16), odd, 2048)} == {1, 2}


def test_algorithm_1_fills_the_cluster_and_2_stays_within_nodes() -> None:
    wide = Parallel(2, 1)
    phases = {ONE: 1.0, wide: 3.0}
    one = [where for _, where in pairs(Cluster(4, 2), 1, phases, phases)]
    assert Disaggregated(Group(ONE, 3), Group(ONE, 1), across_nodes=True) in one
    assert Disaggregated(Group(ONE, 1), Group(ONE, 1)) in one
    assert max(where.devices for where in one) == 4
    two = [where for _, where in pairs(Cluster(4, 2), 2, phases, phases)]
    assert not any(where.across_nodes for where in two)
    assert all(where.prefill.devices + where.decode.devices <= 2 for where in two)
    assert Disaggregated(Group(ONE, 1), Group(ONE, 1), units=2) in two
    promise = {where: rate for rate, where in pairs(Cluster(8), 1, phases, phases)}
    assert promise[Disaggregated(Group(wide, 2), Group(ONE, 4))] == 4.0


def test_algorithm_2_cuts_pipelines_where_a_node_is_too_small() -> None:
    """Two stages of each phase: on two nodes of two devices, each node has one stage of both."""
    deep = {Parallel(1, 2): 1.0}
    assert [where for _, where in pairs(Cluster(4, 2), 2, deep, deep)] == [
        Disaggregated(Group(Parallel(1, 2), 1), Group(Parallel(1, 2), 1))
    ]


def test_the_network_decides_which_algorithm() -> None:
    slow = machine()
    assert algorithm_for(Cluster(8), slow) == 1
    assert algorithm_for(Cluster(8, 2), slow) == 2
    fast = Costs(**{**{name: getattr(slow, name) for name in slow.__slots__}, "network_bytes_per_s": slow.transfer_bytes_per_s})
    assert algorithm_for(Cluster(8, 2), fast) == 1


# -------------------------------------------------------------------------------------------------------------- the paper


def test_disaggregation_doubles_the_goodput_of_the_motivating_case() -> None:
    """Section 2 of the paper: prompts of 512, answers of 64, 13B on A100s, objectives that its own figures imply (docs/planner.md)."""
    costs, strict = paper.costs("vllm-a100-opt-13b"), want(0.25, 0.034, prompt=512, output=64)
    colocated = rated(costs, Colocated(Group(ONE, 1)), strict, 1.6, resolution=1.1)
    apart = rated(costs, Disaggregated(Group(ONE, 2), Group(ONE, 1)), strict, 10.0, resolution=1.1)
    assert 1.2 < colocated.per_device < 2.0
    assert 1.8 < apart.per_device / colocated.per_device < 3.0


def test_tensor_parallel_workers_are_chosen_where_one_device_is_too_slow() -> None:
    halved = LaunchModel(
        Coefficients(LAUNCH.prefill.a / 2, LAUNCH.prefill.b / 2, 0.0), Coefficients(LAUNCH.decode.a / 2, 0.0, LAUNCH.decode.c / 2)
    )
    costs = machine(32768, tps=(1,))
    costs = Costs(**{**{name: getattr(costs, name) for name in costs.__slots__}, "launches": {1: LAUNCH, 2: halved}})
    answer = found(costs, want(0.09, 0.1), 4)
    parts: list[Rated] = [one for one in (answer.best_colocated, answer.best_disaggregated) if one is not None]
    for one in parts:
        group = one.where.group if isinstance(one.where, Colocated) else one.where.prefill  # type: ignore[union-attr]
        assert group.parallel.tp == 2
