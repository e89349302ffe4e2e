"""The figures of a run, from its JSON alone: the paper's two rows, the breakdown, the distributions. PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from scripts.load.client import STAGES
from scripts.load.curve import wilson

COLOURS = {"disaggregated": "#0a7f5a", "colocated": "#c2410c", "chunked": "#1d4ed8"}
OTHERS = ("#7c3aed", "#64748b", "#be185d", "#854d0e")
STAGE_COLOURS = ("#94a3b8", "#2563eb", "#f59e0b", "#cbd5e1", "#0a7f5a", "#ef4444")
DASHES = ("-", "--", ":", "-.")


def draw(result: dict[str, Any], stem: Path) -> list[Path]:
    """All figures beside `stem`; returns the files."""
    styles = _styles(result["targets"])
    figures = {"goodput": _goodput(result, styles), "breakdown": _breakdown(result), "latency": _latency(result, styles)}
    files = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            files.append(stem.with_name(f"{stem.name}-{name}.{kind}"))
            figure.savefig(files[-1], dpi=130, bbox_inches="tight")
        plt.close(figure)
    return files


def _styles(targets: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    kinds = list(dict.fromkeys(target["kind"] for target in targets))
    foreign = [kind for kind in kinds if kind not in COLOURS]
    styles, seen = {}, dict.fromkeys(kinds, 0)
    for target in targets:
        kind = target["kind"]
        colour = COLOURS.get(kind) or OTHERS[foreign.index(kind) % len(OTHERS)]
        styles[target["name"]] = {"color": colour, "linestyle": DASHES[seen[kind] % len(DASHES)]}
        seen[kind] += 1
    return styles


def _title(result: dict[str, Any]) -> str:
    return f"{result['workload']['name']}, {result['objectives']['words']}\n{result['machine']}, {result['made']}"


def _goodput(result: dict[str, Any], styles: dict[str, dict[str, str]]) -> Any:
    """Attainment over rate with 95 % intervals, and over the scale of the objectives at one rate."""
    figure, (over_rate, over_scale) = plt.subplots(2, 1, figsize=(7, 8), layout="constrained")
    for name, style in styles.items():
        points = _pooled(result["trials"], name)
        if points:
            rates, shares, lows, highs = zip(*points, strict=True)
            errors = [
                [max(0, s - low) for s, low in zip(shares, lows, strict=True)],
                [max(0, h - s) for h, s in zip(highs, shares, strict=True)],
            ]
            over_rate.errorbar(rates, shares, errors, marker="o", markersize=4, capsize=2, elinewidth=0.7, label=name, **style)
        if name in result["sweep"]["attainment"]:
            scales, shares = zip(*result["sweep"]["attainment"][name], strict=True)
            over_scale.plot(scales, shares, marker="o", markersize=4, label=name, **style)
    for axis in (over_rate, over_scale):
        for share in (0.9, 0.99):
            axis.axhline(share, color="#999", linewidth=0.7, linestyle=":")
        axis.set(ylim=(0, 1.03), ylabel="attainment of both objectives")
        axis.grid(alpha=0.2)
    over_rate.set(xlabel="requests per second", xlim=(0, None), title=_title(result))
    over_scale.set(xlabel=f"objectives, times those above, at {result['sweep']['rate']:.2f} requests/s")
    over_rate.legend(fontsize=8)
    return figure


def _pooled(trials: list[dict[str, Any]], name: str) -> list[tuple[float, float, float, float]]:
    """(rate, attainment, low, high) of one target, ascending; trials at the same rate count together, void ones do not."""
    counts: dict[float, list[int]] = {}
    for one in trials:
        if one["target"] == name and not one["void"]:
            sums = counts.setdefault(one["rate"], [0, 0])
            sums[0] += one["attained"]
            sums[1] += one["requests"]
    return [(rate, hits / asked, *wilson(hits, asked)) for rate, (hits, asked) in sorted(counts.items())]


def _breakdown(result: dict[str, Any]) -> Any:
    """Mean time in each stage at the sweep's rate."""
    bars = [(name, one["stages_ms"]) for name, one in result["sweep"]["trials"].items() if one.get("stages_ms")]
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.5 * max(1, len(bars))), layout="constrained")
    left = [0.0] * len(bars)
    for stage, colour in zip(STAGES, STAGE_COLOURS, strict=True):
        widths = [max(0.0, stages[stage]) / 1000 for _, stages in bars]
        axis.barh([name for name, _ in bars], widths, left=left, color=colour, label=stage.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set(xlabel="mean seconds of a request", title=f"stages at {result['sweep']['rate']:.2f} requests/s")
    axis.invert_yaxis()
    axis.legend(fontsize=8, ncols=3)
    return figure


def _latency(result: dict[str, Any], styles: dict[str, dict[str, str]]) -> Any:
    """Distributions at the sweep's rate."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (key, words) in zip(axes, (("ttft", "TTFT"), ("tpot", "TPOT"), ("between", "time between tokens")), strict=True):
        for name, style in styles.items():
            values = sorted(result["sweep"]["trials"].get(name, {}).get("values", {}).get(key, ()))
            if values:
                axis.plot(values, [(n + 1) / len(values) for n in range(len(values))], label=name, **style)
        axis.set(xlabel=f"{words}, seconds", ylim=(0, 1.01), xscale="log")
        axis.grid(alpha=0.2)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(fontsize=7)
    figure.suptitle(f"at {result['sweep']['rate']:.2f} requests/s")
    return figure
