"""Following one gang to its end, whatever that is."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dask_nn.errors import ClusterError, IncompatibleWorkers
from dask_nn.events import Event

if TYPE_CHECKING:
    from collections.abc import Callable

    from distributed import Client

    from dask_nn.controller.failure_policy import Cause, Recovery
    from dask_nn.controller.heartbeats import Heartbeats
    from dask_nn.controller.listening import Listener, RankMessages
    from dask_nn.controller.membership import Membership
    from dask_nn.controller.rank_group import RankGroup
    from dask_nn.training.outcome import RankOutcome

__all__ = ["GangEnd", "GangWatch"]

POLL_S = 0.2
# Once a gang breaks, its ranks get so long to say how they ended.
AFTERMATH_S = 5.0
# Ctrl-C waits so long for the ranks to reach a step boundary.
STOP_S = 1.5
# However the run ended, ranks that still work get so long to notice.
END_S = 2.0
CATCH_UP_EVERY_S = 1.0
# A look that comes so late finds silence that is this process's own fault.
LATE_S = 3.0


@dataclass
class GangEnd:
    """How a gang ended: with the run's end if there is no cause.

    Attributes
    ----------
    outcomes : list of RankOutcome
        Of the ranks that could say how they ended, by rank.
    cause : str or None
        See :class:`~dask_nn.controller.failure_policy.Situation`.
    lost : list of (str, int)
        Workers that were lost, and their ranks.
    reason : str
        In words.
    interrupted : bool
        Whether Ctrl-C ended it.
    broken_at : float
        When it broke, by ``time.monotonic()``.
    """

    outcomes: list[RankOutcome] = field(default_factory=list)
    cause: Cause | None = None
    lost: list[tuple[str, int]] = field(default_factory=list)
    reason: str = ""
    interrupted: bool = False
    broken_at: float = field(default_factory=time.monotonic)
    deadline: float | None = None

    def break_off(self, cause: Cause, patience_s: float) -> None:
        """Note that the gang cannot go on; its ranks get so long to say how they ended."""
        self.cause = cause
        self.broken_at = time.monotonic()
        self.deadline = self.broken_at + patience_s


class GangWatch:
    """Follows gang after gang of one run.

    Parameters
    ----------
    client : Client
        Of the cluster.
    membership : Membership
        Who is there.
    heartbeats : Heartbeats
        Who lives.
    messages : RankMessages
        What the ranks say.
    recovery : Recovery
        What the user wants.
    changed : threading.Event
        Set whenever something happened.
    listener : Listener
        Told of workers that take no part.
    wants_resize : callable
        Tells whether a gang should make room for another one, of other workers.
    """

    def __init__(
        self,
        client: Client,
        *,
        membership: Membership,
        heartbeats: Heartbeats,
        messages: RankMessages,
        recovery: Recovery,
        changed: threading.Event,
        listener: Listener,
        wants_resize: Callable[[RankGroup], bool],
    ) -> None:
        self._client = client
        self._membership = membership
        self._heartbeats = heartbeats
        self._messages = messages
        self._recovery = recovery
        self._changed = changed
        self._listener = listener
        self._wants_resize = wants_resize
        self._looked = self._caught_up = time.monotonic()

    def follow(self, group: RankGroup) -> GangEnd:
        """Watch a gang until all its ranks have ended, or those that did not are given up."""
        end = GangEnd()
        while True:
            try:
                self.wait()
                self.look_around()
                if self._has_ended(group, end):
                    return end
            except KeyboardInterrupt:
                if end.interrupted:
                    raise
                end.interrupted = True
                end.deadline = time.monotonic() + STOP_S
                group.signal("finish", self._membership.removed)

    def wait(self) -> None:
        """Wait until something happens, or a moment."""
        self._changed.wait(POLL_S)
        self._changed.clear()

    def look_around(self) -> None:
        """Learn what happened since the last look.

        Raises
        ------
        ClusterError
            If the scheduler is gone.
        """
        now = time.monotonic()
        if self._client.status != "running":
            message = (
                f"the connection to the scheduler is {self._client.status}; without it nobody can "
                "say what became of the workers. checkpoint= and resume=True go on elsewhere"
            )
            raise ClusterError(message)
        if now - self._looked > LATE_S:  # this process slept: nobody else is to blame
            self._heartbeats.forgive(now)
        if now - self._caught_up > CATCH_UP_EVERY_S:
            self._membership.catch_up()
            self._caught_up = time.monotonic()
        self._looked = time.monotonic()
        self._messages.deliver()
        for address, reason in self._membership.refused().items():
            details: dict[str, Any] = {"address": address, "rank": -1, "step": -1, "reason": reason}
            self._listener.on_event(
                Event(name="worker-refused", time_s=time.time(), details=details)
            )

    def end(self, group: RankGroup) -> None:
        """End ranks that are still at work: a cancelled task would go on in its thread."""
        deadline = time.monotonic() + END_S
        removed = self._membership.removed
        while self._client.status == "running" and group.running(removed):
            if time.monotonic() > deadline:
                return
            group.signal("abort", removed)
            self.wait()

    def _has_ended(self, group: RankGroup, end: GangEnd) -> bool:
        """Judge a gang, and act on it; True when nothing more can be learnt from it."""
        removed = self._membership.removed
        at_work = group.running(removed)  # before the outcomes: those are complete then
        end.outcomes = [outcome for outcome in group.outcomes() if outcome is not None]
        if end.cause in {None, "resize"} and not end.interrupted:
            self._look_for_trouble(group, end)
        if not at_work:
            self._judge(end)
            self._name_the_lost(group, end)
            return True
        if end.cause is None and not end.interrupted and self._wants_resize(group):
            end.break_off("resize", AFTERMATH_S + self._recovery.hang_timeout_s)
            group.signal("stop", removed)
        elif end.cause not in {None, "resize"}:
            group.signal("abort", removed)  # again and again: one may just be starting
        if self._messages.save_wanted and not end.interrupted:
            self._messages.save_wanted = False
            group.signal("save", removed)
        if end.deadline is None or time.monotonic() < max(
            end.deadline, self._messages.saving_until
        ):
            return False
        if not end.interrupted:
            end.cause, end.reason = "hung", "did not end when asked to"
            end.lost += [(seat.address, seat.rank) for seat in at_work]
            for seat in at_work:
                self._membership.evict(seat.address, end.reason)
        return True

    def _look_for_trouble(self, group: RankGroup, end: GangEnd) -> None:
        """Set the cause if the gang cannot finish what it began."""
        removed = self._membership.removed
        gone = group.lost(removed)
        if gone:
            end.lost = [(seat.address, seat.rank) for seat in gone]
            end.reason = "left the cluster"
            end.break_off("lost", AFTERMATH_S)
            return
        seats = {seat.rank: seat for seat in group.running(removed)}
        hung = self._heartbeats.hung(seats, time.monotonic())
        for rank, silent_s in hung.items():
            address = seats[rank].address
            end.lost.append((address, rank))
            end.reason = f"gave no sign of life for {silent_s:.0f} s"
            self._membership.evict(address, end.reason)
        if hung:
            end.break_off("hung", AFTERMATH_S)
        elif any(outcome.status in {"failed", "aborted"} for outcome in end.outcomes):
            end.break_off("broken", AFTERMATH_S)

    def _judge(self, end: GangEnd) -> None:
        """Decide what the outcomes of a gang that has ended mean for the run."""
        failed = [outcome for outcome in end.outcomes if outcome.status == "failed"]
        refused = [o for o in failed if isinstance(o.exception, IncompatibleWorkers)]
        if refused and self._messages.generation:
            error = refused[0].exception
            end.cause = "refused"
            end.reason = str(error)
            for address in getattr(error, "addresses", ()):
                self._membership.exclude(address, end.reason)
                end.lost.append((address, -1))
            return
        done = {outcome.status for outcome in end.outcomes}
        leader = any(o.rank == 0 and o.state for o in end.outcomes)
        # An exception of the user's code would come again; so would a loss that is not finite.
        if failed or "non_finite" in done or end.interrupted:
            end.cause = None
        elif end.cause == "resize":
            end.cause = None if done == {"finished"} and leader else "resize"
        elif end.cause is None and not (leader and done == {"finished"}):
            # Nobody here asked them to stop: a worker of theirs is about to close.
            end.cause = "resize" if done <= {"finished", "stopped"} else "broken"

    def _name_the_lost(self, group: RankGroup, end: GangEnd) -> None:
        """Add workers that were lost after the gang broke, or were the reason that it did."""
        if end.cause is None:
            return
        named = {address for address, _ in end.lost}
        later = [seat for seat in group.lost(self._membership.removed) if seat.address not in named]
        end.lost += [(seat.address, seat.rank) for seat in later]
        if later and end.cause in {"broken", "resize"}:
            end.cause, end.reason = "lost", "left the cluster"
