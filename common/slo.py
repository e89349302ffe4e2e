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
NAMED = {"chatbot": CHATBOT, "code": CODE, "summarisation": SUMMARISATION}
"""The paper's introduction: TTFT / TPOT."""


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
