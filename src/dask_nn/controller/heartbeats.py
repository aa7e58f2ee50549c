"""Which ranks still show signs of life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Heartbeats"]

# A step may take so many times longer than the longest silence that a rank came back from.
STEP_FACTOR = 5.0


@dataclass
class _Pulse:
    heard: float
    stuck_s: float = 0.0
    longest_s: float = 0.0
    started: bool = False


class Heartbeats:
    """Judges the ranks of one gang by their messages; whoever calls brings the time.

    A rank may fall silent altogether (its process is stopped, its host is cut off), or go on
    sending messages that say that it does nothing (a dead lock).

    Parameters
    ----------
    hang_timeout_s : float
        See :class:`~dask_nn.controller.failure_policy.Recovery`.
    start_timeout_s : float
        What a rank gets before its first step: to import, copy the state and meet its peers.
    """

    def __init__(self, *, hang_timeout_s: float, start_timeout_s: float) -> None:
        self._hang_timeout_s = hang_timeout_s
        self._start_timeout_s = max(start_timeout_s, hang_timeout_s)
        self._pulses: dict[int, _Pulse] = {}

    def clear(self) -> None:
        """Begin anew: with another gang, or after this process itself has slept."""
        self._pulses.clear()

    def forgive(self, now: float) -> None:
        """Take silence so far as this process's own fault."""
        for pulse in self._pulses.values():
            pulse.heard = now

    def note(self, rank: int, now: float) -> None:
        """Take any message as a sign of life."""
        pulse = self._pulses.setdefault(rank, _Pulse(now))
        pulse.heard = max(pulse.heard, now)

    def note_start(self, ranks: int, now: float) -> None:
        """Know that all ranks have met and begin."""
        for rank in range(ranks):
            self.note(rank, now)
            self._pulses[rank].started = True

    def note_beat(self, rank: int, stuck_s: float) -> None:
        """Take note for how long a rank has done nothing by its own account."""
        pulse = self._pulses[rank]
        if stuck_s < pulse.stuck_s:
            pulse.longest_s = max(pulse.longest_s, pulse.stuck_s)
        pulse.stuck_s = stuck_s

    def hung(self, ranks: Iterable[int], now: float) -> dict[int, float]:
        """Give the ranks that must be given up, and for how many seconds they have been silent."""
        found = {}
        for rank in ranks:
            pulse = self._pulses.setdefault(rank, _Pulse(now))
            limit_s = self._hang_timeout_s if pulse.started else self._start_timeout_s
            silent_s = now - pulse.heard
            if silent_s > limit_s:
                found[rank] = silent_s
            elif pulse.stuck_s > limit_s + STEP_FACTOR * pulse.longest_s:
                found[rank] = pulse.stuck_s
        return found
