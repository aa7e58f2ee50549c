"""How a gang ended, and what its outcomes mean for the run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dask_nn.errors import IncompatibleWorkers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dask_nn.controller.failure_policy import Cause
    from dask_nn.training.outcome import RankOutcome

__all__ = ["GangEnd", "Loss"]


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A worker that the gang lost.

    Parameters
    ----------
    address : str
        The worker.
    rank : int
        That ran there; -1 if it is not known.
    cause : str
        ``lost``, ``hung`` or ``refused``, as in a
        :class:`~dask_nn.controller.failure_policy.Situation`.
    reason : str
        In words.
    """

    address: str
    rank: int
    cause: Cause
    reason: str


@dataclass
class GangEnd:
    """How a gang ended: with the run's end if there is no cause.

    Attributes
    ----------
    outcomes : list of RankOutcome
        Of the ranks that could say how they ended, by rank.
    cause : str or None
        See :class:`~dask_nn.controller.failure_policy.Situation`.
    losses : list of Loss
        Workers that were lost, each once.
    reason : str
        Why it broke, where no worker was lost.
    interrupted : bool
        Whether Ctrl-C ended it.
    save_ordered : bool
        Whether rank 0, while at work, was told to save what is reached.
    recalled : bool
        Whether it was called back before its first step: that its ranks abort is no failure.
    broken_at : float
        When it broke, by ``time.monotonic()``.
    """

    outcomes: list[RankOutcome] = field(default_factory=list)
    cause: Cause | None = None
    losses: list[Loss] = field(default_factory=list)
    reason: str = ""
    interrupted: bool = False
    save_ordered: bool = False
    recalled: bool = False
    broken_at: float = field(default_factory=time.monotonic)

    @property
    def is_broken(self) -> bool:
        """Whether the gang cannot finish what it began."""
        return self.cause not in {None, "resize"}

    @property
    def has_failed(self) -> bool:
        """Whether a rank has ended as none should."""
        bad = {"failed"} if self.recalled else {"failed", "aborted"}
        return any(outcome.status in bad for outcome in self.outcomes)

    def break_off(self, cause: Cause, reason: str = "") -> None:
        """Note that the gang cannot go on; what broke it first stays its cause."""
        if not self.is_broken:
            self.cause, self.reason = cause, reason
            self.broken_at = time.monotonic()

    def recall(self) -> None:
        """Note that the gang shall not begin."""
        self.recalled = True
        self.break_off("resize")

    def lose(self, losses: Iterable[Loss]) -> None:
        """Note that workers were lost; of each the first reason counts."""
        known = {loss.address for loss in self.losses}
        for loss in losses:
            if loss.address not in known:
                self.losses.append(loss)
                self.break_off(loss.cause, loss.reason)
                if self.cause == "broken":  # this is why
                    self.cause, self.reason = loss.cause, loss.reason

    def judge(self, generation: int) -> None:
        """Decide what the outcomes of a gang that has ended mean for the run.

        Parameters
        ----------
        generation : int
            Of the gang: later ones can refuse a worker that joined.
        """
        failed = [outcome for outcome in self.outcomes if outcome.status == "failed"]
        refused = [o for o in failed if isinstance(o.exception, IncompatibleWorkers)]
        if refused and generation:
            error = refused[0].exception
            self.cause, self.reason = "refused", str(error)
            self.lose(
                Loss(address=address, rank=-1, cause="refused", reason=self.reason)
                for address in getattr(error, "addresses", ())
            )
            if self.interrupted:
                self.cause = None
            return
        done = {outcome.status for outcome in self.outcomes}
        # An exception of the user's code would come again; so would a loss that is not finite.
        if failed or "non_finite" in done or self.interrupted:
            self.cause = None
        elif self.cause == "resize":
            # Without rank 0 nobody says that the last checkpoint is whole.
            whole = done == {"finished"} and any(outcome.rank == 0 for outcome in self.outcomes)
            self.cause = None if whole else "resize"
        elif self.cause is None and done != {"finished"}:
            # Nobody here asked them to stop: a worker of theirs is about to close.
            stopped = bool(done) and done <= {"finished", "stopped"}
            self.cause = "resize" if stopped else "broken"
