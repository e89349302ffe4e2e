"""Who lives, by beats: silence is death, and so is pending work without progress (protocol rule 3). Pure: no clock, no socket."""

from __future__ import annotations

from dataclasses import dataclass

from common.messages import Incarnation
from common.names import DEAD_S

PAUSE_S = 1.0
"""An observer that has not looked for longer than this was itself stopped: silence meanwhile proves nothing."""


@dataclass(eq=False)
class _Pulse:
    heard_at: float
    step: int = -1
    moved_at: float = 0.0
    busy: bool = False
    longest_step_s: float = 0.0


class Liveness:
    """Peers that have been heard of. Ask `dead` at least every PAUSE_S; it also forgets nobody: that is the caller's word."""

    def __init__(self) -> None:
        self._pulses: dict[Incarnation, _Pulse] = {}
        self._looked_at: float | None = None

    @property
    def alive(self) -> set[Incarnation]:
        return set(self._pulses)

    def heard(self, peer: Incarnation, now: float) -> None:
        """Any sign of life."""
        pulse = self._pulses.get(peer)
        if pulse is None:
            self._pulses[peer] = _Pulse(now, moved_at=now)
        else:
            pulse.heard_at = now

    def beat(self, peer: Incarnation, step: int, busy: bool, longest_step_s: float, now: float) -> None:
        """A worker's beat: while it is busy, `step` has to move within `longest_step_s`."""
        self.heard(peer, now)
        pulse = self._pulses[peer]
        if step != pulse.step or not busy or not pulse.busy:
            pulse.step, pulse.moved_at = step, now
        pulse.busy, pulse.longest_step_s = busy, longest_step_s

    def dead(self, now: float) -> list[tuple[Incarnation, str]]:
        """Peers that are dead, each with the reason. Nobody is, right after the observer itself was paused."""
        last, self._looked_at = self._looked_at, now
        if last is not None and now - last > PAUSE_S:
            for pulse in self._pulses.values():
                pulse.heard_at = pulse.moved_at = now
            return []
        found = []
        for peer, pulse in self._pulses.items():
            if now - pulse.heard_at > DEAD_S:
                found.append((peer, f"silent for {now - pulse.heard_at:.1f} s"))
            elif pulse.busy and now - pulse.moved_at > pulse.longest_step_s:
                found.append((peer, f"busy without a step for {now - pulse.moved_at:.1f} s"))
        return found

    def forget(self, peer: Incarnation) -> None:
        self._pulses.pop(peer, None)
