"""What a request is measured by: fixed objectives, or multiples of what an idle server took for the same prompt length."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from common.slo import NAMED, Objectives, attains
from scripts.load.client import Record


@dataclass(frozen=True)
class Yardstick:
    """`ttft`: (prompt tokens, seconds), ascending, read by linear interpolation and flat beyond its ends; one knot: a fixed objective."""

    ttft: tuple[tuple[int, float], ...]
    tpot_s: float
    ttft_scale: float = 1.0
    tpot_scale: float = 1.0

    def objectives(self, input_tokens: int, scale: float = 1.0) -> Objectives:
        return Objectives(self._ttft_s(input_tokens) * self.ttft_scale * scale, self.tpot_s * self.tpot_scale * scale)

    def _ttft_s(self, tokens: int) -> float:
        at = bisect_left(self.ttft, (tokens, 0.0))
        if at == 0 or at == len(self.ttft):
            return self.ttft[min(at, len(self.ttft) - 1)][1]
        (x0, y0), (x1, y1) = self.ttft[at - 1], self.ttft[at]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def attains(self, record: Record, scale: float = 1.0) -> bool:
        return attains(record.served, self.objectives(record.input_tokens, scale))

    def patience_s(self, records: Iterable[tuple[int, int]], scale: float) -> float:
        """Nobody who is still served after this can attain, even with objectives `scale` times as loose."""
        worst = 0.0
        for input_tokens, output_tokens in records:
            wanted = self.objectives(input_tokens, scale)
            worst = max(worst, wanted.ttft_s + wanted.tpot_s * output_tokens)
        return worst


def fixed(words: str) -> Yardstick:
    """ "chatbot" or "0.5,0.05" (TTFT,TPOT in seconds). Raises ValueError."""
    if words in NAMED:
        return Yardstick(((0, NAMED[words].ttft_s),), NAMED[words].tpot_s)
    try:
        ttft, tpot = (float(part) for part in words.split(","))
    except ValueError:
        raise ValueError(f"--slo {words}: give TTFT,TPOT in seconds or one of {', '.join(NAMED)}") from None
    if not (0 < ttft < 3600 and 0 < tpot < 3600):
        raise ValueError(f"--slo {words}: both must be above 0 and below 3600 seconds")
    return Yardstick(((0, ttft),), tpot)


def scales(words: str) -> tuple[float, float]:
    """ "1.5" for both or "3,1.5" for TTFT and TPOT. Raises ValueError."""
    try:
        parts = [float(part) for part in words.split(",")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or not all(0 < part < 1000 for part in parts):
        raise ValueError(f"--slo-scale {words}: give one factor, or two as TTFT,TPOT")
    return parts[0], parts[-1]
