"""Injected deaths, for tests: this process kills itself (SIGKILL, nothing is flushed) at a named stage of a request."""

from __future__ import annotations

import os
import signal
from typing import Literal

from common.errors import SettingError

Stage = Literal["prefill_queue", "prefill", "transfer", "decode_queue", "decode"]
STAGES = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode")


class Death:
    """ "transfer:3" dies when the third request enters its transfer here; "" never. Raises SettingError."""

    def __init__(self, text: str) -> None:
        stage, _, nth = text.partition(":")
        if text and (stage not in STAGES or not nth.isdigit() or int(nth) < 1):
            raise SettingError(f"die is {text!r}; it must be one of {', '.join(STAGES)} and a number, like transfer:3")
        self._stage = stage
        self._left = int(nth) if text else 0

    def strike(self, stage: Stage) -> None:
        """A request has come to this stage."""
        if stage != self._stage or not self._left:
            return
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
