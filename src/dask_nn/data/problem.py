"""A block that could not be computed: which, where and why."""

from __future__ import annotations

import contextlib
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed import get_worker

from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distributed import Client, Future

__all__ = ["Problem", "find_problem", "this_worker"]


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

    @classmethod
    def of(cls, block: int, error: BaseException, address: str = "") -> Problem:
        """Describe an error; those of the data say themselves what they are."""
        text = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        return cls(block, address, text, "".join(traceback.format_exception(error)))

    @classmethod
    def of_future(cls, block: int, future: Future[Any], client: Client) -> Problem:
        """Describe why a task failed: itself, or what it depends on."""
        error = future.exception()
        error = error.with_traceback(future.traceback())
        return cls.of(block, error, ", ".join(_erred_on(client, future.key)))

    def error(self, what: str = "", *, attempts: int = 1) -> DataError:
        """Make the error for it.

        Parameters
        ----------
        what : str
            The input, where it is known.
        attempts : int
            How often it was tried.
        """
        of = f" of {what}" if what else ""
        where = f" on worker {self.address}" if self.address else ""
        often = f" after {attempts} attempts" if attempts > 1 else ""
        return DataError(
            f"block {self.block}{of} could not be computed{where}{often}: {self.text}\n"
            f"{self.traceback}"
        )


def this_worker() -> str:
    """Give the address of the worker that runs this task; empty elsewhere."""
    with contextlib.suppress(ValueError):  # not on a worker
        return str(get_worker().address)
    return ""


def find_problem(parts: Iterable[tuple[int, Any]]) -> Problem | None:
    """Compute numbered collections in this process, one after the other, until one fails."""
    for number, part in parts:
        try:
            part.compute()
        except Exception as error:
            return Problem.of(number, error)
    return None


def _erred_on(client: Client, key: Any) -> list[str]:
    """Tell on which workers a task failed, or the one that it depends on."""

    def look(dask_scheduler: Any = None) -> list[str]:
        task = dask_scheduler.tasks.get(key)
        blamed = getattr(task, "exception_blame", None) or task
        return [] if blamed is None else sorted(map(str, blamed.erred_on))

    with contextlib.suppress(Exception):  # the error itself matters more
        found: list[str] = client.run_on_scheduler(look)
        return found
    return []
