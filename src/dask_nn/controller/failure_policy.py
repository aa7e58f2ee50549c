"""What to do when a gang ends before its run does: from a situation to an action."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from dask_nn.errors import ConfigurationError

__all__ = ["Action", "FailureCount", "Recovery", "Situation", "decide"]

Cause = Literal["lost", "hung", "broken", "refused", "resize"]
# A step that ends so many gangs in a row would end the next one too.
MAX_FAILURES_OF_ONE_STEP = 10


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a run goes on when workers are lost, hang, or join.

    Parameters
    ----------
    max_failures : int or None
        The run gives up after so many failures; None never gives up. A failure is the loss of any
        number of workers at once.
    min_workers : int
        Go on only with so many ranks at least; wait for workers while there are fewer.
    hang_timeout_s : float
        A rank that shows no sign of life for so many seconds is given up. A rank that computes is
        given five times its own longest step besides.
    replacement_timeout_s : float
        Wait so many seconds for a replacement of what was lost before going on with fewer ranks;
        0 goes on at once, and takes the replacement in when it comes.
    workers_timeout_s : float
        Give up when there have been fewer than ``min_workers`` for so many seconds.
    elastic : bool
        Whether workers that join later get shards.

    Raises
    ------
    ConfigurationError
        If a value cannot work.
    """

    max_failures: int | None = 100
    min_workers: int = 1
    hang_timeout_s: float = 10.0
    replacement_timeout_s: float = 0.0
    workers_timeout_s: float = 120.0
    elastic: bool = True

    def __post_init__(self) -> None:
        bounds = {
            "max_failures": (self.max_failures, 0),
            "min_workers": (self.min_workers, 1),
            "replacement_timeout_s": (self.replacement_timeout_s, 0),
            "workers_timeout_s": (self.workers_timeout_s, 0),
        }
        for name, (value, least) in bounds.items():
            if value is not None and not (_is_number(value) and value >= least):
                message = f"{name} must be a number of at least {least}, got {value!r}"
                raise ConfigurationError(message)
        if not (_is_number(self.hang_timeout_s) and self.hang_timeout_s > 1):
            message = (
                "hang_timeout_s must be a number above 1, the seconds between two signs of life, "
                f"got {self.hang_timeout_s!r}"
            )
            raise ConfigurationError(message)


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Where a run stands after one of its gangs has ended.

    Parameters
    ----------
    cause : str
        ``lost`` (workers left), ``hung`` (a rank gave no sign of life), ``broken`` (the gang ended
        without anyone to blame), ``refused`` (a worker computes other bits) or ``resize`` (asked
        for, to take in or to let go workers).
    failures : int
        So far in this run, this one included.
    same_step : int
        How many of them, in a row, left the run at the step where it is now.
    ranks : int
        Of the gang that ended.
    able : int
        Ranks that the workers now there could run.
    waited_s : float
        Since the gang ended.
    """

    cause: Cause
    failures: int
    same_step: int
    ranks: int
    able: int
    waited_s: float


@dataclass
class FailureCount:
    """The failures of a run so far.

    Attributes
    ----------
    failures : int
        All of them.
    same_step : int
        How many of them, in a row, left the run at the step where it is now.
    """

    failures: int = 0
    same_step: int = 0
    _at: Counter[int] = field(default_factory=Counter)

    def note(self, cause: Cause, steps: int) -> None:
        """Count how a gang ended, whether it came to its first step or not.

        Parameters
        ----------
        cause : str
            See :class:`Situation`. A resize is no failure; where a worker was refused, there is one
            less to try the step again with.
        steps : int
            Where that left the run.
        """
        if cause == "resize":
            self.same_step = 0
            return
        self.failures += 1
        if cause != "refused":
            self._at = Counter({steps: self._at[steps] + 1})
        self.same_step = self._at[steps]


@dataclass(frozen=True, kw_only=True)
class Action:
    """What to do next: ``go_on`` with a new gang, ``wait`` for workers, or ``give_up``."""

    name: Literal["go_on", "wait", "give_up"]
    reason: str = ""


def decide(situation: Situation, recovery: Recovery) -> Action:
    """Decide how a run goes on.

    Parameters
    ----------
    situation : Situation
        Where it stands.
    recovery : Recovery
        What the user wants.
    """
    limit = recovery.max_failures
    if situation.cause != "resize":
        if limit is not None and situation.failures > limit:
            reason = f"{situation.failures} failures, more than max_failures={limit}"
            return Action(name="give_up", reason=reason)
        if situation.same_step >= MAX_FAILURES_OF_ONE_STEP:
            reason = (
                f"the same step ended {situation.same_step} gangs in a row; does a worker run out "
                "of memory there?"
            )
            return Action(name="give_up", reason=reason)
    enough = situation.able >= recovery.min_workers
    if enough and (
        situation.able >= situation.ranks or situation.waited_s >= recovery.replacement_timeout_s
    ):
        return Action(name="go_on")
    patience_s = max(recovery.workers_timeout_s, recovery.replacement_timeout_s)
    if not enough and situation.waited_s >= patience_s:
        reason = (
            f"{situation.able} workers are left, fewer than min_workers={recovery.min_workers}, "
            f"and no other came within {patience_s:g} s"
        )
        return Action(name="give_up", reason=reason)
    return Action(name="wait")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
