"""From the end of a gang to the workers of the next, if there is to be one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dask_nn.controller.failure_policy import FailureCount, Situation, decide
from dask_nn.errors import WorkerLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from dask_nn.controller.failure_policy import Recovery
    from dask_nn.controller.gang_end import GangEnd
    from dask_nn.controller.gang_watch import GangWatch
    from dask_nn.controller.lost_blocks import LostBlocks
    from dask_nn.controller.membership import Membership
    from dask_nn.controller.placement import Seating
    from dask_nn.controller.seats import Seats

__all__ = ["Regrouping"]

# Blocks that cannot be put back for so long never can.
RESTORE_S = 60.0


class Regrouping:
    """Decides after each gang how to go on, and waits for workers where that is needed.

    Parameters
    ----------
    recovery : Recovery
        How to go on when workers are lost, hang or join.
    seats : Seats
        Claims the workers.
    membership : Membership
        The workers that are there.
    watch : GangWatch
        Looks after the cluster during a wait.
    blocks : LostBlocks
        Put back before a gang starts.
    tell : callable
        Given an event's name and its details.
    """

    def __init__(
        self,
        recovery: Recovery,
        *,
        seats: Seats,
        membership: Membership,
        watch: GangWatch,
        blocks: LostBlocks,
        tell: Callable[..., None],
    ) -> None:
        self._recovery = recovery
        self._seats = seats
        self._membership = membership
        self._watch = watch
        self._blocks = blocks
        self._tell = tell
        self._failures = FailureCount()

    def next_seating(self, before: Seating, end: GangEnd, *, steps: int) -> Seating:
        """Wait until there are workers to go on with.

        Parameters
        ----------
        before : Seating
            The workers of the gang that ended.
        end : GangEnd
            How it ended.
        steps : int
            How far the run has come.

        Returns
        -------
        Seating
            Claimed for the run; all blocks of the data are there.

        Raises
        ------
        WorkerLost
            If the run shall not go on.
        """
        cause = end.cause or "broken"
        self._failures.note(cause, steps)
        self._tell_of_losses(end)
        told = False
        restoring_since: float | None = None
        while True:
            self._watch.look_around(at_once=True)
            seating = self._seats.claim()
            action = decide(
                Situation(
                    cause=cause,
                    failures=self._failures.failures,
                    same_step=self._failures.same_step,
                    ranks=len(before.workers),
                    able=0 if seating is None else len(seating.workers),
                    waited_s=time.monotonic() - end.broken_at,
                ),
                self._recovery,
            )
            if action.name == "give_up":
                reason, paused = action.reason, sorted(self._membership.paused)
                if paused and seating is None:
                    reason += f"; no memory is left to start a task on {', '.join(paused)}"
                raise self._given_up(end, reason)
            if action.name != "go_on" or seating is None:
                restoring_since = None
                if not told:
                    told = True
                    able = 0 if seating is None else len(seating.workers)
                    self._tell("waiting", able=able, ranks=len(before.workers))
                self._watch.wait()
            elif self._blocks.put_back():
                return seating
            else:
                restoring_since = restoring_since or time.monotonic()
                if time.monotonic() > restoring_since + RESTORE_S:
                    raise self._given_up(end, "blocks that were lost cannot be put back")
                self._watch.wait()

    def _given_up(self, end: GangEnd, reason: str) -> WorkerLost:
        self._tell("gave-up", reason=reason)
        loss = end.losses[0] if end.losses else None
        address, rank = ("", -1) if loss is None else (loss.address, loss.rank)
        return WorkerLost(address, rank, reason)

    def _tell_of_losses(self, end: GangEnd) -> None:
        steps = max((outcome.steps for outcome in end.outcomes), default=0)
        for loss in end.losses:
            self._tell(
                f"worker-{loss.cause}",
                address=loss.address,
                rank=loss.rank,
                step=steps,
                reason=loss.reason,
            )
        if end.cause == "broken":
            errors = [end.reason] if end.reason else sorted({o.error for o in end.outcomes})
            self._tell("gang-broken", step=steps, reason="; ".join(errors))
