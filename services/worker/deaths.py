"""Injected deaths, for tests: this process kills itself (SIGKILL, nothing is flushed) at a named stage of a request."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Literal

from common.errors import SettingError

Stage = Literal["prefill_queue", "prefill", "transfer", "decode_queue", "decode"]
STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode")
POISON = "poison"


class Death:
    """ "transfer:3" dies when the third request enters its transfer here, "poison:7" of a launch of any prompt that begins with token 7; ""
    never. Raises SettingError."""

    def __init__(self, text: str) -> None:
        stage, _, nth = text.partition(":")
        if text and (stage not in (*STAGES, POISON) or not nth.isdigit() or int(nth) < 1):
            raise SettingError(f"die is {text!r}; it must be one of {', '.join((*STAGES, POISON))} and a number, like transfer:3")
        self._stage = stage
        self._left = int(nth) if text else 0

    def launch(self, prompt: Sequence[int]) -> None:
        """A launch is to contain a request with this prompt for the first time here."""
        if self._stage == POISON and prompt[0] == self._left:
            os.kill(os.getpid(), signal.SIGKILL)

    def strike(self, stage: Stage) -> None:
        """A request has come to this stage."""
        if stage != self._stage or not self._left:
            return
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
