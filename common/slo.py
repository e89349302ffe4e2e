"""The one definition of SLO attainment, used by gateway, benchmark, planner and page (DistServe, OSDI 2024, section 2.3).

TTFT is the time to the first token; TPOT a request's mean time per output token after the first. A request attains its
objectives if it meets both; one that failed, was shed or cut never does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Objectives:
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Served:
    """How one request was served. `ok`: it got its whole answer."""

    ttft_s: float
    tpot_s: float
    output_tokens: int
    ok: bool = True


CHATBOT = Objectives(0.5, 0.05)
CODE = Objectives(0.2, 0.02)
SUMMARISATION = Objectives(1.0, 0.1)
NAMED = {
    # the paper's introduction
    "chatbot": CHATBOT,
    "code": CODE,
    "summarisation": SUMMARISATION,
    # its evaluation, by model and data set
    "opt-13b-sharegpt": Objectives(0.25, 0.1),
    "opt-66b-sharegpt": Objectives(2.5, 0.15),
    "opt-66b-sharegpt-artifact": Objectives(0.4, 0.1),
    "opt-175b-sharegpt": Objectives(4.0, 0.2),
    "opt-66b-humaneval": Objectives(0.125, 0.2),
    "opt-66b-longbench": Objectives(15.0, 0.15),
}
"""TTFT / TPOT as published; the artifact's script has other figures than the paper in one case."""


def tpot_s(first_s: float, last_s: float, output_tokens: int) -> float:
    """Mean time per output token after the first; 0 for an answer of one token."""
    return (last_s - first_s) / (output_tokens - 1) if output_tokens > 1 else 0.0


def attains(served: Served, objectives: Objectives) -> bool:
    """Both objectives, jointly. An answer of one token has no TPOT and is judged by its TTFT."""
    if not served.ok or served.output_tokens < 1:
        return False
    paced = served.output_tokens == 1 or served.tpot_s <= objectives.tpot_s
    return served.ttft_s <= objectives.ttft_s and paced


def attainment(served: Iterable[Served], objectives: Objectives) -> float:
    """Share of requests that attain; nan without any."""
    verdicts = [attains(one, objectives) for one in served]
    return sum(verdicts) / len(verdicts) if verdicts else float("nan")
