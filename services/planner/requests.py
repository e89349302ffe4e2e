"""What is asked in a trial, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from common.messages import Key, Sampling
from common.slo import Served, tpot_s
from services.engine.plan import Drawn
from services.engine.sequence import Sequence

GREEDY = Sampling(temperature=0)
_executions = count()


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a workload. `at`: when it is due if one request comes a second in the mean; a rate divides it."""

    at: float
    input_tokens: int
    output_tokens: int


@dataclass(eq=False, slots=True)
class Request:
    """An ask under way. `drawn`: output tokens that its client has, as far as anybody has noted them."""

    number: int
    due_s: float
    input_tokens: int
    output_tokens: int
    drawn: int = 0
    first_s: float | None = None
    done_s: float | None = None
    refused: bool = False
    preempted: bool = False
    """Has lost its pages once: what it may need is reserved from then on."""

    def sequence(self, *, parks: bool) -> Sequence:
        """A new execution, with the tokens drawn so far as accepted ones. Ids do not matter: nothing is shared."""
        key = Key(str(self.number), 0, 0, str(next(_executions)))
        ids = [0] * (self.input_tokens + self.drawn)
        return Sequence(key, ids, self.input_tokens, GREEDY, self.output_tokens, order=self.due_s, parks=parks, reserve_all=self.preempted)

    def drew(self, outcome: Drawn, now: float) -> None:
        self.drawn = outcome.token.index + 1
        if self.first_s is None:
            self.first_s = now
        if outcome.finish is not None:
            self.done_s = now

    def refuse(self, now: float) -> None:
        """It can never fit."""
        self.refused, self.done_s = True, now

    def served(self) -> Served:
        """For `common.slo`. One that has not ended by the end of the trial, or was refused, has not been served."""
        if self.first_s is None or self.done_s is None or self.refused:
            return Served(0.0, 0.0, self.drawn, ok=False)
        return Served(self.first_s - self.due_s, tpot_s(self.first_s, self.done_s, self.output_tokens), self.output_tokens)
