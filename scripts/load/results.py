"""A run as one JSON value with everything needed to draw it again, and the summary that goes to the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scripts.load.client import STAGES, Record
from scripts.load.curve import Curve, wilson
from scripts.load.judge import Yardstick
from scripts.load.targets import Target
from scripts.load.trials import Trial

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)


def quantile(values: Sequence[float], q: float) -> float | None:
    """The value below which a share q lies; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None


def gaps(records: Sequence[Record]) -> list[float]:
    """Times between consecutive pieces of text, seconds."""
    return [later - sooner for record in records for sooner, later in zip(record.at_s, record.at_s[1:], strict=False)]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    return {name: None if (v := quantile(values, q)) is None else round(v, 5) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}


def breakdown(records: Sequence[Record]) -> dict[str, Any]:
    """Mean milliseconds in each stage, transfer's share of the total latency, and how many transfers took at most one decode step."""
    told = [record for record in records if record.stages_ms]
    if not told:
        return {}
    means = {stage: statistics.fmean(record.stages_ms[stage] for record in told) for stage in STAGES}
    handed = [record.stages_ms["transfer"] for record in told if record.stages_ms["transfer"] > 0]
    step = statistics.median(between) if (between := gaps(told)) else 0.0
    return {
        "stages_ms": {stage: round(mean, 3) for stage, mean in means.items()},
        "transfer_share": round(means["transfer"] / max(sum(means.values()), 1e-9), 6),
        "transfers": len(handed),
        "transfers_within_a_step": round(sum(took <= 1000 * step for took in handed) / len(handed), 4) if handed else None,
        "decode_step_ms": round(1000 * step, 3),
    }


def trial_summary(one: Trial, yardstick: Yardstick) -> dict[str, Any]:
    hits = sum(map(yardstick.attains, one.records))
    good = [record for record in one.records if record.error is None]
    low, high = wilson(hits, len(one.records))
    return {
        "target": one.target,
        "rate": round(one.rate, 4),
        "requests": len(one.records),
        "attained": hits,
        "attainment": round(hits / len(one.records), 4),
        "interval95": [round(low, 4), round(high, 4)],
        "void": one.void,
        "late_p99_s": round(one.late_p99_s, 4),
        "failed": len(one.records) - len(good),
        "shed": sum(record.status in (429, 503) for record in one.records),
        "recovered": sum(record.attempts > 1 for record in one.records),
        "ttft_s": spread([record.served.ttft_s for record in good]),
        "tpot_s": spread([record.served.tpot_s for record in good if record.got_tokens > 1]),
        "between_s": spread(gaps(good)),
        "cpu_cores": one.cpu,
        **breakdown(good),
    }


def summary(targets: Sequence[Target], curves: dict[str, Curve], shares: Sequence[float]) -> dict[str, Any]:
    """Goodput of each target, and of each kind the better placement."""
    found: dict[str, Any] = {}
    for target in targets:
        found[target.name] = {f"{share:.0%}": asdict(curves[target.name].goodput(share)) for share in shares}
    best: dict[str, Any] = {}
    for share in shares:
        word = f"{share:.0%}"
        for target in targets:
            rate = found[target.name][word]["rate"]
            if rate >= best.setdefault(target.kind, {}).get(word, {"rate": -1.0})["rate"]:
                best[target.kind][word] = {"rate": rate, "target": target.name, "resolved": found[target.name][word]["resolved"]}
    return {"goodput": found, "best": best}


def sweep(one: Trial, yardstick: Yardstick) -> list[list[float]]:
    """(scale, attainment) of one trial's requests, judged again by objectives that many times as loose."""
    return [[scale, sum(yardstick.attains(record, scale) for record in one.records) / len(one.records)] for scale in SCALES]


def record_body(record: Record) -> dict[str, Any]:
    body = {
        "due_s": round(record.due_s, 4),
        "sent_s": round(record.sent_s, 4),
        "at_s": [round(at, 4) for at in record.at_s],
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "got_tokens": record.got_tokens,
        "attempts": record.attempts,
    }
    return {**body, **({"error": record.error, "status": record.status} if record.error else {}), "stages_ms": record.stages_ms}
