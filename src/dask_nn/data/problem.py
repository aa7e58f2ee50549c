"""A block that could not be computed: which, where and why."""

from __future__ import annotations

from dataclasses import dataclass

from dask_nn.errors import DataError

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """What a worker says of a block that it could not compute.

    Parameters
    ----------
    block : int
        Its number.
    address : str
        Of the worker; empty in this process.
    text : str
        The error in one line.
    traceback : str
        Where it was raised.
    """

    block: int
    address: str
    text: str
    traceback: str

    def error(self, what: str) -> DataError:
        """Make the error for it; `what` names the input."""
        where = f" on worker {self.address}" if self.address else ""
        return DataError(
            f"block {self.block} of {what} could not be computed{where}: {self.text}\n"
            f"{self.traceback}"
        )
