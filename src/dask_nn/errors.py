"""Every error that dask-nn raises of its own.

DaskNNError
├── ConfigurationError (ValueError)   an option has a value that cannot work
├── DataError (ValueError)            arrays or files that cannot be trained on
├── ModelError (ValueError)           a module, loss or optimizer that cannot be used
├── CheckpointError                   a file of weights that cannot be read or written
├── ClusterError
│   ├── SchedulerUnreachable          no answer from a scheduler within the deadline
│   └── IncompatibleWorkers           workers that cannot train together with this client
├── CollectiveError
│   ├── Aborted                       a peer or the client ended the exchange
│   └── CollectiveTimeout             a peer did not come within the deadline
└── TrainingError
    ├── RankFailed                    an exception in one rank
    ├── NonFiniteLoss                 the loss became NaN or infinite
    └── WorkerLost                    a worker of the gang died
TrainingInterrupted (KeyboardInterrupt)  Ctrl-C; carries what is trained so far

Arguments are positional, so that every error survives pickling between processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Aborted",
    "CheckpointError",
    "ClusterError",
    "CollectiveError",
    "CollectiveTimeout",
    "ConfigurationError",
    "DaskNNError",
    "DataError",
    "IncompatibleWorkers",
    "ModelError",
    "NonFiniteLoss",
    "RankFailed",
    "SchedulerUnreachable",
    "TrainingError",
    "TrainingInterrupted",
    "WorkerLost",
]


class DaskNNError(Exception):
    """Root of all errors of dask-nn."""


class ConfigurationError(DaskNNError, ValueError):
    """An option has a value that cannot work."""


class DataError(DaskNNError, ValueError):
    """Arrays or files cannot be trained on."""


class ModelError(DaskNNError, ValueError):
    """A module, loss or optimizer cannot be used."""


class CheckpointError(DaskNNError):
    """A file of weights cannot be read or written."""


class ClusterError(DaskNNError):
    """The cluster cannot do what is asked of it."""


class SchedulerUnreachable(ClusterError):
    """No scheduler answered within the deadline.

    Parameters
    ----------
    message : str
        Which one, and why.
    reason : str
        The reason alone.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class IncompatibleWorkers(ClusterError):
    """Workers differ from the client or from each other in a way that forbids training.

    Parameters
    ----------
    message : str
        What differs.
    addresses : tuple of str
        The workers that differ, where they are known.
    """

    def __init__(self, message: str, addresses: tuple[str, ...] = ()) -> None:
        super().__init__(message, addresses)
        self.addresses = addresses

    def __str__(self) -> str:
        return str(self.args[0])


class CollectiveError(DaskNNError):
    """An exchange between ranks did not succeed."""


class Aborted(CollectiveError):
    """A peer or the client ended the exchange."""


class CollectiveTimeout(CollectiveError):
    """A peer did not take part in an exchange within the deadline."""


class TrainingError(DaskNNError):
    """Training started and could not go on.

    Attributes
    ----------
    events : sequence of Event
        What happened to the run.
    """

    events: Sequence[Any] = ()


class RankFailed(TrainingError):
    """An exception ended one rank, and with it the gang.

    Parameters
    ----------
    message : str
        What the rank raised, as one line.
    rank : int
        The rank that failed.
    step : int
        Steps completed by the rank before the failure, counted from the start of the run.
    address : str
        The worker on which the rank ran.
    traceback : str
        The rank's own traceback.
    """

    def __init__(self, message: str, rank: int, step: int, address: str, traceback: str) -> None:
        super().__init__(message, rank, step, address, traceback)
        self.message = message
        self.rank = rank
        self.step = step
        self.address = address
        self.traceback = traceback

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on worker {self.address} failed at step {self.step}: "
            f"{self.message}\n\nTraceback of rank {self.rank}:\n{self.traceback}"
        )


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite, and training stopped before that update.

    Parameters
    ----------
    value : float
        The loss of the global batch.
    step : int
        The step (from 0, over the whole run) whose loss it was; its update was not made.
    epoch : int
        The epoch (from 0) of that step.
    result : TrainingResult or None
        The last good state, as ``train`` would have returned it.
    """

    def __init__(self, value: float, step: int, epoch: int, result: Any = None) -> None:
        super().__init__(value, step, epoch, result)
        self.value = value
        self.step = step
        self.epoch = epoch
        self.result = result

    def __str__(self) -> str:
        return (
            f"the loss became {self.value} at step {self.step} (epoch {self.epoch}); training "
            "stopped before that update and `.result` holds the last good state. "
            "A lower learning rate or clip_grad_norm= often helps"
        )


class WorkerLost(TrainingError):
    """Workers were lost while they trained, and the run could not go on without them.

    Parameters
    ----------
    address : str
        The worker's address; empty if the gang broke without one to blame.
    rank : int
        The rank that ran on it; -1 if none did.
    reason : str
        Why the run did not go on.
    result : TrainingResult or None
        What was trained so far, if a rank that has it could still be asked.
    """

    def __init__(self, address: str, rank: int, reason: str = "", result: Any = None) -> None:
        super().__init__(address, rank, reason, result)
        self.address = address
        self.rank = rank
        self.reason = reason
        self.result = result

    def __str__(self) -> str:
        if not self.address:
            return f"the gang broke: {self.reason}"
        what = f"worker {self.address}, which ran rank {self.rank}, was lost"
        return f"{what}, and training did not go on: {self.reason}" if self.reason else what


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped training at a step boundary.

    Parameters
    ----------
    result : TrainingResult or None
        What is trained so far.
    """

    def __init__(self, result: Any = None) -> None:
        super().__init__(result)
        self.result = result

    def __str__(self) -> str:
        return "training was interrupted; `.result` holds what is trained so far"
