"""Whether a transfer's thread still comes round: what a hung or dead one has been given would wait for ever."""

from __future__ import annotations

from typing import Protocol

from common.errors import TransferError

STUCK_S = 30.0
STUCK_LOOKS = 4
"""In a row: the whole process may have been stopped, and its other thread comes round first."""


class Watched(Protocol):
    looked_at: float
    """When the thread last came round."""

    def check(self) -> None:
        """Raises TransferError if the thread has died."""


class Watch:
    """Of one transfer. Look about every BEAT_S."""

    def __init__(self, transfer: Watched) -> None:
        self._transfer = transfer
        self._looks = 0

    def look(self, now: float) -> None:
        """Raises TransferError if the thread has died, or has not come round for `STUCK_S`: a driver's function does not return."""
        self._transfer.check()
        silent_s = now - self._transfer.looked_at
        self._looks = self._looks + 1 if silent_s > STUCK_S else 0
        if self._looks >= STUCK_LOOKS:
            raise TransferError(f"the transfer's thread has not come round for {silent_s:.0f} s")
