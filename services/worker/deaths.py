"""Injected deaths, for tests: this process kills itself (SIGKILL, nothing is flushed) at a named stage of a request."""

from __future__ import annotations

import os
import signal
from typing import Any, Literal

from common.errors import SettingError
from services.engine.engine import Runner
from services.engine.plan import Plan, StepOutput

Stage = Literal["prefill_queue", "prefill", "transfer", "decode_queue", "decode"]
STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode")
POISON = "poison"


class Death:
    """ "transfer:3" dies at the third handoff here, "prefill:3" at a prefill's third computed chunk, "decode:3" at a decode's third drawn
    token, "prefill_queue:3" and "decode_queue:3" at the third request, "poison:7" of a launch of any prompt that begins with token 7; ""
    never. A colocated worker dies of poison only. Raises SettingError."""

    def __init__(self, text: str) -> None:
        stage, _, nth = text.partition(":")
        if text and (stage not in (*STAGES, POISON) or not nth.isdigit() or int(nth) < 1):
            raise SettingError(f"die is {text!r}; it must be one of {', '.join((*STAGES, POISON))} and a number, like transfer:3")
        self._stage = stage
        self._left = int(nth) if text else 0

    def around(self, runner: Runner) -> Runner:
        """The runner, which dies of poison if there is to be any."""
        return Poisoned(runner, self._left) if self._stage == POISON else runner

    def strike(self, stage: Stage) -> None:
        """A request, a chunk of one or a token of one has come to this stage."""
        if stage != self._stage or not self._left:
            return
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)


class Poisoned:
    """A runner that dies of the launch in which a prompt with this first token begins."""

    def __init__(self, runner: Runner, token: int) -> None:
        self._runner = runner
        self._token = token

    def launch(self, plan: Plan) -> Any:
        if any(chunk.start == chunk.sequence.reused and chunk.sequence.ids[0] == self._token for chunk in plan.chunks):
            os.kill(os.getpid(), signal.SIGKILL)
        return self._runner.launch(plan)

    def collect(self, ticket: Any) -> StepOutput:
        return self._runner.collect(ticket)
