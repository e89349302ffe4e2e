"""Which placements are worth a simulation: what DistServe's Algorithms 1 and 2 enumerate (OSDI 2024, section 4); first guesses. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from services.planner.costs import Costs, Parallel
from services.planner.goodput import Wanted
from services.planner.lanes import MAX_BATCH
from services.planner.placement import Disaggregated, Group

Algorithm = Literal[1, 2]
PIPELINES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Cluster:
    """`gpus` devices in all, as many on each of `nodes` nodes."""

    gpus: int
    nodes: int = 1

    @property
    def per_node(self) -> int:
        return self.gpus // self.nodes


def algorithm_for(cluster: Cluster, costs: Costs) -> Algorithm:
    """1 where handoffs may go anywhere: on one node, or with a network half as fast as the node's own ways. Otherwise 2."""
    return 1 if cluster.nodes == 1 or costs.network_bytes_per_s * 2 >= costs.transfer_bytes_per_s else 2


def parallels(cluster: Cluster, costs: Costs, longest_tokens: int) -> list[Parallel]:
    """Degrees that the cluster can hold, whose launches are known and in whose pool the longest request fits. Fewest devices first.

    Tensor parallelism stays within a node. Each of the pp lanes of a worker must hold the longest request.
    """
    found = []
    for tp in sorted(costs.launches):
        for pp in PIPELINES:
            parallel = Parallel(tp, pp)
            if tp > cluster.per_node or parallel.devices > cluster.gpus or (costs.layers and costs.layers % pp):
                continue
            if costs.pages(parallel) // pp * costs.page_tokens >= longest_tokens:
                found.append(parallel)
    return sorted(found, key=lambda one: (one.devices, one.pp))


def prefill_guess(costs: Costs, parallel: Parallel, wanted: Wanted) -> float:
    """Requests/s that one prefill may attain: six tenths of what prompts of the mean length allow one by one."""
    length = wanted.mean_input_tokens
    return 0.6 * parallel.pp / costs.launches[parallel.tp].prefill_s(length, length * length)


def decode_guess(costs: Costs, parallel: Parallel, wanted: Wanted) -> float:
    """Requests/s of one decode whose lanes each run as many sequences as the TPOT objective and the pages allow."""
    context = wanted.mean_input_tokens + wanted.mean_output_tokens / 2
    room = costs.pages(parallel) // parallel.pp * costs.page_tokens / context
    model, batch = costs.launches[parallel.tp], 1
    while batch < min(MAX_BATCH, room) and model.decode_s(batch + 1, (batch + 1) * context) <= wanted.objectives.tpot_s:
        batch += 1
    return parallel.pp * batch / (wanted.mean_output_tokens * model.decode_s(batch, batch * context))


def colocated_guess(costs: Costs, parallel: Parallel, wanted: Wanted) -> float:
    return 1 / (1 / prefill_guess(costs, parallel, wanted) + 1 / decode_guess(costs, parallel, wanted))


def pairs(
    cluster: Cluster, algorithm: Algorithm, prefills: Mapping[Parallel, float], decodes: Mapping[Parallel, float]
) -> Iterator[tuple[float, Disaggregated]]:
    """Every placement of replicas over the cluster, with what its phases alone promise: (requests/s, placement).

    Algorithm 1 puts workers anywhere; beyond one node its handoffs cross the network. Algorithm 2 repeats units of one node, or of several
    whose pipelines are cut into as many segments, each node with the same segment of both phases: pages never leave a node.
    """
    if algorithm == 1:
        for n, p, m, d in _mixes(cluster.gpus, prefills, decodes):
            where = Disaggregated(Group(p, n), Group(d, m), across_nodes=n * p.devices + m * d.devices > cluster.per_node)
            yield min(n * prefills[p], m * decodes[d]), where
        return
    for segments in range(1, cluster.nodes + 1):
        for n, p, m, d in _mixes(cluster.per_node * segments, prefills, decodes):
            if p.pp % segments == 0 and d.pp % segments == 0 and (segments == 1 or n * p.devices + m * d.devices > cluster.per_node):
                for units in range(1, cluster.nodes // segments + 1):
                    yield units * min(n * prefills[p], m * decodes[d]), Disaggregated(Group(p, n), Group(d, m), units)


def _mixes(
    gpus: int, prefills: Mapping[Parallel, float], decodes: Mapping[Parallel, float]
) -> Iterator[tuple[int, Parallel, int, Parallel]]:
    for p in prefills:
        for d in decodes:
            for n in range(1, gpus // p.devices + 1):
                for m in range(1, (gpus - n * p.devices) // d.devices + 1):
                    yield n, p, m, d
