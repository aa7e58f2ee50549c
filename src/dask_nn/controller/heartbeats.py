"""Which ranks still show signs of life, and what they say that they wait for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

__all__ = ["Beat", "Heartbeats"]

# A step may take so many times longer than the longest silence that a rank came back from.
STEP_FACTOR = 5.0
# A rank that has looked at its orders within this time is in one of the waits that do so.
ATTENTIVE_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself, every second.

    Parameters
    ----------
    idle_s : float
        Since it last looked at its orders, or used its processor.
    unchecked_s : float
        Since it last looked at its orders, which it does between shards and in every wait.
    waiting_s : float
        How long it has been in an exchange with its peers, or meets them; 0 if it is not.
    holders : tuple of str
        Workers that it waits for because they have blocks.
    holders_s : float
        For how long.
    """

    idle_s: float = 0.0
    unchecked_s: float = 0.0
    waiting_s: float = 0.0
    holders: tuple[str, ...] = ()
    holders_s: float = 0.0


@dataclass
class _Pulse:
    heard: float
    beat: Beat = field(default_factory=Beat)
    longest_s: float = 0.0
    spoke: bool = False
    started_at: float | None = None


class Heartbeats:
    """Judges the ranks of one gang by their messages; whoever calls brings the time.

    A rank may fall silent altogether (its process is stopped, its host is cut off), or go on
    sending messages that say that it does nothing (a dead lock). A rank that uses its processor is
    at work, however long that takes: user code need not look at anything for minutes.

    Parameters
    ----------
    hang_timeout_s : float
        See :class:`~dask_nn.controller.failure_policy.Recovery`.
    start_timeout_s : float
        What a rank gets until its first message, and for doing nothing before its first step: to
        import, copy the state and meet its peers.
    exchange_timeout_s : float
        What its peers wait for it; no longer may it compute without looking at its orders.
    """

    def __init__(
        self,
        *,
        hang_timeout_s: float,
        start_timeout_s: float,
        exchange_timeout_s: float = 600.0,
    ) -> None:
        self._hang_timeout_s = hang_timeout_s
        self._start_timeout_s = max(start_timeout_s, hang_timeout_s)
        self._exchange_timeout_s = exchange_timeout_s
        self._longest_wait_s = 0.0
        self._pulses: dict[int, _Pulse] = {}

    def clear(self) -> None:
        """Begin anew, with another gang; how long exchanges may take is remembered."""
        self._pulses.clear()

    def forgive(self, now: float) -> None:
        """Take silence so far as this process's own fault."""
        for pulse in self._pulses.values():
            pulse.heard = now

    def note(self, rank: int, now: float) -> None:
        """Take any message as a sign of life."""
        pulse = self._pulses.setdefault(rank, _Pulse(now))
        pulse.heard = max(pulse.heard, now)
        pulse.spoke = True

    def note_start(self, ranks: int, now: float) -> None:
        """Know that all ranks have met and begin: how long they waited before no longer counts."""
        for rank in range(ranks):
            self.note(rank, now)
            self._pulses[rank].started_at = now
            self._pulses[rank].beat = Beat()

    def note_beat(self, rank: int, beat: Beat) -> None:
        """Take note of what a rank says of itself."""
        pulse = self._pulses[rank]
        before = pulse.beat
        if beat.unchecked_s < before.unchecked_s:
            pulse.longest_s = max(pulse.longest_s, before.unchecked_s)
        if beat.waiting_s < before.waiting_s:
            self.note_wait(before.waiting_s)
        pulse.beat = beat

    def note_wait(self, seconds: float) -> None:
        """Know that an exchange may well take so long."""
        self._longest_wait_s = max(self._longest_wait_s, seconds)

    @property
    def have_started(self) -> bool:
        """Whether the ranks of this gang have met and begun."""
        return any(pulse.started_at is not None for pulse in self._pulses.values())

    def has_spoken(self, rank: int) -> bool:
        """Tell whether a rank of this gang has sent anything."""
        return rank in self._pulses and self._pulses[rank].spoke

    def hung(self, ranks: Iterable[int], now: float) -> dict[int, float]:
        """Give the ranks that must be given up, and for how many seconds they have been silent."""
        found = {}
        for rank in ranks:
            pulse = self._pulses.setdefault(rank, _Pulse(now))
            silent_s = now - pulse.heard
            beat = pulse.beat
            # A beat that was sent before the start may arrive after it.
            most_s = math.inf if pulse.started_at is None else now - pulse.started_at
            idle_s, unchecked_s = min(beat.idle_s, most_s), min(beat.unchecked_s, most_s)
            patience_s = self._start_timeout_s if pulse.started_at is None else self._hang_timeout_s
            patience_s += STEP_FACTOR * pulse.longest_s
            if silent_s > (self._hang_timeout_s if pulse.spoke else self._start_timeout_s):
                found[rank] = silent_s
            elif idle_s > patience_s:
                found[rank] = idle_s
            elif unchecked_s > max(patience_s, self._exchange_timeout_s):
                found[rank] = unchecked_s
        return found

    def unheard(self, ranks: Iterable[int], now: float) -> bool:
        """Tell whether some of these ranks have said nothing yet, for too long.

        Ranks may have to wait until their worker has time for them, or be stopped before their
        first message: only their worker can tell.
        """
        pulses = [self._pulses.setdefault(rank, _Pulse(now)) for rank in ranks]
        return any(not pulse.spoke and now - pulse.heard > self._hang_timeout_s for pulse in pulses)

    def standstill(self, ranks: Collection[int]) -> float:
        """Give for how long all these ranks have waited for each other, if that is too long.

        Nobody is at work then: what they sent each other did not arrive. 0 if it is not so.
        """
        if len(ranks) < 2 or not all(self.has_spoken(rank) for rank in ranks):
            return 0.0
        beats = [self._pulses[rank].beat for rank in ranks]
        if any(beat.unchecked_s > ATTENTIVE_S for beat in beats):
            return 0.0
        shortest_s = min(beat.waiting_s for beat in beats)
        patience_s = self._hang_timeout_s + STEP_FACTOR * self._longest_wait_s
        return shortest_s if shortest_s > patience_s else 0.0

    def holders(self, ranks: Iterable[int]) -> set[str]:
        """Give the workers whose blocks some of these ranks have waited for, for too long."""
        beats = [self._pulses[rank].beat for rank in ranks if rank in self._pulses]
        late = [beat.holders for beat in beats if beat.holders_s > self._hang_timeout_s]
        return {address for holders in late for address in holders}
