"""How long a launch takes on a device: the latency model. Pure; seconds, tokens, sequences.

The form is that of the simulator in DistServe's artifact (Zhong et al., OSDI 2024, section 3 and appendix A; LLMServe/DistServe,
`simdistserve`, Apache-2.0):

    prefill = a + b·Σl + c·Σl²        l: tokens of each prompt of the launch
    decode  = a + b·Σcontext + c·B    context: tokens of KV of each sequence, B: sequences

Two things are added, because this project's scheduler makes launches that the paper's does not. A chunk of a prompt costs the difference
of two prefixes: c·((start + l)² - start²). A launch of both phases (`chunked`) pays for its prompts, and for its decodes what they cost
beyond `a`: weights are read once. That the decodes' tokens take part in the prompts' matrix products costs nothing but `c·B`, which
flatters `chunked` a little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.engine.budgets import LENGTHS, chunk_within, saturating
from services.engine.plan import Plan


@dataclass(frozen=True, slots=True)
class Coefficients:
    """a in seconds; b and c in seconds per what they multiply."""

    a: float
    b: float
    c: float

    def seconds(self, x: float, y: float) -> float:
        return self.a + self.b * x + self.c * y

    def slowed(self, factor: float) -> Coefficients:
        return Coefficients(factor * self.a, factor * self.b, factor * self.c)


@dataclass(frozen=True, slots=True)
class LaunchModel:
    """One tensor-parallel degree. Decode may have two fits, below and from `knee` sequences on."""

    prefill: Coefficients
    decode: Coefficients
    decode_large: Coefficients | None = None
    knee: int = 0
    overhead_s: float = 0.0
    """Of every launch: scheduling, and whatever a profile's points leave out."""
    hop_s: float = 0.0
    """Each pipeline stage of a prefill launch takes `hop_s` times the stages longer (1 ms in the artifact, at one stage too)."""

    def prefill_s(self, tokens: float, squares: float) -> float:
        """A launch of prompts only: Σl and Σl² of whole prompts."""
        return self.prefill.seconds(tokens, squares) + self.overhead_s

    def decode_s(self, batch: int, context_tokens: float) -> float:
        """A decode step of `batch` sequences with so many tokens of KV in all."""
        return self._decode(batch).seconds(context_tokens, batch) + self.overhead_s

    def stage_s(self, plan: Plan, pp: int = 1) -> float:
        """Time a launch spends in each of `pp` pipeline stages."""
        tokens = squares = batch = context = 0
        for chunk in plan.chunks:
            if chunk.tokens == 1 and chunk.draws:
                batch += 1
                context += chunk.start
            else:
                end = chunk.start + chunk.tokens
                tokens += chunk.tokens
                squares += end * end - chunk.start * chunk.start
        if not tokens:
            return self.decode_s(batch, context) / pp
        seconds = self.prefill.seconds(tokens, squares)
        if batch:
            decode = self._decode(batch)
            seconds = max(seconds, decode.a) + decode.b * context + decode.c * batch
        return (seconds + self.overhead_s) / pp + self.hop_s * pp

    def slowed(self, factor: float) -> LaunchModel:
        """Every launch takes so many times as long."""
        return replace(
            self,
            prefill=self.prefill.slowed(factor),
            decode=self.decode.slowed(factor),
            decode_large=self.decode_large and self.decode_large.slowed(factor),
            overhead_s=factor * self.overhead_s,
        )

    def limits(self, page_tokens: int, chunk_s: float) -> tuple[int, int]:
        """(budget, chunk) tokens of a launch, by the rule with which a worker calibrates itself at start."""
        rates = {length: length / self.prefill_s(length, length * length) for length in LENGTHS}
        return saturating(rates), chunk_within(chunk_s, max(rates.values()), page_tokens)

    def _decode(self, batch: int) -> Coefficients:
        return self.decode_large if self.decode_large is not None and batch >= self.knee else self.decode
