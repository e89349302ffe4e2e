"""What the planner found, for people: a table, a plot, one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.slo import Objectives
from scripts.load.curve import wilson
from scripts.planning.against import Compared
from services.planner.goodput import Rated
from services.planner.placement import Colocated, Placement
from services.planner.planner import Answer
from services.planner.trial import Verdict

COLOURS = ("#0a7f5a", "#c2410c", "#1d4ed8")


def table(answer: Answer) -> str:
    """The finalists, best first."""
    rows = [("", "placement", "GPUs", "requests/s", "95 % interval", "per GPU")]
    for words, one in finalists(answer):
        interval = f"{one.low:.2f} to {one.high:.2f}"
        rows.append((words, str(one.where), str(one.where.devices), f"{one.goodput:.2f}", interval, f"{one.per_device:.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = [
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join(["", *lines, ""])


def finalists(answer: Answer) -> list[tuple[str, Rated]]:
    """(its titles, what it reaches), each placement once, the chosen one first."""
    titled: dict[str, tuple[list[str], Rated]] = {}
    for title, one in (
        ("chosen", answer.chosen),
        ("runner-up", answer.runner_up),
        ("best disaggregated", answer.best_disaggregated),
        ("best colocated", answer.best_colocated),
    ):
        if one is not None:
            titled.setdefault(str(one.where), ([], one))[0].append(title)
    return [(", ".join(titles), one) for titles, one in titled.values()]


def sentence(answer: Answer, rate: float | None) -> str:
    """The answer in words."""
    apart, together = answer.best_disaggregated, answer.best_colocated
    if answer.verdict == "either":
        words = "Disaggregated or colocated: the difference is within what chance makes."
    elif answer.verdict == "disaggregate":
        words = "Disaggregate"
        words += (
            f": {apart.per_device / together.per_device:.2f} times the goodput per GPU." if apart and together and together.goodput else "."
        )
    else:
        words = "Do not disaggregate"
        words += f": it would reach {apart.per_device / answer.chosen.per_device:.2f} times the goodput per GPU." if apart else "."
    if not answer.reaches_rate:
        words += f" {answer.chosen.where.devices} GPUs reach {answer.chosen.goodput:.2f} of the {rate:g} requests/s."
    return words


def brief(one: Rated | None) -> dict[str, Any] | None:
    if one is None:
        return None
    where = one.where
    return {
        "placement": str(where),
        "gpus": where.devices,
        "goodput": round(one.goodput, 4),
        "low": round(one.low, 4),
        "high": round(one.high, 4),
        "per_gpu": round(one.per_device, 4),
    }


def as_json(answer: Answer) -> dict[str, Any]:
    return {
        "verdict": answer.verdict,
        "chosen": brief(answer.chosen),
        "runner_up": brief(answer.runner_up),
        "best_colocated": brief(answer.best_colocated),
        "best_disaggregated": brief(answer.best_disaggregated),
        "reaches_rate": answer.reaches_rate,
        "algorithm": answer.algorithm,
    }


def draw(curves: Sequence[tuple[Placement, Sequence[Verdict]]], title: str, objectives: Objectives, share: float, path: Path) -> None:
    """Joint attainment over the rate per GPU, with Wilson's 95 % intervals."""
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for (where, verdicts), colour in zip(curves, COLOURS, strict=False):
        rates = [verdict.rate * _units(where) / where.devices for verdict in verdicts]
        shares = [verdict.hits / verdict.asked for verdict in verdicts]
        errors = _errors([(verdict.hits, verdict.asked) for verdict in verdicts])
        axis.errorbar(rates, shares, errors, marker="o", markersize=4, capsize=2, elinewidth=0.7, color=colour, label=str(where))
    axis.axhline(share, color="#999", linewidth=0.7, linestyle=":")
    axis.set(ylim=(0, 1.03), xlim=(0, None), xlabel="requests per second and GPU")
    axis.set(ylabel=f"TTFT ≤ {objectives.ttft_s:g} s and TPOT ≤ {objectives.tpot_s:g} s", title=title)
    axis.grid(alpha=0.2)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_against(results: Sequence[Compared], title: str, share: float, path: Path) -> None:
    """Attainment over the rate: trials with Wilson's 95 % intervals, and what the simulator says of the same requests."""
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for one, colour in zip(results, COLOURS, strict=False):
        rates = [rate for rate, *_ in one.trials]
        shares = [hits / asked for _, asked, hits, _ in one.trials]
        errors = _errors([(hits, asked) for _, asked, hits, _ in one.trials])
        simulated = [hits / asked for _, asked, _, hits in one.trials]
        axis.errorbar(
            rates, shares, errors, marker="o", linestyle="", markersize=4, capsize=2, elinewidth=0.7, color=colour, label=one.target
        )
        axis.plot(rates, simulated, marker="x", markersize=5, linewidth=0.9, color=colour, label=f"{one.target}, simulated")
    axis.axhline(share, color="#999", linewidth=0.7, linestyle=":")
    axis.set(ylim=(0, 1.03), xlim=(0, None), xlabel="requests per second", ylabel="both objectives met", title=title)
    axis.grid(alpha=0.2)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _errors(trials: Sequence[tuple[int, int]]) -> list[list[float]]:
    """Below and above each (hits, asked): Wilson's 95 % interval."""
    spans = [(hits / asked, *wilson(hits, asked)) for hits, asked in trials]
    return [[max(0.0, one - low) for one, low, _ in spans], [max(0.0, high - one) for one, _, high in spans]]


def _units(where: Placement) -> int:
    return 1 if isinstance(where, Colocated) else where.units
