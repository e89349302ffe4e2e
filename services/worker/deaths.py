"""Injected deaths, for tests: this process kills itself (SIGKILL, nothing is flushed) at a named stage of a request."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any, Literal

from common.errors import SettingError
from services.engine.engine import Runner
from services.engine.plan import Plan, StepOutput

Stage = Literal["prefill_queue", "prefill", "transfer", "decode_queue", "decode"]
STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode")
POISON = "poison"
HANG = "hang"


class Death:
    """ "transfer:3" dies at the third handoff here, "prefill:3" at a prefill's third computed chunk, "decode:3" at a decode's third drawn
    token, "prefill_queue:3" and "decode_queue:3" at the third request, "poison:7" of a launch of any prompt that begins with token 7, and
    "hang:7" never returns from it; "" never. A colocated worker knows these two only. Raises SettingError."""

    def __init__(self, text: str) -> None:
        stage, _, nth = text.partition(":")
        if text and (stage not in (*STAGES, POISON, HANG) or not nth.isdigit() or int(nth) < 1):
            raise SettingError(f"die is {text!r}; it must be one of {', '.join((*STAGES, POISON, HANG))} and a number, like transfer:3")
        self._stage = stage
        self._left = int(nth) if text else 0

    def around(self, runner: Runner) -> Runner:
        """The runner, which dies of poison or hangs if it is to."""
        return Poisoned(runner, self._left, _die if self._stage == POISON else _hang) if self._stage in (POISON, HANG) else runner

    def strike(self, stage: Stage) -> None:
        """A request, a chunk of one or a token of one has come to this stage."""
        if stage != self._stage or not self._left:
            return
        self._left -= 1
        if not self._left:
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    threading.Event().wait()


class Poisoned:
    """A runner that is struck by the launch in which a prompt with this first token begins."""

    def __init__(self, runner: Runner, token: int, strike: Callable[[], None]) -> None:
        self._runner = runner
        self._token = token
        self._strike = strike

    def launch(self, plan: Plan) -> Any:
        if any(chunk.start == chunk.sequence.reused and chunk.sequence.ids[0] == self._token for chunk in plan.chunks):
            self._strike()
        return self._runner.launch(plan)

    def collect(self, ticket: Any) -> StepOutput:
        return self._runner.collect(ticket)
