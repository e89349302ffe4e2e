"""DistServe's A100 figures as a built-in machine: OPT on A100-80GB SXM, float16.

Source: the public artifact of Zhong et al., OSDI 2024 (LLMServe/DistServe at 82831f1, `simdistserve/estimators/profile_data`, Apache-2.0):
latency coefficients in milliseconds, and the tokens of KV that fit. `distserve` are the paper's own engine's figures, `vllm` those of the
vLLM that it compares with (its ratios contain that difference). The artifact charges nothing for the transfer; here NVLink inside a
node and 25 Gbit/s between nodes (the paper's testbed) do.
"""

from __future__ import annotations

from services.planner.costs import Costs
from services.planner.latency import Coefficients, LaunchModel

KNEE = 95
"""Sequences from which on the artifact uses its second decode fit."""
HOP_S = 0.001
NVLINK_BYTES_PER_S = 200e9
"""Of the 300 GB/s that an A100 SXM has each way, what a copy of pages may reach: an assumption, the paper gives no figure."""
NETWORK_BYTES_PER_S = 25e9 / 8

Triple = tuple[float, float, float]
TABLE: dict[tuple[str, str], dict[int, tuple[Triple, Triple, Triple]]] = {
    ("distserve", "13b"): {
        1: ((18.1025, 0.101912, 7.1223e-6), (19.9347, 6.2694e-4, 0.038507), (7.1662, 5.7980e-4, 0.158311)),
        2: ((14.7430, 0.068577, 2.4496e-6), (13.2948, 3.4109e-4, 0.062963), (10.6387, 3.1183e-4, 0.085629)),
        4: ((12.0623, 0.038081, 5.2262e-7), (10.2562, 1.8787e-4, 0.032693), (10.4835, 1.7121e-4, 0.045666)),
    },
    ("distserve", "66b"): {
        2: ((43.0588, 0.274229, 2.2478e-5), (48.2880, 9.4243e-4, 0.127550), (28.7277, 4.7448e-4, 0.296178)),
        4: ((29.4416, 0.151352, 8.3175e-6), (30.7603, 4.5195e-4, 0.063284), (27.4708, 4.0468e-4, 0.124807)),
        8: ((25.4907, 0.106592, 3.3911e-6), (23.1551, 2.2691e-4, 0.048006), (21.7177, 3.7581e-4, 0.089786)),
    },
    ("vllm", "13b"): {
        1: ((22.0522, 0.140509, 8.0766e-6), (23.4750, 5.9293e-4, 0.060727), (20.2064, 4.9077e-4, 0.120003)),
        2: ((27.4408, 0.090545, 8.4521e-6), (24.5406, 2.2440e-4, 0.087158), (17.9478, 4.5709e-4, 0.111791)),
        4: ((30.5363, 0.051506, 4.2325e-7), (25.9011, 7.7536e-5, 0.055281), (23.8839, 2.8400e-4, 0.062763)),
    },
    ("vllm", "66b"): {
        4: ((42.9655, 0.212866, 4.6010e-5), (39.5818, 6.9457e-4, 0.135809), (40.8597, 4.2649e-4, 0.195084)),
        8: ((38.9312, 0.157368, 4.5317e-6), (31.1760, 2.7557e-4, 0.067977), (29.0878, 6.0277e-4, 0.138961)),
    },
}
"""(engine, model) → tensor-parallel degree → prefill, decode below the knee, decode from it on; milliseconds."""
SIZES = {"13b": (40, 5120, 96_864, 30_720), "66b": (64, 9216, 33_456, 55_312)}
"""Layers, hidden size, and tokens of KV: each device adds the third, the weights cost the fourth (the artifact's table, to 16 tokens)."""
NAMED = {f"{engine}-a100-opt-{size}": (engine, size) for engine, size in TABLE}


def costs(name: str) -> Costs:
    """One of `NAMED`. Raises KeyError."""
    engine, size = NAMED[name]
    layers, hidden, added, weights = SIZES[size]
    kv = float(2 * 2 * layers * hidden)
    launches = {}
    for tp, triples in TABLE[engine, size].items():
        prefill, small, large = (Coefficients(a / 1000, b / 1000, c / 1000) for a, b, c in triples)
        launches[tp] = LaunchModel(prefill, small, large, KNEE, hop_s=HOP_S)
    return Costs(
        name=f"OPT-{size.upper()} on A100-80GB ({engine})",
        launches=launches,
        memory_bytes=added * kv,
        weight_bytes=weights * kv,
        kv_bytes_per_token=kv,
        transfer_bytes_per_s=NVLINK_BYTES_PER_S,
        network_bytes_per_s=NETWORK_BYTES_PER_S,
        layers=layers,
        source="coefficients of DistServe's artifact",
    )
