"""Who still answers, and who gets on: two rules over the answers to heartbeats, without a clock of their own.

Owns: what is known of each life that is watched. A watcher that was stopped itself must blame nobody: time counts only
in beats that the watcher has made, each for at most one interval.

    silent   no answer for the whole timeout: the process is stopped, or what answers in it is stuck
    stuck    it answers that it is busy, and its progress has not changed for the whole timeout
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

__all__ = ["Heartbeats", "Stall"]

_LONGEST_INTERVAL_S = 2.0
_BEATS_PER_TIMEOUT = 4
_ROUNDING_S = 1e-9  # four quarters are a whole


@attrs.frozen
class Stall:
    """Somebody who has to be ended."""

    name: str
    incarnation: int
    reason: str


@attrs.define
class _Pulse:
    incarnation: int
    is_asked: bool = False  # and has not answered since
    silent_s: float = 0.0
    stuck_s: float = 0.0
    is_busy: bool = False
    progress: int = 0


class Heartbeats:
    """The pulses of some peers. ``beat`` whenever ``interval_s`` has passed, then ask everybody who is watched."""

    def __init__(self, stall_timeout_s: float) -> None:
        self.interval_s = min(_LONGEST_INTERVAL_S, stall_timeout_s / _BEATS_PER_TIMEOUT)
        self._stall_timeout_s = stall_timeout_s
        self._pulses: dict[str, _Pulse] = {}
        self._beat_s: float | None = None  # when the last one was

    def beat(self, watched: Mapping[str, int], now_s: float) -> list[Stall]:
        """Count the time since the last beat, for everybody who was asked then; who has used up the timeout.

        watched: incarnation of each life that is asked now; others are forgotten.
        """
        elapsed_s = 0.0 if self._beat_s is None else min(now_s - self._beat_s, self.interval_s)
        self._beat_s = now_s
        pulses = self._pulses
        self._pulses = {}
        stalls = []
        for name, incarnation in watched.items():
            pulse = pulses.get(name)
            if pulse is None or pulse.incarnation != incarnation:
                pulse = _Pulse(incarnation)
            reason = self._judge(pulse, elapsed_s)
            if reason:
                stalls.append(Stall(name, incarnation, reason))
            pulse.is_asked = True
            self._pulses[name] = pulse
        return stalls

    def answered(self, name: str, incarnation: int, progress: int = 0, *, is_busy: bool = False) -> None:
        """An answer came. One of another life changes nothing."""
        pulse = self._pulses.get(name)
        if pulse is None or pulse.incarnation != incarnation:
            return
        pulse.is_asked = False
        pulse.silent_s = 0.0
        if not is_busy or not pulse.is_busy or progress != pulse.progress:
            pulse.stuck_s = 0.0
        pulse.is_busy, pulse.progress = is_busy, progress

    def _judge(self, pulse: _Pulse, elapsed_s: float) -> str:
        if pulse.is_asked:
            pulse.silent_s += elapsed_s
        elif pulse.is_busy:  # time in which it could not answer is not time in which it could have got on
            pulse.stuck_s += elapsed_s
        least_s = self._stall_timeout_s - _ROUNDING_S
        if pulse.silent_s >= least_s:
            return f"no answer to heartbeats for {self._stall_timeout_s:g} s"
        if pulse.stuck_s >= least_s:
            return f"busy without progress for {self._stall_timeout_s:g} s"
        return ""
