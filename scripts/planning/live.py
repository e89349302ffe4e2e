"""The workload of a running fleet: what its gateways' clients have asked lately."""

from __future__ import annotations

from collections.abc import Sequence

import httpx
import msgspec

from scripts.load.workloads import Shape, Workload, WorkloadError

TIMEOUT_S = 10.0


class Asked(msgspec.Struct, frozen=True):
    age_s: float
    input_tokens: int
    output_tokens: int


class Demand(msgspec.Struct, frozen=True):
    """`/fleet/demand` of one gateway."""

    requests: list[Asked]


def demanded(urls: Sequence[str], key: str | None) -> tuple[Workload, float]:
    """(workload with times, requests/s over the time that it spans), of all these gateways together. Raises WorkloadError."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return workload([one for url in urls for one in _fetch(f"{url.rstrip('/')}/fleet/demand", headers)])


def workload(asked: Sequence[Asked]) -> tuple[Workload, float]:
    """Raises WorkloadError if no rate can be told."""
    oldest = max((one.age_s for one in asked), default=0.0)
    shapes = sorted((Shape(one.input_tokens, one.output_tokens, oldest - one.age_s) for one in asked), key=lambda shape: shape.at_s or 0.0)
    span_s = shapes[-1].at_s if shapes else None
    if not span_s:
        raise WorkloadError(f"live: {len(shapes)} requests have been answered lately: too few to plan with")
    return Workload("live", tuple(shapes), ""), (len(shapes) - 1) / span_s


def _fetch(url: str, headers: dict[str, str]) -> list[Asked]:
    try:
        answer = httpx.get(url, headers=headers, timeout=TIMEOUT_S)
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=Demand).requests
    except (httpx.HTTPError, msgspec.DecodeError, httpx.InvalidURL) as error:
        raise WorkloadError(f"{url}: {error}") from None
