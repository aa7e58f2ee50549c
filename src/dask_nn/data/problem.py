"""A block that could not be computed: which, where and why."""

from __future__ import annotations

import contextlib
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from dask.callbacks import Callback
from distributed import get_worker

from dask_nn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dask.delayed import Delayed
    from distributed import Client, Future

__all__ = [
    "VALIDATION",
    "Problem",
    "TaskLog",
    "find_problem",
    "of_validation_data",
    "this_worker",
]

# How errors about it begin: its fields have the same names as those of the training data.
VALIDATION: Final = "validation data: "


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


@contextlib.contextmanager
def of_validation_data() -> Iterator[None]:
    """Say of data that is refused that it is validation data."""
    try:
        yield
    except DataError as error:
        message = f"{VALIDATION}{error}"
        raise DataError(message) from error


class TaskLog(Callback):
    """What a computation in this process had done when it ended.

    Attributes
    ----------
    finished : set
        Keys of tasks that ended well.
    under_way : set
        Keys of those that were running then, and of all that depends on them.
    """

    def __init__(self) -> None:
        super().__init__(finish=self._note)  # type: ignore[no-untyped-call]
        self.finished: set[Any] = set()
        self.under_way: set[Any] = set()

    def _note(self, graph: Any, state: dict[str, Any], errored: bool) -> None:
        del graph, errored
        self.finished = set(state["finished"])
        reached = list(state["running"])
        while reached:
            key = reached.pop()
            if key not in self.under_way:
                self.under_way.add(key)
                reached += state["dependents"][key]


def find_problem(parts: Iterable[tuple[int, Delayed]], log: TaskLog) -> Problem | None:
    """Compute blocks of something that has failed in this process, until one fails again.

    Parameters
    ----------
    parts : iterable of (int, Delayed)
        The blocks, with their numbers.
    log : TaskLog
        Of the failure: blocks that were computed are left out, those under way come first.
    """
    suspects = [(number, part) for number, part in parts if part.key not in log.finished]
    for number, part in sorted(suspects, key=lambda suspect: suspect[1].key not in log.under_way):
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
