"""Which workers have kept a state of the run, and which of those states is the newest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dask_nn.controller.keeping import Position, StateSource

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from dask_nn.training.outcome import RankOutcome

__all__ = ["KeptStates"]


class KeptStates:
    """What the ranks of all gangs have left on their workers."""

    def __init__(self) -> None:
        self._states: dict[str, StateSource] = {}
        self._newest: StateSource | None = None

    @property
    def newest(self) -> StateSource | None:
        """Where the next gang's state comes from; None if from a checkpoint or the beginning."""
        return self._newest

    @property
    def addresses(self) -> Collection[str]:
        """The workers that have one."""
        return self._states.keys()

    def note(
        self, outcomes: Iterable[RankOutcome], *, generation: int, removed: Collection[str]
    ) -> None:
        """Take the newest state that is left anywhere as the truth.

        Parameters
        ----------
        outcomes : iterable of RankOutcome
            How the ranks of a gang ended.
        generation : int
            Of that gang.
        removed : collection of str
            Workers that are gone.
        """
        for outcome in outcomes:
            if outcome.has_state:
                self._states[outcome.address] = StateSource(
                    address=outcome.address,
                    generation=generation,
                    position=Position(*outcome.position),
                )
        for address in set(removed) & self._states.keys():
            del self._states[address]
        # Of equal ones the last that was left: an older one may have been asked for in vain.
        self._newest = max(
            self._states.values(), key=lambda s: (s.position, s.generation), default=None
        )

    def states(self) -> list[StateSource]:
        """Give all that are left, whatever their position."""
        return list(self._states.values())

    def sources(self) -> list[StateSource]:
        """Give those that have the newest state."""
        newest = self._newest
        if newest is None:
            return []
        return [s for s in self._states.values() if s.position == newest.position]

    def pass_over(self) -> None:
        """Let the next gang start from something newer than what is kept."""
        self._newest = None

    def drop_older(self, *, members: Collection[str], saved: tuple[int, int]) -> None:
        """Keep one of the earlier states once a gang is at work, whose own are newer.

        It matters if all members die: the newest one outside of the gang, unless a checkpoint is
        newer.

        Parameters
        ----------
        members : collection of str
            Workers of the gang.
        saved : tuple of int
            Epoch and steps of the newest checkpoint.
        """
        outside = [
            s for s in self._states.values() if s.address not in members and s.position > saved
        ]
        left = max(outside, key=lambda s: s.position, default=None)
        self._states = {} if left is None else {left.address: left}
