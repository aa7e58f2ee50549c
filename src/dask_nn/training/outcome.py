"""How a rank ended, as a plain value that its caller can always unpickle, and how a run did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from dask_nn.errors import WorkerLost

__all__ = ["RankOutcome", "RunEnd", "Status"]

Status = Literal["finished", "stopped", "non_finite", "failed", "aborted"]


@dataclass(frozen=True, kw_only=True)
class RankOutcome:
    """The end of one rank.

    Parameters
    ----------
    rank : int
        Which rank.
    address : str
        Its worker.
    status : str
        ``finished``, ``stopped`` (asked to, at a step boundary), ``non_finite`` (loss),
        ``failed`` (an exception of its own) or ``aborted`` (ended by a peer or the client).
    steps : int
        Steps completed over the whole run.
    epoch : int
        The epoch in which it ended.
    history : list of dict
        Finished epochs.
    state : dict
        The model's state dict on the CPU; empty for all ranks but the first.
    optimizer_state : dict
        Likewise the optimizer's.
    loss : float
        The loss of the last step that was looked at.
    error : str
        The exception in one line, for ``failed`` and ``aborted``.
    traceback : str
        Its traceback.
    exception : BaseException, optional
        The exception itself where it is one of dask-nn's own.
    bitwise : bool
        Whether the ranks' canaries agreed.
    collective : str
        Name of the communicator.
    has_state : bool
        Whether its process keeps the state from which another gang can go on.
    """

    rank: int
    address: str = ""
    status: Status
    steps: int = 0
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    optimizer_state: dict[str, Any] = field(default_factory=dict)
    loss: float = 0.0
    error: str = ""
    traceback: str = ""
    exception: BaseException | None = None
    bitwise: bool = True
    collective: str = ""
    has_state: bool = True

    @property
    def position(self) -> tuple[int, int]:
        """How far it came: the epoch under way, and the steps completed over the run."""
        return (self.epoch, self.steps)


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """The end of a run.

    Parameters
    ----------
    outcomes : list of RankOutcome
        Of those ranks at work last that could say how they ended, by rank. That of rank 0 has the
        newest state, if there is any.
    interrupted : bool
        Whether Ctrl-C ended it.
    lost : WorkerLost or None
        Why it was given up.
    """

    outcomes: list[RankOutcome]
    interrupted: bool = False
    lost: WorkerLost | None = None
